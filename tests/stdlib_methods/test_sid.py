"""SID (arXiv 1910.03723): one more layer at a time, by a counter; then the soft labels."""

import pytest
import torch
import torch.nn.functional as F
from method_world import Pair, Step, agree, batch_of, both, made, plans, use

from gkd_dsl.runtime.counters import Counters
from gkd_dsl.schedules import Clock

PAIR = Pair((6, 24, 4), (3, 24, 4))
NAME = "m_sid"
LAYERS = range(3)


def oracle(students, teachers, _blocks, batch):
    """KL of attention maps by torch.distributions, rows of queries one by one, over texts without padding."""
    attn, cos = [0.0] * 3, [0.0] * 3
    soft = 0.0
    rows = sum(len(s.hidden[0]) for s in students) * 4
    for s, t in zip(students, teachers, strict=True):
        for i in LAYERS:
            j = 2 * i + 1
            ours = torch.distributions.Categorical(logits=s.scores(i))
            theirs = torch.distributions.Categorical(logits=t.scores(j))
            attn[i] = attn[i] + torch.distributions.kl_divergence(theirs, ours).sum()
            cos[i] = cos[i] + 1 - F.cosine_similarity(s.hidden[i + 1][0], t.hidden[j + 1][0], dim=0)
        soft = soft - (F.softmax(t.logits, -1) * F.log_softmax(s.logits, -1)).sum()
    found = {f"attn.{i}": attn[i] / rows for i in LAYERS} | {f"cos.{i}": cos[i] / len(students) for i in LAYERS}
    return found | {"soft": soft / len(students)}


def plan_of(args=""):
    return plans(PAIR.spec(*use("sid", args=args)))[f"{NAME}.task"]


def step_of(args="", seed=0):
    plan = plan_of(args)
    return Step(plan, made(plan, seed))


def weights_at(plan, k):
    clock = Clock(0, 100, 10.0, counters=((f"{NAME}/k", k),))
    return {
        loss.name.split("/")[1]: weight.value(clock) for loss, weight in zip(plan.losses, plan.weights, strict=True)
    }


def test_the_first_layer_alone_begins():
    step, batch = step_of(), batch_of((6, 4, 5))
    names = [*(f"attn.{i}" for i in LAYERS), *(f"cos.{i}" for i in LAYERS), "soft"]
    weights = {f"{NAME}/{name}": float(name.endswith(".0")) for name in names}
    agree(step, batch, oracle, weights)


@pytest.mark.parametrize(
    ("keep", "weights"),
    [
        ("1.0", [(1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (0, 0, 0, 1)]),
        ("0.0", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]),
        ("0.25", [(1, 0, 0, 0), (0.25, 1, 0, 0), (0.25, 0.25, 1, 0), (0, 0, 0, 1)]),
    ],
)
def test_what_is_learned_at_each_value_of_the_counter(keep, weights):
    plan = plan_of(f"keep = {keep}, attention_weight = 2.0, cosine_weight = 3.0")
    for k, (*layers, soft) in enumerate(weights, start=1):
        found = weights_at(plan, k)
        assert found["soft"] == soft
        assert [found[f"attn.{i}"] for i in LAYERS] == [2.0 * w for w in layers]
        assert [found[f"cos.{i}"] for i in LAYERS] == [3.0 * w for w in layers]


def walk(plan, script, total):
    """The counter in each step; `script(k, step)` is the sum of the distances in force."""
    counters, found = Counters(plan.counters), []
    for step in range(total):
        k = counters.values[f"{NAME}/k"]
        found.append(k)
        watched = dict.fromkeys(plan.counters[0].losses, 9.9)
        if k <= 3:
            watched[f"{NAME}/cos.0" if k == 1 else f"{NAME}/k.watched" + (f".{k - 2}" if k > 2 else "")] = script(
                k, step
            )
        counters.advance(watched, Clock(step + 1, total, 10.0))
    return found


def test_by_default_each_layer_and_the_soft_labels_have_equal_shares_of_the_stage():
    assert walk(plan_of(), lambda k, step: 0.0, 20) == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5


def test_the_counter_follows_scripted_distances():
    plan = plan_of("threshold = 0.5, window = 2 steps")
    script = {1: [1.0, 0.9, 0.2, 0.3], 2: [0.4, 0.4], 3: [0.9, 0.2, 0.6, 0.3, 0.1]}
    at = {k: iter(values) for k, values in script.items()}
    # Means of two: 0.95, 0.55, 0.25 -> 2. Then 0.4 of the new sum with what came before it.
    found = walk(plan, lambda k, step: next(at[k], 9.0), 1000)
    first, second = found.index(2), found.index(3)
    assert first == 4
    assert second - first <= 2
    assert found[-1] == 4


def test_the_threshold_reads_the_sum_over_the_layers_in_force():
    plan = plan_of("threshold = 0.5")
    monitored = {loss.name: loss for loss in plan.monitored}
    sums = [sorted(key for _, key in monitored[name].parts) for name in plan.counters[0].losses]
    cosines = [key for loss in plan.losses if "/cos." in loss.name for _, key in loss.parts]
    assert sums == [sorted(cosines[:k]) for k in (1, 2, 3)]


def test_scores_are_softmaxed_once():
    """The released code of a relative softmaxes what is a distribution already; the value here is not that."""
    step, batch = step_of(), batch_of((5, 5))
    terms, _ = both(step, batch, oracle)
    found = step(batch)[1][f"{NAME}/attn.0"]
    assert found.item() == pytest.approx(terms["attn.0"].item(), rel=1e-9)

    def twice(students, teachers, _blocks, _batch):
        total = 0.0
        for s, t in zip(students, teachers, strict=True):
            ours, theirs = (F.softmax(F.softmax(x, -1), -1) for x in (s.scores(0), t.scores(1)))
            total = total + (theirs * (theirs.log() - ours.log())).sum() / (2 * 5 * 4)
        return {"attn.0": total}

    double, _ = both(step, batch, twice)
    assert abs(double["attn.0"].item() - found.item()) > 0.01 * found.item()
