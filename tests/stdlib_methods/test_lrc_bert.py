"""LRC-BERT against two passes made by hand (arXiv 2012.07335)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_world import CLOCK, Pair, Step, batch_of, close, made, plans, use

from gkd_dsl.runtime.ops.contrast import contrastive

T = 1.1
GROUPS = ((0, 1), (1, 3))


def step(args="", stage="task", **options):
    plan = plans(Pair(**options).spec(*use("lrc_bert", args=args)))[f"m_lrc_bert.{stage}"]
    return Step(plan, made(plan))


def run(found, batch, clock=CLOCK):
    module = found.distiller.module
    return module(batch, clock, module.denominators([batch], clock))


def far(one, other):
    return 1 - F.cosine_similarity(one, other, dim=0)


def contrast(student, teacher, mask):
    """COS-NCE by loops: one value for each token."""
    values = []
    rows, length = mask.shape
    for position in range(length):
        there = [row for row in range(rows) if mask[row, position]]
        for a in there:
            value = far(student[a, position], teacher[a, position])
            others = [b for b in there if b != a]
            if others:
                value = value + sum((2 - far(student[a, position], teacher[b, position])) / 2 for b in others) / len(
                    others
                )
            values.append(value)
    return torch.stack(values).mean()


class ByHand:
    """Copies of a step's models, the projection, and a student whose embeddings can be moved."""

    def __init__(self, found, batch):
        self.batch, self.mask = batch, batch["attention_mask"]
        self.student = copy.deepcopy(found.models["s"])
        self.teacher = copy.deepcopy(found.models["t"]).requires_grad_(False).eval()
        self.block = copy.deepcopy(found.projections["m_lrc_bert/W"])
        with torch.no_grad():
            self.taught = self._run(self.teacher)

    def _run(self, model, moved=None):
        seen = []

        def embedded(_module, _args, out):
            seen.append(out if moved is None else out + moved)
            return seen[0]

        handle = model.base_model.embeddings.register_forward_hook(embedded)
        out = model(self.batch["input_ids"], attention_mask=self.mask, output_hidden_states=True)
        handle.remove()
        return seen[0], out.hidden_states, out.logits

    def terms(self, moved=None):
        at, states, logits = self._run(self.student, moved)
        near = sum(contrast(self.block(states[i + 1]), self.taught[1][j + 1], self.mask) for i, j in GROUPS)
        taught = F.log_softmax(self.taught[2] / T, -1)
        soft = T * T * F.kl_div(F.log_softmax(logits / T, -1), taught, reduction="batchmean", log_target=True)
        return at, {"contrast": near, "soft": soft, "hard": F.cross_entropy(logits, self.batch["labels"])}

    def gradient(self, weights):
        at, terms = self.terms()
        (found,) = torch.autograd.grad(sum(weights[name] * terms[name] for name in weights), at)
        return found


@pytest.mark.parametrize(
    ("stage", "weights"), [("contrastive", {"contrast": 1.0}), ("task", {"contrast": 1.0, "soft": 1.0, "hard": 3.0})]
)
def test_terms_and_gradients_are_those_of_the_second_pass_alone(stage, weights):
    found, batch = step(stage=stage), batch_of()
    hand = ByHand(found, batch)
    gradient = hand.gradient(weights)
    moved = torch.zeros_like(gradient)
    for row in range(gradient.shape[0]):
        for position in range(gradient.shape[1]):
            if batch["attention_mask"][row, position]:
                moved[row, position] = gradient[row, position] / gradient[row, position].norm()
    _, terms = hand.terms(moved)
    out = run(found, batch)
    assert all(parameter.grad is None for parameter in found.parameters)
    for name in weights:
        ours = "contrast_alone" if stage == "contrastive" else name
        close(out.values[f"m_lrc_bert/{ours}"], terms[name], name)
    expected = sum(weights[name] * terms[name] for name in weights)
    close(out.loss, expected, "total")
    out.loss.backward()
    expected.backward()
    for ours, theirs in ((found.models["s"], hand.student), (found.projections["m_lrc_bert/W"], hand.block)):
        for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if two.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-11, msg=name)
    assert all(parameter.grad is None for parameter in found.models["t"].parameters())


def embeddings(found, batch):
    """What the student's first block is given in each pass of a step."""
    seen = []
    block = found.models["s"].base_model.encoder.layer[0]
    handle = block.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    run(found, batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("radius", [1.0, 0.25])
def test_each_token_is_moved_by_the_radius_and_padding_not_at_all(radius):
    found, batch = step(f"radius = {radius}"), batch_of()
    probe, moved = embeddings(found, batch)
    lengths = (moved - probe).norm(dim=-1)
    torch.testing.assert_close(lengths, radius * batch["attention_mask"].to(lengths.dtype), rtol=1e-9, atol=1e-12)


def test_the_step_is_uphill():
    """Adversarial: along the gradient, so that a small step raises the objective."""
    batch = batch_of()
    small, none = step("radius = 0.001"), step("radius = 0.0")
    assert run(small, batch).loss > run(none, batch).loss


def test_a_radius_of_zero_is_the_plain_objective():
    found, batch = step("radius = 0.0"), batch_of()
    _, terms = ByHand(found, batch).terms()
    close(run(found, batch).loss, terms["contrast"] + terms["soft"] + 3 * terms["hard"], "total")


def test_accumulation_gives_the_gradient_of_the_whole_step():
    """The probe's gradient is thrown away in each micro-batch, and never added to a parameter's."""
    found = step("contrastive_weight = 0.0")
    batch = batch_of((7, 7, 7, 7))
    whole = run(found, batch).loss
    module = found.distiller.module
    halves = [{k: v[cut] for k, v in batch.items()} for cut in (slice(0, 2), slice(2, 4))]
    counts = module.denominators(halves, CLOCK)
    parts = [module(half, replace(CLOCK, micro=n), counts).loss for n, half in enumerate(halves)]
    # Without the contrast of samples, a direction is that of its own sample: the same in halves.
    close(sum(parts), whole, "total")


def test_extremes_stay_finite():
    found, batch = step(), batch_of()
    with torch.no_grad():
        found.models["s"].classifier.weight.mul_(1e150)
    probe, moved = embeddings(found, batch)
    assert torch.isfinite(moved - probe).all()


def test_the_first_pass_leaves_nothing_behind():
    found, batch = step(), batch_of()
    out = run(found, batch)
    assert found.distiller.module.gradients.sums == {}
    one = [g for g in torch.autograd.grad(out.loss, found.parameters, allow_unused=True) if g is not None]
    assert one


def test_the_side_of_the_negatives_makes_no_difference():
    """The paper leaves it open; the sum over all pairs of samples is the same, and so is its gradient."""
    mask = batch_of((6, 4, 3, 1))["attention_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*mask.shape, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    found = []
    for side in ("teacher", "student"):
        total = contrastive(student, teacher, negatives=side, valid=mask)[mask].sum()
        found.append((total.detach(), torch.autograd.grad(total, student)[0]))
    torch.testing.assert_close(found[0], found[1])
