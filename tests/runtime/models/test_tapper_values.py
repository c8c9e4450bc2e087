"""Every tap of every family against an independent reading of the same model."""

import copy

import pytest
import torch
from tiny_models import CASES
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gkd_dsl.models.resolve import list_taps, resolve_tap
from gkd_dsl.models.taps import TapPath

POST_NORM = ("bert", "roberta", "distilbert")
BOTTLENECK = ("mobilebert",)


def positions(family, inputs):
    """The positions that `generate` of transformers gives GPT-2, whose own count begins at the first column."""
    return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)} if family == "gpt2" else {}


def reference(tiny, inputs):
    """What an eager copy says of itself, and the projections read by hooks placed by hand."""
    model = copy.deepcopy(tiny.model)
    model.set_attn_implementation("eager")
    base = model.base_model
    read = {}

    def keep(name):
        return lambda module, args, output: read.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    names = {
        "bert": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "roberta": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "mobilebert": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "gpt2": ("attn.c_attn",) * 3,
        "qwen3": ("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_proj"),
    }.get(tiny.info.family, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    for i, block in enumerate(base.get_submodule(tiny.family.blocks)):
        block.register_forward_hook(keep(("block", i)))
        for letter, name in zip("qkv", names, strict=True):
            block.get_submodule(name).register_forward_hook(keep((letter, i)))
    with torch.no_grad():
        read["output"] = model(**inputs, output_hidden_states=True, output_attentions=True)
        read["base"] = base(**inputs)
    return read


def per_head(tiny, read, letter, i):
    """`[B, heads, L, D]` of a projection, split by hand."""
    value = read[letter, i]
    if tiny.info.family == "gpt2":
        width = tiny.info.size("H")
        start = "qkv".index(letter) * width
        value = value[..., start : start + width]
    if value.dim() == 4:
        return value.permute(0, 2, 1, 3)
    batch, length, _ = value.shape
    return value.reshape(batch, length, -1, tiny.info.size("D")).permute(0, 2, 1, 3)


def scores_of(tiny, q, k, i):
    depth = tiny.info.size("D")
    if tiny.family.post_norm or tiny.info.family == "gpt2":
        scale = depth**-0.5 / ((i + 1) if tiny.info.family == "gpt2" else 1)
        return torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    positions = torch.arange(q.shape[2])[None]
    cos, sin = tiny.model.base_model.rotary_emb(q, positions)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k = k.repeat_interleave(tiny.info.size("A") // tiny.info.size("KV"), dim=1)
    return torch.einsum("bhqd,bhkd->bhqk", q, k) / depth**0.5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_tap_is_what_the_model_says_of_itself(make, batch, close, family, task, side):
    tiny = make(family, task)
    inputs = batch(side)
    mask = inputs["attention_mask"]
    count = tiny.info.size("N")
    layers = range(count)
    paths = [TapPath("hidden", k) for k in range(count + 1)]
    paths += [TapPath("layer", i, f"attn.{part}") for i in layers for part in ("q", "k", "v", "scores", "probs", "out")]
    paths += [TapPath("layer", i, "mlp") for i in layers]
    paths += [TapPath("final"), TapPath("cls")]
    if task != "encoder":
        paths.append(TapPath("logits"))
    if tiny.info.has_pooler:
        paths.append(TapPath("pooled"))
    with torch.no_grad():
        taps = tiny.tapper.run(inputs, paths)
    read = reference(tiny, inputs | positions(family, inputs))
    output = read["output"]

    for k in range(count):
        close(taps[TapPath("hidden", k)], output.hidden_states[k], mask)
    close(taps[TapPath("hidden", count)], read["block", count - 1], mask)
    final = read["base"].last_hidden_state
    close(taps[TapPath("final")], final, mask)
    first = [0, 0, 0] if side == "right" else [0, 3, 2]
    if tiny.info.left_to_right:
        # The first token of a decoder sees nothing of the text: the last one stands for it.
        first = [6, 3, 4] if side == "right" else [6, 6, 6]
    close(taps[TapPath("cls")], torch.stack([final[row, at] for row, at in enumerate(first)]))
    if task != "encoder":
        rows_only = task == "classification"
        close(taps[TapPath("logits")], output.logits, None if rows_only else mask)
    if tiny.info.has_pooler and side == "right":
        close(taps[TapPath("pooled")], read["base"].pooler_output)

    for i in layers:
        q, k, v = (per_head(tiny, read, letter, i) for letter in "qkv")
        for letter, expected in zip("qkv", (q, k, v), strict=True):
            close(taps[TapPath("layer", i, f"attn.{letter}")], expected, mask, (2,))
        close(taps[TapPath("layer", i, "attn.scores")], scores_of(tiny, q, k, i), mask, (2, 3), atol=1e-4)
        close(taps[TapPath("layer", i, "attn.probs")], output.attentions[i], mask, (2,))
        residual, attended, fed = (
            taps[TapPath("hidden", i)],
            taps[TapPath("layer", i, "attn.out")],
            taps[TapPath("layer", i, "mlp")],
        )
        block = tiny.blocks[i]
        if family in POST_NORM:
            norms = (
                (block.sa_layer_norm, block.output_layer_norm)
                if family == "distilbert"
                else (block.attention.output.LayerNorm, block.output.LayerNorm)
            )
            together = norms[1](fed + norms[0](attended + residual))
        elif family in BOTTLENECK:
            inside = block.attention.output.LayerNorm(attended + block.bottleneck.input(residual))
            for stacked in block.ffn:
                inside = stacked(inside)
            inside = block.output.LayerNorm(fed + inside)
            widened = block.output.bottleneck
            together = widened.LayerNorm(widened.dense(inside) + residual)
        else:
            together = residual + attended + fed
        close(together.detach(), taps[TapPath("hidden", i + 1)], mask)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_what_is_listed_runs_and_has_the_type_it_says(make, batch, family, task):
    tiny = make(family, task)
    inputs = batch()
    for row in list_taps(tiny.info, "s"):
        if row.path.startswith(("weight", "module")):
            continue
        parts = [
            (name, (int(index.partition("..")[2] or index),) if bracket else None)
            for piece in row.path.replace("..", "~").split(".")
            for name, bracket, index in [piece.replace("~", "..").rstrip("]").partition("[")]
        ]
        if not row.available:
            assert row.why
            continue
        resolved = resolve_tap(tiny.info, "s", parts)
        assert resolved.type.long == row.type
        with torch.no_grad():
            value = tiny.tapper.run(inputs, [resolved.path])[resolved.path]
        sizes = {"B": 3, "L": 7}
        assert tuple(value.shape) == tuple(sizes.get(dim.name, dim.size) for dim in resolved.type.dims)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_sizes_from_the_config_are_those_of_the_modules(make, family, task):
    tiny = make(family, task)
    info, base, block = tiny.info, tiny.model.base_model, tiny.blocks[0]
    words = base.get_parameter(tiny.family.words)
    assert tuple(words.shape) == (info.size("V"), info.size("E") or info.size("H"))
    assert len(tiny.blocks) == info.size("N")
    assert type(tiny.model).__name__ == info.architecture
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert any(info.size("F") in shape for shape in shapes.values())
    if family == "gpt2":
        assert shapes["attn.c_attn.weight"] == (info.size("H"), 3 * info.size("A") * info.size("D"))
    else:
        q = block.get_submodule(
            "self_attn.q_proj"
            if tiny.family.prefix == "model"
            else "attention.q_lin"
            if family == "distilbert"
            else "attention.self.query"
        )
        inside = info.size("I") or info.size("H")
        assert tuple(q.weight.shape) == (info.size("A") * info.size("D"), inside)
    if tiny.family.prefix == "model":
        assert block.self_attn.k_proj.out_features == info.size("KV") * info.size("D")
    if task == "classification":
        head = getattr(tiny.model, "score", None) or tiny.model.classifier
        assert getattr(head, "out_proj", head).out_features == info.size("C") == 3


@pytest.mark.parametrize("family", [family for family, task in CASES if task == "causal_lm"])
def test_a_causal_model_does_not_look_ahead(make, batch, family):
    tiny = make(family, "causal_lm")
    assert tiny.info.causal
    inputs = batch()
    logits = TapPath("logits")
    with torch.no_grad():
        before = tiny.tapper.run(inputs, [logits])[logits]
        inputs["input_ids"][0, 5] = (inputs["input_ids"][0, 5] + 1) % 30 + 3
        after = tiny.tapper.run(inputs, [logits])[logits]
    torch.testing.assert_close(after[0, :5], before[0, :5])
    assert (after[0, 5:] - before[0, 5:]).abs().amax(dim=-1).min() > 0


def test_token_types_reach_bert_and_not_roberta(make, batch, close):
    inputs = batch()
    types = {**inputs, "token_type_ids": inputs["attention_mask"].clone()}
    path = TapPath("hidden", 3)
    bert, roberta = make("bert"), make("roberta")
    with torch.no_grad():
        assert not torch.equal(bert.tapper.run(types, [path])[path], bert.tapper.run(inputs, [path])[path])
        assert torch.equal(roberta.tapper.run(types, [path])[path], roberta.tapper.run(inputs, [path])[path])
        expected = bert.model(**types).last_hidden_state
    close(bert.tapper.run(types, [path])[path].detach(), expected, inputs["attention_mask"])


def test_a_batch_without_padding_or_mask(make, close):
    ids = torch.randint(3, 37, (2, 6), generator=torch.Generator().manual_seed(0))
    for family in ("bert", "llama", "mistral", "gpt2"):
        tiny = make(family)
        paths = [TapPath("layer", 1, "attn.probs"), TapPath("hidden", 3), TapPath("cls")]
        with torch.no_grad():
            taps = tiny.tapper.run({"input_ids": ids}, paths)
        read = reference(tiny, {"input_ids": ids})
        close(taps[paths[0]], read["output"].attentions[1])
        close(taps[paths[1]], read["block", 2])
        close(taps[paths[2]], read["base"].last_hidden_state[:, -1 if tiny.info.left_to_right else 0])
