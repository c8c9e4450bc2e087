"""MGSKD against its definition (ACL 2022): loops over texts, tokens, spans and triples."""

import pytest
import torch
from method_world import Pair, Step, agree, batch_of, close, made, plans, row_kl, use, world
from structure_oracles import angle_errors, mean, smooth

from gkd_dsl.meaning.check import check_text

LOWER, UPPER = [(0, 0), (1, 2)], [(2, 4)]  # hidden states: the embeddings and the uniform map of 2 from 4, by hand
ARGS = "heads = 8, anchors = 3, neighbours = 3"


def step_of(args: str = ARGS, stage: str = "structural", pair: Pair | None = None) -> Step:
    plan = plans((pair or Pair()).spec(*use("mgskd", args=args)))[f"m_mgskd.{stage}"]
    return Step(plan, made(plan))


def named(weights):
    return {f"m_mgskd/{name}": weight for name, weight in weights.items()}


def scores(x, heads):
    """[n, H] -> [heads, n, n], products over the root of a head's width."""
    d = x.shape[1] // heads
    cut = [x[:, h * d : h * d + d] for h in range(heads)]
    return torch.stack([c @ c.T / d**0.5 for c in cut])


def spans_of(x, share):
    """Means of near-equal runs of the rows of [n, H]."""
    n = len(x)
    m = min(n, max(1, int(n * share + 0.5)))
    runs = [[r for r in range(n) if r * m // n == k] for k in range(m)]
    return torch.stack([x[run].mean(0) for run in runs])


def structure(pairs, heads, anchors, neighbours):
    """Pairs and angles of texts ([n, H], [n, K]): the sum over all cells over their number, and means over texts."""
    squares, count, angles = 0.0, 0, []
    for s, t in pairs:
        maps = scores(t, heads).detach()
        squares = squares + ((scores(s, heads) - maps) ** 2).sum()
        count += maps.numel()
        weight = maps.softmax(-1).sum((0, 1))
        chosen = sorted(range(len(t)), key=lambda k: -float(weight[k]))[:anchors]
        errors, total = [], maps.sum(0)
        for i in chosen:
            others = sorted((k for k in range(len(t)) if k != i), key=lambda k: -float(total[i, k]))[:neighbours]
            errors += angle_errors(s, t, i, others, smooth)
        angles.append(mean(errors))
    return squares / count + sum(angles) / len(angles)


def samples(students, teachers, heads):
    """Pooled texts [H] and [K]: the mean over vertices of the mean over heads and pairs of others."""
    found = []
    for i in range(len(students)):
        for h in range(heads):
            s, t = (torch.stack([x.reshape(heads, -1)[h] for x in side]) for side in (students, teachers))
            others = [k for k in range(len(students)) if k != i]
            found.append(mean(angle_errors(s, t, i, others, smooth)))
    return sum(found) / len(found)


def oracle(heads=8, anchors=3, neighbours=3, share=0.4, lower=LOWER, upper=UPPER):
    def terms(students, teachers, blocks, batch):
        texts = list(zip(students, teachers, strict=True))
        found = {"token": 0.0, "span": 0.0, "sample": 0.0}
        for i, j in lower:
            states = [(s.hidden[i], t.hidden[j]) for s, t in texts]
            found["token"] = found["token"] + structure(states, heads, anchors, neighbours)
            means = [(spans_of(s, share), spans_of(t, share)) for s, t in states]
            found["span"] = found["span"] + structure(means, heads, anchors, neighbours)
        for i, j in upper:
            pooled = ([r.hidden[k].mean(0) for r in rs] for rs, k in ((students, i), (teachers, j)))
            found["sample"] = found["sample"] + samples(*pooled, heads)
        return found

    return terms


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (ARGS, {}),
        ("heads = 4, anchors = 2, neighbours = 20, share = 0.75, lower = 1",
         {"heads": 4, "anchors": 2, "neighbours": 20, "share": 0.75, "lower": [(0, 0)], "upper": [(1, 2), (2, 4)]}),
    ],
)  # fmt: skip
def test_terms_total_and_gradients(args, options) -> None:
    agree(
        step_of(args),
        batch_of(lengths=(7, 5, 3, 6)),
        oracle(**options),
        named({"token": 1.0, "span": 1.0, "sample": 4.0}),
    )


def test_then_the_soft_labels() -> None:
    def soft(students, teachers, blocks, batch):
        rows = [row_kl(t.logits, s.logits) for s, t in zip(students, teachers, strict=True)]
        return {"soft": sum(rows) / len(rows)}

    agree(step_of(stage="prediction"), batch_of(), soft, named({"soft": 1.0}))


def test_spans_of_one_token_are_the_tokens_however_they_are_cut() -> None:
    step = step_of(f"{ARGS}, share = 1.0, drawn_span_weight = 1.0")
    _, values = step(batch_of())
    for name in ("span", "drawn_span"):
        close(values[f"m_mgskd/{name}"], values["m_mgskd/token"], name)


def test_drawn_spans_are_drawn_by_the_step() -> None:
    step, batch = step_of(f"{ARGS}, drawn_span_weight = 1.0"), batch_of()
    found = []
    for at in (0, 1, 0):
        step.distiller.step_to(at, 10)
        counts = step.distiller.denominators([batch])
        found.append(step.distiller.module(batch, step.distiller._clock, counts).values["m_mgskd/drawn_span"].item())
    assert found[0] == found[2] != found[1]


def test_fewer_than_three_texts_have_no_sample_term() -> None:
    step = step_of()
    for lengths in ((4,), (4, 3)):
        total, values = step(batch_of(lengths=lengths))
        assert values["m_mgskd/sample"].item() == 0
        assert all(torch.isfinite(g).all() for g in step.gradients(total) if g is not None)


def test_short_texts_are_finite() -> None:
    step = step_of("heads = 8")
    total, values = step(batch_of(lengths=(1, 2, 3)))
    assert all(torch.isfinite(value) for value in values.values())
    assert all(torch.isfinite(g).all() for g in step.gradients(total) if g is not None)


def test_the_sample_term_leaves_the_states_to_the_others() -> None:
    """The authors zero the student's padded states in place, which the terms after it then read."""
    batch = batch_of()
    together = step_of()(batch)[1]
    for name in ("token", "span", "sample"):
        weights = {f"{other}_weight": float(other == name) for other in ("token", "span", "sample")}
        alone = step_of(f"{ARGS}, " + ", ".join(f"{key} = {value}" for key, value in weights.items()))(batch)
        close(alone[0], together[f"m_mgskd/{name}"], name)


def test_a_sample_angle_does_not_see_scale_reflection_and_place() -> None:
    """The teacher's last states times -2 and moved by 3: all angles between them stay."""
    step, batch = step_of("heads = 1, token_weight = 0.0, span_weight = 0.0"), batch_of()
    before = step(batch)[1]["m_mgskd/sample"]
    norm = step.models["t"].bert.encoder.layer[3].output.LayerNorm
    with torch.no_grad():
        norm.weight.mul_(-2.0)
        norm.bias.mul_(-2.0).add_(3.0)
    close(step(batch)[1]["m_mgskd/sample"], before, "sample")
    with torch.no_grad():
        norm.weight[:4].mul_(5.0)
    assert abs(step(batch)[1]["m_mgskd/sample"].item() - before.item()) > 1e-6


def test_heads_divide_both_widths() -> None:
    found = check_text(Pair().spec(*use("mgskd")), "spec.gkd", root=world())
    assert [(d.code, d.message) for d in found.diagnostics] == [
        ("E0309", "s.H = 16 is not divisible by heads = 64"),
        ("E0309", "t.H = 24 is not divisible by heads = 64"),
    ]
