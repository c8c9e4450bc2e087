"""DIITO against counterfactual forwards made by hand (arXiv 2112.02505)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_world import CLOCK, Pair, Step, batch_of, close, made, plans, use

from gkd_dsl.runtime.ops.interventions import random_spans
from gkd_dsl.runtime.program import generator

PAIR = Pair(teacher=(4, 16, 4), student=(2, 16, 4), task="masked_lm")
T = 2.0


def step(args=""):
    plan = plans(PAIR.spec(*use("diito", args=args)))["m_diito.pretrain"]
    return Step(plan, made(plan))


def run(found, batch, clock=CLOCK):
    module = found.distiller.module
    return module(batch, clock, module.denominators([batch], clock), fused=False)


def language_batch(lengths=(7, 4, 2), **options):
    return batch_of(lengths, task="masked_lm", **options)


def spans_of(found, batch, clock, share=0.3):
    """The draw of the step: its own generator, given by the operator's key."""
    key = next(a.key for a in found.distiller.plan.valid_program if a.op == "random_spans")
    mask = batch["attention_mask"]
    return random_spans(mask, torch.roll(mask, -1, 0), share=share, generator=generator(key, clock))


def chosen_of(found, clock):
    """The student block that is exchanged at a step."""
    forward = next(f for f in found.distiller.plan.forwards if f.model == "s" and f.changes)
    return [change.path.index - 1 for change in forward.changes if change.when.value(clock) != 0.0]


def states(model, ids, block):
    """What a block gives for a text without padding, and the logits."""
    out = model(input_ids=ids[None], output_hidden_states=True)
    return out.hidden_states[block + 1][0], out.logits[0], out.hidden_states[-1][0]


def counterfactual(model, ids, block, places, source):
    """A forward in which positions of one block's output are taken from `source`, one by one."""

    def change(_module, _args, out):
        rows = list(out[0].unbind(0))
        for position, other in enumerate(places):
            if other >= 0:
                rows[position] = source[other]
        return torch.stack(rows)[None]

    handle = model.base_model.encoder.layer[block].register_forward_hook(change)
    out = model(input_ids=ids[None])
    handle.remove()
    return out.logits[0]


def divergences(teacher, student):
    log_p, log_q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1)


def by_hand(found, batch, clock, detach=False):
    """The terms over texts cropped to their own length, and the student's parameters."""
    student = copy.deepcopy(found.models["s"])
    teacher = copy.deepcopy(found.models["t"]).requires_grad_(False)
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    labels = [row[mask.bool()] for row, mask in zip(batch["labels"], batch["attention_mask"], strict=True)]
    (block,) = chosen_of(found, clock)
    deep = 2 * block + 1
    spans = spans_of(found, batch, clock)
    soft, causal, cosine, mlm = [], [], [], []
    for row, ids in enumerate(texts):
        other = texts[(row + 1) % len(texts)]
        _, logits, last = states(student, ids, block)
        _, taught, taught_last = states(teacher, ids, deep)
        soft.append(divergences(taught, logits))
        cosine.append(1 - F.cosine_similarity(last, taught_last, dim=-1))
        mlm.append(F.cross_entropy(logits, labels[row], ignore_index=-100, reduction="none")[labels[row] != -100])
        place = [int(n) for n in spans[row][: len(ids)]]
        ours, theirs = states(student, other, block)[0], states(teacher, other, deep)[0]
        causal.append(
            divergences(
                counterfactual(teacher, ids, deep, place, theirs),
                counterfactual(student, ids, block, place, ours.detach() if detach else ours),
            )
        )
    terms = {"soft": soft, "cos": cosine, "mlm": mlm, "causal_detached" if detach else "causal": causal}
    return {name: torch.cat(values).mean() for name, values in terms.items()}, student


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("detach", [False, True])
def test_terms_and_gradients(number, detach):
    args = "causal_weight = 0.0, detached_weight = 0.25" if detach else ""
    found, batch, clock = step(args), language_batch(), replace(CLOCK, step=number)
    out = run(found, batch, clock)
    terms, student = by_hand(found, batch, clock, detach)
    for name, expected in terms.items():
        close(out.values[f"m_diito/{name}"], expected, name)
    total = 0.25 * sum(terms.values())
    close(out.loss, total, "total")
    out.loss.backward()
    total.backward()
    theirs = dict(student.named_parameters())
    for name, parameter in found.models["s"].named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-12)
    assert all(parameter.grad is None for parameter in found.models["t"].parameters())


def test_every_block_is_drawn_and_one_at_a_time():
    found = step()
    drawn = [chosen_of(found, replace(CLOCK, step=n)) for n in range(200)]
    assert {len(blocks) for blocks in drawn} == {1}
    counts = [sum(blocks == [n] for blocks in drawn) for n in range(2)]
    assert all(60 < count < 140 for count in counts)


def test_student_and_teacher_exchange_the_same_span_at_paired_blocks():
    found = step()
    changed = {f.model: f for f in found.distiller.plan.forwards if f.changes}
    at = {dict(f.values)[f"{change.slot}.at"] for f in changed.values() for change in f.changes}
    assert len(at) == 1
    assert [c.path.index for c in changed["s"].changes] == [1, 2]
    assert [c.path.index for c in changed["t"].changes] == [2, 4]


def test_an_alignment_at_one_block():
    found = step("first = 1, layers = 1")
    assert {tuple(chosen_of(found, replace(CLOCK, step=n))) for n in range(20)} == {(1,)}


def test_an_empty_span_leaves_the_base_term():
    found = step("share = 0.0")
    values = run(found, language_batch()).values
    assert torch.equal(values["m_diito/causal"], values["m_diito/soft"])


def test_a_text_exchanged_with_itself_is_as_it_was():
    """A batch of one: the next text is the text, and a span of its full length starts at 0 in both."""
    found = step("share = 1.0")
    values = run(found, language_batch((6,))).values
    close(values["m_diito/causal"], values["m_diito/soft"], "causal", rtol=1e-12)


@pytest.mark.parametrize("first", [0, 1])
def test_the_whole_residual_gives_the_other_text(first):
    """Texts of one length, exchanged whole behind a block: the term is that of the next text, and so of all."""
    found, batch = step(f"share = 1.0, first = {first}, layers = 1"), language_batch((5, 5, 5))
    values = run(found, batch).values
    close(values["m_diito/causal"], values["m_diito/soft"], "causal", rtol=1e-10)
    part = run(step(f"share = 0.5, first = {first}, layers = 1"), batch).values
    assert (part["m_diito/causal"] - part["m_diito/soft"]).abs() > 1e-3


def test_labels_are_of_the_base_text_alone():
    found, batch = step(), language_batch()
    before = run(found, batch).values
    batch["labels"] = torch.where(batch["labels"] >= 0, (batch["labels"] + 3) % 30 + 5, batch["labels"])
    after = run(found, batch).values
    assert not torch.equal(before["m_diito/mlm"], after["m_diito/mlm"])
    assert torch.equal(before["m_diito/causal"], after["m_diito/causal"])


def test_without_the_source_s_gradient_the_value_is_the_same():
    args = "mlm_weight = 0.0, soft_weight = 0.0, cos_weight = 0.0, detached_weight = 0.25"
    found, batch = step(args), language_batch()
    values = run(found, batch, replace(CLOCK, step=1)).values
    close(values["m_diito/causal"], values["m_diito/causal_detached"], "value")
    one = found.gradients(values["m_diito/causal"])
    two = found.gradients(values["m_diito/causal_detached"])
    assert any(a is not None and b is not None and not torch.allclose(a, b) for a, b in zip(one, two, strict=True))


def test_variants_of_weight_zero_cost_no_forward():
    keys = [f.key for f in step().distiller.plan.forwards]
    assert sorted(keys) == [
        "m_diito/s_changed/forward", "m_diito/s_source/forward", "m_diito/t_changed/forward",
        "m_diito/t_source/forward", "s/forward", "t/forward",
    ]  # fmt: skip
