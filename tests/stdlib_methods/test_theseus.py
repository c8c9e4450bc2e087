"""BERT-of-Theseus against models whose blocks are put together by hand (arXiv 2002.02925)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_world import CLOCK, Pair, Step, batch_of, made, plans, use, world

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.meaning.check import check_text

PAIR = Pair(teacher=(4, 16, 4), student=(2, 16, 4))
LEARNS = "m_theseus.replacing"


def step(args="", stage=LEARNS, pair=PAIR, alike=True, **options):
    """A stage over a student that has its teacher's embeddings, pooler and head."""
    plan = plans(pair.spec(*use("theseus", args=args)))[stage]
    models = made(plan, **options)
    if alike and "t" in models:
        own = {n: v for n, v in models["t"].state_dict().items() if ".layer." not in n}
        models["s"].load_state_dict({**models["s"].state_dict(), **own})
    return Step(plan, models)


def loss_at(step, batch, clock=CLOCK):
    module = step.distiller.module
    return module(batch, clock, module.denominators([batch], clock)).loss


def plain(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"])


def changes(step):
    return next(forward.changes for forward in step.distiller.plan.forwards if forward.key.endswith("mixed/forward"))


def drawn(step, clock):
    """For each block of the student, whether the teacher's group stands in at a step."""
    found = dict.fromkeys(range(2), False)
    for change in changes(step):
        found[change.index] = change.when.value(clock) != 0.0
    return list(found.values())


def spliced(step, clock):
    """A model of transformers whose list of blocks is that of the step."""
    model, teacher = copy.deepcopy(step.models["s"]), copy.deepcopy(step.models["t"]).requires_grad_(False)
    blocks, theirs = [], teacher.base_model.encoder.layer
    for index, borrowed in enumerate(drawn(step, clock)):
        blocks += list(theirs[2 * index : 2 * index + 2]) if borrowed else [model.base_model.encoder.layer[index]]
    model.base_model.encoder.layer = torch.nn.ModuleList(blocks)
    return model


def test_at_rate_one_the_student_is_plain_to_the_bit():
    found, batch = step("rate = 1.0"), batch_of()
    assert changes(found) == ()
    assert torch.equal(loss_at(found, batch), plain(found.models["s"], batch))


def test_at_rate_zero_the_student_is_its_teacher():
    found, batch = step("rate = 0.0, end = 0.0"), batch_of()
    assert [(change.index, change.layers) for change in changes(found)] == [(0, (0, 1)), (1, (2, 3))]
    assert torch.equal(loss_at(found, batch), plain(found.models["t"], batch))


@pytest.mark.parametrize("number", range(8))
def test_value_and_gradients_at_a_draw(number):
    found, batch = step("rate = 0.5, end = 0.5"), batch_of()
    clock = replace(CLOCK, step=number, seed=3)
    loss, hand = loss_at(found, batch, clock), spliced(found, clock)
    expected = plain(hand, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    if all(drawn(found, clock)):
        assert not loss.requires_grad
        return
    loss.backward()
    expected.backward()
    # The student's blocks that are there, in their order, by hand and in the step.
    own = [index for index, borrowed in enumerate(drawn(found, clock)) if not borrowed]
    theirs = [block for block in hand.base_model.encoder.layer if any(p.requires_grad for p in block.parameters())]
    assert len(theirs) == len(own)
    for index, block in zip(own, theirs, strict=True):
        for ours, hands in zip(
            found.models["s"].base_model.encoder.layer[index].parameters(), block.parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, hands.grad, rtol=1e-8, atol=1e-12)


def test_both_mixtures_and_both_pure_draws_occur():
    found = step("rate = 0.5, end = 0.5")
    assert {tuple(drawn(found, replace(CLOCK, step=n, seed=3))) for n in range(8)} == {
        (False, False), (False, True), (True, False), (True, True),
    }  # fmt: skip


def test_only_blocks_of_the_student_train():
    found, batch = step("rate = 0.5, end = 0.5"), batch_of()
    number = next(n for n in range(50) if drawn(found, replace(CLOCK, step=n)) == [False, True])
    loss_at(found, batch, replace(CLOCK, step=number)).backward()
    trained = {name for name, p in found.models["s"].named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in found.models["s"].named_parameters() if "encoder.layer.0." in name}
    assert all(p.grad is None for p in found.models["t"].parameters())
    assert all(".layer." in name for name in found.names)


def test_the_share_of_student_blocks_is_the_rate_and_no_draw_is_repeated():
    """A retry that asks for one student block at least would raise the share, and never borrow all."""
    found = step("rate = 0.3, end = 0.3")
    rows = torch.tensor([drawn(found, replace(CLOCK, step=n)) for n in range(4000)], dtype=torch.float64)
    own = 1.0 - rows
    deviation = (0.3 * 0.7 / 4000) ** 0.5
    assert (own.mean(0) - 0.3).abs().max() < 5 * deviation
    everything = rows.prod(1).mean()
    assert abs(everything - 0.49) < 5 * (0.49 * 0.51 / 4000) ** 0.5


def test_a_draw_holds_for_all_micro_batches_of_a_step():
    found = step("rate = 0.5, end = 0.5")
    for number in range(20):
        clocks = [replace(CLOCK, step=number, micro=micro) for micro in range(3)]
        assert len({tuple(drawn(found, clock)) for clock in clocks}) == 1


def test_a_step_that_borrows_every_block_trains_nothing_and_goes_on():
    found, batch = step("rate = 0.0, end = 0.0"), batch_of()
    loss = loss_at(found, batch)
    assert torch.isfinite(loss)
    assert not loss.requires_grad


def test_borrowed_blocks_draw_no_dropout():
    found = step("rate = 0.0, end = 0.0", pair=replace(PAIR, dropout=0.5))
    seen = []
    for module in found.models["t"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, _args, _out: seen.append(module.training))
    loss_at(found, batch_of())
    assert seen
    assert not any(seen)


def test_the_rate_rises_over_the_first_stage():
    found = step("rate = 0.3, until = 50%")
    rates = [changes(found)[0].when.of.p.value(replace(CLOCK, step=n, total_steps=21)) for n in (0, 5, 10, 20)]
    assert rates == pytest.approx([0.3, 0.65, 1.0, 1.0])
    constant = step("rate = 0.5, end = 0.5")
    assert {changes(constant)[0].when.of.p.value(replace(CLOCK, step=n)) for n in range(10)} == {0.5}


def test_the_second_stage_is_plain():
    found, batch = step(stage="m_theseus.finetuning"), batch_of()
    assert not any(
        isinstance(change, ReplaceBlock) for forward in found.distiller.plan.forwards for change in forward.changes
    )
    assert list(found.models) == ["s"]
    assert torch.equal(loss_at(found, batch), plain(found.models["s"], batch))


@pytest.mark.parametrize(
    ("pair", "lines", "code"),
    [
        (Pair(teacher=(4, 24, 4), student=(2, 16, 4)), (), "E0270"),
        (Pair(teacher=(4, 16, 4), student=(2, 16, 2)), (), "E0270"),
        (Pair(teacher=(3, 16, 4), student=(2, 16, 4)), (), "E0237"),
        (PAIR, ('import "gkd:minilm" use minilm', "use minilm(t -> m_theseus.mixed) as x"), "E0271"),
    ],
)
def test_what_it_is_refused_for(pair, lines, code):
    text = pair.spec(*use("theseus"), *lines)
    assert [d.code for d in check_text(text, "spec.gkd", root=world()).diagnostics.errors] == [code]


def test_the_ends_of_a_replaced_block_can_be_taught():
    """Another method over the mixed pass, by what comes out of its blocks."""
    lines = ('import "gkd:pkd" use pkd', "use pkd(t -> m_theseus.mixed) as x",
             "stage both for 1 epochs { minimize x.total + m_theseus.hard }")  # fmt: skip
    plan = plans(PAIR.spec(*use("theseus", args="rate = 0.5, end = 0.5"), *lines))["both"]
    assert [f.key for f in plan.forwards if f.model == "s"] == ["m_theseus/mixed/forward"]
    found = Step(plan, made(plan))
    loss = loss_at(found, batch_of())
    assert torch.isfinite(loss)
