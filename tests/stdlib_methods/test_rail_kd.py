"""RAIL-KD (arXiv 2109.10164) against its definition: which layers meet, what is compared, what keeps it from collapse."""

import pytest
import torch
import torch.nn.functional as F
from method_world import CLOCK, Pair, Step, agree, batch_of, checked, close, made, plans, readings, row_kl, use, world

from gkd_dsl import aligners
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.evaluate import Evaluator
from gkd_dsl.runtime.session import run_spec
from gkd_dsl.schedules import Clock

DEEP = Pair((7, 24, 4), (4, 16, 4))
U = 5
ALL = f"u = {U}, concat_weight = 0.5, frozen_weight = 0.25, seed = 3, T = 2.0, floor = 0.9"
WEIGHTS = {
    "hard": 1 / 3, "soft": 1 / 3, "layers": 1 / 3, "concat": 0.5, "frozen": 0.25, "anchor": 1 / 3, "anchor_concat": 0.5,
}  # fmt: skip


def step_of(args=ALL, pair=DEEP, seed=0):
    found = checked(pair.spec(*use("rail_kd", args=args)))
    plan = compile_plan(found.graph).stages[0]
    return Step(plan, made(plan, seed))


def unit(x):
    return x / (x * x).sum().sqrt()


def held(teachers, by, pairs):
    """The unit vectors of the teacher's side, of all rows: those of each layer, and of the layers side by side."""
    pooled = [[t.hidden[j + 1].mean(0) for t in teachers] for _, j in pairs]
    found = {f"anchor.{k}": [unit(by("W_t", x)) for x in rows] for k, rows in enumerate(pooled)}
    summed = [sum(by(f"C_t.{k}", rows[row]) for k, rows in enumerate(pooled)) for row in range(len(teachers))]
    return found | {"anchor_concat": [unit(x) for x in summed]}


def oracle(epoch):
    pairs = aligners.random_sorted(4, 7, seed=3, epoch=epoch)

    def terms(students, teachers, blocks, batch):
        def by(name, x):
            block = blocks[f"m_rail_kd/{name}"]
            return block.weight @ x + block.bias

        found = dict.fromkeys(WEIGHTS, 0.0)
        rows = len(students)
        for s, t, label in zip(students, teachers, batch["labels"], strict=True):
            found["hard"] += -torch.log_softmax(s.logits, -1)[label] / rows
            found["soft"] += 4.0 * row_kl(t.logits / 2.0, s.logits / 2.0) / rows
            left = right = 0.0
            for i, j in pairs:
                x_s, x_t = s.hidden[i + 1].mean(0), t.hidden[j + 1].mean(0)
                y_s, y_t = by("W_s", x_s), by("W_t", x_t)
                found["layers"] += ((unit(y_s) - unit(y_t)) ** 2).sum() / rows
                fixed = by("F_t", x_t).detach()
                found["frozen"] += ((unit(by("F_s", x_s)) - unit(fixed)) ** 2).sum() / rows
                left, right = left + by(f"C_s.{i}", x_s), right + by(f"C_t.{i}", x_t)
            found["concat"] += ((unit(left) - unit(right)) ** 2).sum() / rows
        for name, units in held(teachers, by, pairs).items():
            for row in range(rows):
                spread = ((units[row] - units[row - 1]) ** 2).sum() / 2
                found[name.partition(".")[0]] += torch.clamp(0.9 - spread, min=0.0) / rows
        return found

    return terms


def test_every_term_and_gradient():
    agree(step_of(), batch_of(), oracle(0), {f"m_rail_kd/{name}": weight for name, weight in WEIGHTS.items()})


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_the_layers_that_meet_are_those_of_the_epoch(epoch):
    step, batch = step_of(), batch_of()
    out = step.distiller.module(batch, Clock(10 * epoch + 3, 100, 10.0), step.distiller.denominators([batch]))
    terms = oracle(epoch)(readings(step.models["s"], batch), readings(step.models["t"], batch), step.projections, batch)
    for name in ("layers", "concat", "anchor"):
        close(out.values[f"m_rail_kd/{name}"], terms[name], name)


def test_sets_are_sorted_distinct_without_the_last_and_change_by_epoch_alone():
    drawn = [aligners.random_sorted(4, 7, seed=3, epoch=epoch) for epoch in range(40)]
    for pairs in drawn:
        assert [i for i, _ in pairs] == [0, 1, 2], "the student's last layer is left to the logits"
        layers = [j for _, j in pairs]
        assert layers == sorted(set(layers))
        assert max(layers) < 6
        assert len(layers) == 3
    assert len({tuple(pairs) for pairs in drawn}) > 10
    assert {j for pairs in drawn for _, j in pairs} == set(range(6)), "every layer is drawn sooner or later"
    step, batch = step_of(), batch_of()
    counts = step.distiller.denominators([batch])
    values = [
        step.distiller.module(batch, Clock(n, 100, 10.0), counts).values["m_rail_kd/layers"].item() for n in range(20)
    ]
    assert len(set(values[:10])) == len(set(values[10:])) == 1
    assert values[0] != values[10]


def test_the_distance_of_unit_vectors_is_two_less_two_cosines():
    step, batch = step_of("u = 6, seed = 3"), batch_of()
    W_s, W_t = (step.projections[f"m_rail_kd/{name}"] for name in ("W_s", "W_t"))
    expected = 0.0
    for s, t in zip(readings(step.models["s"], batch), readings(step.models["t"], batch), strict=True):
        for i, j in aligners.random_sorted(4, 7, seed=3, epoch=0):
            expected += 2 - 2 * F.cosine_similarity(W_s(s.hidden[i + 1].mean(0)), W_t(t.hidden[j + 1].mean(0)), dim=0)
    close(step(batch)[1]["m_rail_kd/layers"], expected / 3, "2 - 2 cos")


def test_padding_is_not_pooled_and_batches_do_not_sum():
    """The origin averages over padding, and sums the squared distance over the batch."""
    step = step_of()
    one = step(batch_of())[1]["m_rail_kd/layers"]
    close(step(batch_of(pad=4))[1]["m_rail_kd/layers"], one, "padded")
    twice = {name: torch.cat([value, value]) for name, value in batch_of().items()}
    close(step(twice)[1]["m_rail_kd/layers"], one, "twice")


def test_thirds_by_default_and_no_more():
    plan = plans(DEEP.spec(*use("rail_kd")))["m_rail_kd.task"]
    step = Step(plan, made(plan))
    total, values = step(batch_of())
    assert {name.rpartition("/")[2] for name in values} == {"hard", "soft", "layers", "anchor"}
    close(total, sum(values.values()) / 3, "thirds")
    assert all(block.out_features == 128 for name, block in step.projections.items() if name.endswith(("W_s", "W_t")))


def test_one_map_a_side_or_one_a_place():
    names = {
        node.name.removeprefix("m_rail_kd/")
        for node in compile_plan(
            checked(DEEP.spec(*use("rail_kd", args="layer_weight = 0.0, concat_weight = 0.3"))).graph
        )
        .stages[0]
        .projections
    }
    assert names == {*(f"{side}.{k}" for side in ("C_s", "C_t") for k in range(3))}


def test_a_map_that_nothing_anchors_is_warned_of():
    for args, codes in (
        ("", []),
        ("anchor_weight = 0.0", ["W0704"]),
        ("layer_weight = 0.0, frozen_weight = 0.3", []),
        ("layer_weight = 0.0, concat_weight = 0.3, anchor_weight = 0.0", ["W0704"]),
    ):
        text = DEEP.spec(*use("rail_kd", args=args))
        assert [d.code for d in check_text(text, "x.gkd", root=world()).diagnostics] == codes, args


def test_a_frozen_map_is_not_trained():
    step = step_of("layer_weight = 0.0, frozen_weight = 1.0, u = 5")
    names = {name for name in step.names if name.startswith("project/")}
    assert names == {"project/m_rail_kd/F_s/weight", "project/m_rail_kd/F_s/bias"}


@pytest.mark.parametrize(("anchor", "alive"), [(0.0, False), (1.0, True)])
def test_the_distance_alone_collapses_and_the_anchor_keeps_it_alive(anchor, alive):
    """Both maps are trained by the term alone, from a start near a constant: only the anchor leaves it."""
    args = f"u = 6, hard_weight = 0.0, soft_weight = 0.0, layer_weight = 1.0, anchor_weight = {anchor}, seed = 3"
    text = DEEP.spec(*use("rail_kd", args=args))
    plan = compile_plan(check_text(text, "x.gkd", root=world()).graph).stages[0]
    step, batch = Step(plan, made(plan)), batch_of((7, 6, 5, 7, 6, 5), seed=4)
    for name in ("W_s", "W_t"):
        block = step.projections[f"m_rail_kd/{name}"]
        with torch.no_grad():
            block.weight.mul_(0.02)
            block.bias.fill_(1.0)
    blocks = [p for name, block in step.projections.items() for p in block.parameters()]
    optim = torch.optim.Adam(blocks, lr=3e-2)
    for _ in range(250):
        optim.zero_grad()
        step(batch)[0].backward()
        optim.step()
    assert (spread_of(step, batch) > 0.05) == alive


def spread_of(step, batch):
    """The mean square distance of all pairs of unit vectors, halved, by loops."""
    W = step.projections["m_rail_kd/W_t"]
    total = count = 0
    with torch.no_grad():
        for j in range(6):
            units = [unit(W(t.hidden[j + 1].mean(0))) for t in readings(step.models["t"], batch)]
            for a in range(len(units)):
                total += ((units[a] - units[a - 1]) ** 2).sum() / 2
                count += 1
    return float(total / count)


SPREAD = """stage watched for 4 steps {{
  minimize m_rail_kd
  evaluate m_rail_kd.{name} every 2 steps
  batch_size = 4
}}
"""


@pytest.mark.parametrize(
    ("name", "args"), [("spread", "u = 5"), ("spread_concat", "u = 5, layer_weight = 0.0, concat_weight = 0.5")]
)
def test_collapse_is_reported(tmp_path, name, args):
    root = world()
    (root / "rails.csv").write_text("text,label\n" + "".join(f"w{n % 30} w{n % 7} w{n},{n % 3}\n" for n in range(40)))
    text = DEEP.spec(*use("rail_kd", args=args, run=False), SPREAD.format(name=name)).replace("rows.csv", "rails.csv")
    outcome = run_spec(check_text(text, "x.gkd", root=root), name="x", out=tmp_path / "run", measure=False)
    value = outcome.metrics["watched"][f"m_rail_kd/{name}"]
    assert 0.0 < value < 1.5


def test_the_metric_is_half_the_square_distance_of_neighbours(tmp_path):
    plan = compile_plan(
        checked(DEEP.spec(*use("rail_kd", args="u = 5", run=False), SPREAD.format(name="spread"))).graph
    ).stages[0]
    step, batch = Step(plan, made(plan)), batch_of((7, 6, 5))
    found = Evaluator(plan, step.models, step.projections)(["m_rail_kd/spread"], [batch], LocalBackend(), CLOCK)
    assert found["m_rail_kd/spread"] == pytest.approx(spread_of(step, batch), rel=1e-4)
