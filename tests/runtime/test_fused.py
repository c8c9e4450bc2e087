"""Fused losses in a step: accumulation, errors that name the loss, heads of many shapes, what stays plain."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gkd_dsl import Spec
from gkd_dsl.diagnostics import SpecError
from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.graph.passes.fuse import fuse, fusions, refusals
from gkd_dsl.graph.plan import Fused
from gkd_dsl.models.describe import describe
from gkd_dsl.models.heads import LinearHead, linear_head
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.ops.fused_head import fused_losses
from gkd_dsl.runtime.rows import Share, shared
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.schedules import Clock

V = 31
CLOCK = Clock(3, 11, 11.0)
KD = """
loss hard = cross_entropy(s.logits, batch.labels)
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
loss back = jsd(s.logits <- t.logits)
stage main for 3 epochs { minimize 0.5 * hard + 0.7 * soft + 0.1 * back }
"""


def beside(line):
    """The same with a further loss."""
    return line + KD.replace("minimize ", f"minimize 0.1 * {line.split()[1]} + ")


COMMON = {"vocab_size": V, "pad_token_id": 0, "initializer_range": 0.3}
SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24,
    "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**SMALL, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "granite": ("GraniteForCausalLM", {**SMALL, "logits_scaling": 4.0}),
    "cohere": ("CohereForCausalLM", {**SMALL, "logit_scale": 0.5}),
}


def folder(root, name, family, width, **more):
    place = root / name
    place.mkdir(exist_ok=True)
    architecture, config = FAMILIES[family]
    config = {**COMMON, **config, **more, "model_type": family, "architectures": [architecture]}
    config["n_embd" if family == "gpt2" else "hidden_size"] = width
    (place / "config.json").write_text(json.dumps(config))
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(26))]))
    return name


def spec_of(root, family, body=KD, runtime="", **more):
    t, s = folder(root, "t", family, 16, **more), folder(root, "s", family, 16, **more)
    (root / "lines.txt").write_text("one line\nanother\n")
    lines = f'gkd 1\nteacher t = random_init("{t}")\nstudent s = random_init("{s}")\ndata rows = text("lines.txt")\n'
    return Spec(lines + body + runtime, root=root)


def models_of(plan, dtype=torch.float64):
    return {node.name: load(node.info, dtype=dtype, seed=number) for number, node in enumerate(plan.models)}


def batch_of(rows=4, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, V, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def gradients(step, value):
    found = torch.autograd.grad(value, [p for _, p in step.trainable()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_are_tied_scaled_or_capped(family, tmp_path):
    (plan,) = spec_of(tmp_path, family).plan().stages
    (group,) = fusions(plan)
    assert [term.op for term in group.terms] == ["cross_entropy", "jsd", "kl"]
    assert [head.model for head in group.teachers] == ["t"]
    step, batch = StepModule(plan, models_of(plan)).eval(), batch_of()
    counts = step.denominators([batch], CLOCK)
    out, plain = step(batch, CLOCK, counts), step(batch, CLOCK, counts, fused=False)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-9, atol=1e-9)
    assert not any(value.requires_grad for value in out.values.values())
    for name, value in plain.terms.items():
        torch.testing.assert_close(out.terms[name], value, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_logits_of_a_fused_step_are_never_made(tmp_path, monkeypatch):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, batch = StepModule(plan, models_of(plan)), batch_of()
    called = []
    step.models["s"].lm_head.register_forward_hook(lambda *_: called.append("s"))
    step.teachers.models["t"].lm_head.register_forward_hook(lambda *_: called.append("t"))
    counts = step.denominators([batch], CLOCK)
    step(batch, CLOCK, counts).loss.backward()
    assert called == []
    step(batch, CLOCK, counts, fused=False)
    assert sorted(called) == ["s", "t"]


def test_four_times_two_is_eight(tmp_path):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, whole = StepModule(plan, models_of(plan)).eval(), batch_of(8)
    expected = gradients(step, step(whole, CLOCK, step.denominators([whole], CLOCK)).loss)
    parts = [{name: value[at : at + 2] for name, value in whole.items()} for at in range(0, 8, 2)]
    counts = step.denominators(parts, CLOCK)
    found = [gradients(step, step(part, CLOCK, counts).loss) for part in parts]
    for one, *others in zip(expected, *found, strict=True):
        torch.testing.assert_close(sum(others), one, rtol=1e-9, atol=1e-10)


def test_a_loss_that_is_in_two_losses_weighs_what_both_say(tmp_path):
    body = KD.replace("stage main", "loss mixed = 2 * hard + 3 * soft\nstage main")
    (plan,) = spec_of(tmp_path, "llama", body.replace("0.1 * back", "0.1 * back + 0.4 * mixed")).plan().stages
    (group,) = fusions(plan)
    assert len(group.terms) == 3
    step, batch = StepModule(plan, models_of(plan)).eval(), batch_of()
    counts = step.denominators([batch], CLOCK)
    out, plain = step(batch, CLOCK, counts), step(batch, CLOCK, counts, fused=False)
    terms = plain.terms
    wanted = (0.5 + 0.8) * terms["hard"] + (0.7 + 1.2) * terms["soft"] + 0.1 * terms["back"]
    torch.testing.assert_close(out.loss.detach(), wanted, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_of_a_process_whose_row_is_anothers_nothing_counts(fused, tmp_path):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, batch = StepModule(plan, models_of(plan)), batch_of(1)
    counts = step.denominators([batch], CLOCK)
    assert all(step(batch, CLOCK, counts, fused=fused).terms.values())
    with shared(Share(1, (1, 0))):
        out = step(batch, CLOCK, counts, fused=fused)
    assert out.loss == 0.0
    assert not any(out.terms.values())
    assert not any(gradient.any() for gradient in gradients(step, out.loss))


def test_a_batch_in_which_nothing_counts_gives_0(tmp_path):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, batch = StepModule(plan, models_of(plan)), batch_of()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = step(batch, CLOCK, step.denominators([batch], CLOCK))
    assert out.loss == 0.0
    out.loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0.0 for _, p in step.trainable())


@pytest.mark.parametrize(("precision", "recompute"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_a_backend_trains_the_same_weights(precision, recompute, tmp_path):
    after, settings = [], Settings(precision=precision, checkpoint=recompute)
    for how in ("auto", "off"):
        (plan,) = spec_of(tmp_path, "llama", runtime=f"runtime {{ fuse_logits = {how} }}").plan().stages
        step, backend = StepModule(plan, models_of(plan, torch.float32)), LocalBackend(settings)
        backend.begin(step, OptimSpec("sgd", lr=0.1))
        assert any(isinstance(i, Fused) for i in step._fused_program.instructions) == (how == "auto")
        losses = [backend.step([batch_of(seed=n), batch_of(3, 5, n + 9)], Clock(n, 4, 4.0), 0.1) for n in range(3)]
        after.append(([r.loss for r in losses], [p.detach().clone() for _, p in step.trainable()]))
        backend.end()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert after[0][0] == pytest.approx(after[1][0], rel=tolerance)
    for one, other in zip(after[0][1], after[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_loss_whose_gradient_is_not_finite_is_named(tmp_path):
    body = beside("loss far = mse(s.hidden[1] <- t.hidden[1])")
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    step, backend = StepModule(plan, models_of(plan, torch.float32)), LocalBackend()
    backend.begin(step, OptimSpec("sgd", lr=0.1))

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * torch.inf

    # After the last block: of the losses, those over logits alone have their gradient here.
    step.models["s"].model.norm.register_forward_hook(lambda module, args, output: Spoilt.apply(output))
    with pytest.raises(RunError, match="the gradient of loss `hard` is not finite"):
        backend.step([batch_of()], CLOCK, 0.1)


def test_a_loss_of_weight_0_is_computed_and_moves_nothing(tmp_path):
    body = KD.replace("0.7 * soft", "ramp(0.0 -> 1.0, until = 100%) * soft").replace("for 3 epochs", "for 10 steps")
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    step, batch = StepModule(plan, models_of(plan)).eval(), batch_of()
    counts = step.denominators([batch], CLOCK)
    out = step(batch, Clock(0, 10, 10.0), counts)
    assert out.weights["soft"] == 0.0
    assert out.terms["soft"] > 0.0
    plain = step(batch, Clock(0, 10, 10.0), counts, fused=False)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


PLAIN = {
    "mse": ("loss flat = mse(s.logits <- t.logits)", "`mse` reads the same logits"),
    "mean": ("loss more = mse(softmax(s.logits) <- softmax(t.logits))", "`softmax` reads the same logits"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_logits_that_something_else_reads_stay_whole(name, tmp_path):
    line, why = PLAIN[name]
    body = beside(line)
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    assert fusions(plan) == ()
    assert fuse(plan) is plan
    assert set(refusals(plan).values()) == {why}


def test_a_teacher_whose_logits_something_else_reads_stays_whole_and_the_student_is_fused(tmp_path):
    body = KD.replace("kl(s.logits <- t.logits,", "kl(s.logits <- 0.5 * t.logits,")
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    (group,) = fusions(plan)
    assert group.teachers == ()
    step, batch = StepModule(plan, models_of(plan)).eval(), batch_of()
    counts = step.denominators([batch], CLOCK)
    out, plain = step(batch, CLOCK, counts), step(batch, CLOCK, counts, fused=False)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("side", "exact"), [("t.logits", True), ("0.5 * t.logits", False)])
def test_logits_that_a_model_gave_are_taken_to_be_finite(side, exact, tmp_path, monkeypatch):
    """Those of a teacher whose head is not at hand, too, though the step has copies of them without gradient."""
    (plan,) = spec_of(tmp_path, "llama", KD.replace("t.logits", side)).plan().stages
    made = models_of(plan)
    made["t"].lm_head.register_forward_hook(lambda module, inputs, found: found)
    step, batch, seen = StepModule(plan, made).eval(), batch_of(), []

    def spy(hidden, head, teachers, losses, **more):
        seen.append((len(teachers), [loss.exact for loss in losses if loss.teacher is not None]))
        return fused_losses(hidden, head, teachers, losses, **more)

    monkeypatch.setattr("gkd_dsl.runtime.fused.fused_losses", spy)
    counts = step.denominators([batch], CLOCK)
    out, plain = step(batch, CLOCK, counts), step(batch, CLOCK, counts, fused=False)
    assert seen == [(1, [exact, exact])]
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_a_head_with_an_adapter_is_run_plain_and_on_refuses_it(tmp_path):
    class Adapted(nn.Linear):
        pass

    for how in ("auto", "on"):
        (plan,) = spec_of(tmp_path, "llama", runtime=f"runtime {{ fuse_logits = {how} }}").plan().stages
        made = models_of(plan)
        made["s"].lm_head.__class__ = Adapted
        if how == "on":
            with pytest.raises(RunError, match="the head of `s` is no plain linear map"):
                StepModule(plan, made)
        else:
            step = StepModule(plan, made)
            assert not any(isinstance(item, Fused) for item in step._fused_program.instructions)


@pytest.mark.parametrize("what", ["hook", "hook before", "quantised"])
def test_a_head_that_does_more_than_its_product_is_run_plain(what, tmp_path):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    made, batch = models_of(plan), batch_of()
    head = made["s"].lm_head
    if what == "hook":
        head.register_forward_hook(lambda module, args, found: 2.0 * found)
    elif what == "hook before":
        head.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    else:
        # As the weights of torchao are, whose entries are no numbers to multiply with.
        head.weight.__tensor_flatten__ = lambda: None
    step = StepModule(plan, made).eval()
    assert not any(isinstance(item, Fused) for item in step._fused_program.instructions)
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = made["s"](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = step(batch, CLOCK, step.denominators([batch], CLOCK)).terms["hard"]
    torch.testing.assert_close(found, wanted.detach())


def test_on_is_refused_with_the_reason_and_off_fuses_nothing(tmp_path):
    assert spec_of(tmp_path, "llama", runtime="runtime { fuse_logits = on }").checked.ok
    (plan,) = spec_of(tmp_path, "llama", runtime="runtime { fuse_logits = off }").plan().stages
    assert fusions(plan) == ()
    body = beside("loss flat = mse(s.logits <- t.logits)")
    with pytest.raises(SpecError, match="E0433"):
        spec_of(tmp_path, "llama", body, runtime="runtime { fuse_logits = on }").plan()


def test_explain_says_what_is_fused(tmp_path):
    from gkd_dsl.graph.explain import explain

    graph = spec_of(tmp_path, "llama").graph
    (row,) = explain(graph).stages[0].fused
    assert set(row.losses) == {"hard", "soft", "back"}
    assert row.models == ("s", "t")
    assert explain(graph, runtime=(("fuse_logits", "off"),)).stages[0].fused == ()
    live = [explain(graph, runtime=(("fuse_logits", how),)).stages[0].live_bytes for how in ("auto", "off")]
    assert live[0] < live[1]


def test_the_table_of_heads(tmp_path):
    for family in FAMILIES:
        found = linear_head(describe(str(tmp_path / folder(tmp_path, family, family, 16))))
        assert found is not None
        assert found.module == "lm_head"
        expected = {"gemma2": {"softcap": 2.0}, "granite": {"scale": 4.0, "divide": True}, "cohere": {"scale": 0.5}}
        assert found == LinearHead("lm_head", **expected.get(family, {}))


def test_a_term_without_weight_at_a_step_is_left_out_of_the_pass_with_its_teacher(tmp_path):
    body = """
loss mixed = cross_entropy(s.logits, batch.labels) + ramp(0 -> 1, until = 100%) * kl(s.logits <- t.logits)
stage main for 10 steps { minimize mixed }
"""
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    step, batch = StepModule(plan, models_of(plan)).eval(), batch_of()
    ran = []
    step.teachers.models["t"].register_forward_hook(lambda *_: ran.append("t"))
    step.teachers.models["t"].model.register_forward_hook(lambda *_: ran.append("t"))
    counts = step.denominators([batch], CLOCK)
    first = step(batch, Clock(0, 10, 10.0), counts)
    assert ran == []
    plain = step(batch, Clock(0, 10, 10.0), counts, fused=False)
    torch.testing.assert_close(first.loss, plain.loss, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, first.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    later = step(batch, Clock(5, 10, 10.0), counts)
    assert ran
    assert later.loss > first.loss


def test_weights_of_tokens_and_texts_are_in_the_fused_sum(tmp_path):
    body = """
loss soft = kl(s.logits <- t.logits)
loss hard = cross_entropy(s.logits, batch.labels)
stage main for 3 epochs { minimize soft + hard }
"""
    (plan,) = spec_of(tmp_path, "llama", body).plan().stages
    key = next(term.key for group in fusions(plan) for term in group.terms if term.op == "kl")
    weighted = replace(
        plan,
        columns=(*plan.columns, "tokens", "texts"),
        counted=tuple(
            replace(entry, token_weight="batch/tokens", sample_weight="batch/texts") if entry.key == key else entry
            for entry in plan.counted
        ),
        program=tuple(
            replace(step, inputs=(*step.inputs, ("token_weight", "batch/tokens"), ("sample_weight", "batch/texts")))
            if getattr(step, "key", None) == key
            else step
            for step in plan.program
        ),
    )
    step, batch = StepModule(weighted, models_of(plan)).eval(), batch_of()
    generator = torch.Generator().manual_seed(3)
    batch |= {"tokens": torch.rand(4, 7, generator=generator), "texts": torch.rand(4, generator=generator)}
    counts = step.denominators([batch], CLOCK)
    out, plain = step(batch, CLOCK, counts), step(batch, CLOCK, counts, fused=False)
    torch.testing.assert_close(out.terms["soft"], plain.terms["soft"], rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients(step, out.loss), gradients(step, plain.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_a_label_outside_the_vocabulary_is_refused_as_in_the_plain_form(tmp_path):
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, batch = StepModule(plan, models_of(plan)), batch_of()
    batch["labels"][0, 1] = V
    counts = step.denominators([batch], CLOCK)
    for fused in (True, False):
        with pytest.raises(ValueError, match=f"labels run from . to {V}, but the model has {V} classes"):
            step(batch, CLOCK, counts, fused=fused)


def test_where_looking_at_labels_would_be_waiting_a_strange_one_makes_the_loss_nan(tmp_path, monkeypatch):
    """As on a GPU: its loss alone, so that the step names it and updates nothing."""
    (plan,) = spec_of(tmp_path, "llama").plan().stages
    step, batch = StepModule(plan, models_of(plan)), batch_of()
    batch["labels"][0, 1] = V
    monkeypatch.setattr("gkd_dsl.runtime.fused._can_look", lambda labels: False)
    terms = step(batch, CLOCK, step.denominators([batch], CLOCK)).terms
    assert {name for name, value in terms.items() if value.isnan()} == {"hard"}
