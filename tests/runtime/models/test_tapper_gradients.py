"""Gradients through taps, with gradient checkpointing and without."""

import pytest
import torch
from tiny_models import FAMILY_NAMES

from gkd_dsl.models.errors import TapError
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.checkpointing import set_checkpointing

PATHS = [
    TapPath("hidden", 0),
    TapPath("hidden", 1),
    TapPath("hidden", 3),
    TapPath("final"),
    TapPath("layer", 0, "attn.q"),
    TapPath("layer", 1, "attn.k"),
    TapPath("layer", 2, "attn.v"),
    TapPath("layer", 1, "attn.scores"),
    TapPath("layer", 2, "attn.scores"),
    TapPath("layer", 2, "attn.probs"),
    TapPath("layer", 1, "attn.out"),
    TapPath("layer", 2, "mlp"),
    TapPath("cls"),
    TapPath("logits"),
]


def gradients(tiny, inputs, paths, stop=None):
    tiny.model.zero_grad()
    torch.manual_seed(11)
    taps = tiny.tapper.run(inputs, paths, stop_after=stop)
    total = sum(tap.square().mean() for tap in taps.values())
    total.backward()
    return (
        {path: tap.detach().clone() for path, tap in taps.items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in tiny.model.named_parameters()},
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_of_hidden_states_is_that_of_the_model(make, batch, family):
    tiny = make(family)
    inputs = batch()
    _, ours = gradients(tiny, inputs, [TapPath("hidden", k) for k in range(3)])
    tiny.model.zero_grad()
    states = tiny.model(**inputs, output_hidden_states=True).hidden_states[:3]
    sum(state.square().mean() for state in states).backward()
    for name, parameter in tiny.model.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        got = ours[name] if ours[name] is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_gradient_of_probs_is_that_of_eager_attentions(make, batch):
    tiny = make("llama")
    inputs = batch()
    path = TapPath("layer", 1, "attn.probs")
    mask = inputs["attention_mask"][:, None, :, None]
    (tiny.tapper.run(inputs, [path])[path] * mask).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    tiny.model.set_attn_implementation("eager")
    (tiny.model(**inputs, output_attentions=True).attentions[1] * mask).square().sum().backward()
    for name, parameter in tiny.model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert ours


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_checkpointing_changes_neither_values_nor_gradients(make, batch, family):
    tiny = make(family, "classification")
    tiny.model.train()
    inputs = batch("left")
    plain_taps, plain = gradients(tiny, inputs, PATHS)
    set_checkpointing(tiny.model, True)
    recomputed = []
    tiny.blocks[1].get_submodule(tiny.family.attention).register_forward_hook(lambda *_: recomputed.append(1))
    taps, checked = gradients(tiny, inputs, PATHS)
    assert len(recomputed) == 2
    for path in PATHS:
        torch.testing.assert_close(taps[path], plain_taps[path])
    for name, gradient in plain.items():
        if gradient is None:
            assert checked[name] is None
        else:
            torch.testing.assert_close(checked[name], gradient, atol=1e-6, rtol=1e-4)
    assert tiny.model.config._attn_implementation == "sdpa"
    set_checkpointing(tiny.model, False)


@pytest.mark.parametrize("stop", [TapPath("layer", 1, "attn.scores"), TapPath("hidden", 2), TapPath("layer", 1, "mlp")])
def test_a_stop_under_checkpointing(make, batch, stop):
    tiny = make("llama")
    tiny.model.train()
    paths = [TapPath("layer", 0, "attn.scores"), TapPath("hidden", 1), stop]
    plain_taps, plain = gradients(tiny, batch(), paths, stop)
    set_checkpointing(tiny.model, True)
    calls = []
    for i, block in enumerate(tiny.blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
    for _ in range(2):
        taps, checked = gradients(tiny, batch(), paths, stop)
        assert 2 not in calls
        for path in paths:
            torch.testing.assert_close(taps[path], plain_taps[path])
        for name, gradient in plain.items():
            if gradient is not None:
                torch.testing.assert_close(checked[name], gradient, atol=1e-6, rtol=1e-4)


def test_checkpointing_with_autocast_and_attach(make, batch):
    tiny = make("qwen3", "causal_lm")
    tiny.model.train()
    set_checkpointing(tiny.model, True)
    path, query = TapPath("layer", 1, "attn.scores"), TapPath("layer", 1, "attn.q")
    with torch.autocast("cpu", dtype=torch.bfloat16), tiny.tapper.attach([path, query, TapPath("logits")]) as capture:
        output = tiny.model(**batch())
        first = capture[path]
        assert torch.equal(capture[TapPath("logits")], output.logits)
        loss = first.float().square().mean() + output.logits.float().square().mean()
        loss.backward()
        assert capture[path] is first
        # Computing blocks again reports to nobody; the next forward reports as before.
        tiny.model(**batch("left"))
        assert capture[path].shape == first.shape
        assert not torch.equal(capture[path], first)
    assert tiny.model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0


def test_attach_fills_at_each_forward_and_lets_go(make, batch):
    tiny = make("bert", "classification")
    paths = [TapPath("hidden", 2), TapPath("cls"), TapPath("layer", 0, "attn.probs")]
    with torch.no_grad(), tiny.tapper.attach(paths) as capture:
        tiny.model(**batch())
        right = {path: capture[path].clone() for path in capture}
        tiny.model(**batch("left"))
        assert len(capture) == 3
        assert not torch.equal(capture[paths[0]], right[paths[0]])
    with torch.no_grad():
        alone = tiny.tapper.run(batch(), paths)
    for path in paths:
        assert torch.equal(alone[path], right[path])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()) == 0


def test_attach_finds_the_mask_by_position(make, batch):
    tiny = make("llama")
    inputs = batch("left")
    cls = TapPath("cls")
    with torch.no_grad(), tiny.tapper.attach([cls]) as capture:
        output = tiny.model(inputs["input_ids"], inputs["attention_mask"])
    # The last token of each text: the first sees nothing of it.
    assert torch.equal(capture[cls], output.last_hidden_state[:, -1])


def test_reentrant_checkpointing_is_refused(make, batch):
    tiny = make("bert")
    tiny.model.train()
    tiny.model.activation_checkpointing_enable({"use_reentrant": True})
    before = sum(len(module._forward_hooks) for module in tiny.model.modules())
    with pytest.raises(TapError, match="no gradient under reentrant checkpointing"):
        tiny.tapper.run(batch(), [TapPath("layer", 1, "attn.q")])
    assert sum(len(module._forward_hooks) for module in tiny.model.modules()) == before
