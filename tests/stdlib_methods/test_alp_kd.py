"""ALP-KD against its definition (arXiv 2012.14022), with the cases where its attention cannot matter."""

import pytest
import torch
from method_world import Pair, Step, agree, batch_of, close, made, plans, row_kl, use, world

from gkd_dsl.meaning.check import check_text

EQUAL = Pair((4, 16, 4), (2, 16, 4))
WEIGHTS = {"hard": 0.1, "soft": 0.7, "attended": 0.2}


def lines(variant: str, args: str = "") -> list[str]:
    return [line.replace(f'"gkd:{variant}"', '"gkd:alp_kd"') for line in use(variant, args=args)]


def step_of(args: str = "", pair: Pair = EQUAL, variant: str = "alp_kd") -> Step:
    plan = plans(pair.spec(*lines(variant, args)))[f"m_{variant}.task"]
    return Step(plan, made(plan))


def named(weights, variant: str = "alp_kd"):
    return {f"m_{variant}/{name}": weight for name, weight in weights.items()}


def attended(query, layers, detached=False):
    """The mean over features of (query - sum_j a_j layer_j)^2, the weights by a loop."""
    for_weights = query.detach() if detached else query
    products = [sum(a * b for a, b in zip(for_weights, layer, strict=True)) for layer in layers]
    largest = max(float(p.detach()) for p in products)
    powers = [torch.exp(p - largest) for p in products]
    context = sum(p / sum(powers) * layer for p, layer in zip(powers, layers, strict=True))
    target = context.detach() if detached else context
    return ((query - target) ** 2).mean()


def oracle(T: float = 20.0, bucket=None, project: bool = False):
    """`bucket(i)`: the teacher's hidden states that layer i of the student attends to, 1 being the first block's."""

    def terms(students, teachers, blocks, batch):
        found = dict.fromkeys(("hard", "soft", "attended", "attended_detached", "attended_pooled"), 0.0)
        linear = {name.rpartition("/")[2]: block for name, block in blocks.items()}
        for s, t, label in zip(students, teachers, batch["labels"], strict=True):
            found["hard"] = found["hard"] - s.logits.log_softmax(-1)[label] / len(students)
            found["soft"] = found["soft"] + T * T * row_kl(t.logits / T, s.logits / T) / len(students)
            for i in range(1, len(s.hidden)):
                held = bucket(i) if bucket else range(1, len(t.hidden))
                first, layers = s.hidden[i][0], [t.hidden[j][0] for j in held]
                if project:
                    first = linear[f"W.{i - 1}"](first)
                pooled, means = s.hidden[i].mean(0), [t.hidden[j].mean(0) for j in held]
                for name, value in (
                    ("attended", attended(first, layers)),
                    ("attended_detached", attended(first, layers, detached=True)),
                    ("attended_pooled", attended(pooled, means) if not project else 0.0),
                ):
                    found[name] = found[name] + value / len(students)
        return found

    return terms


def test_terms_total_and_gradients() -> None:
    agree(step_of(), batch_of(), oracle(), named(WEIGHTS))
    args = "T = 3.0, lam = 0.0, detached_lam = 0.5, pooled_lam = 2.0"
    weights = {"hard": 0.1, "soft": 0.7, "attended_detached": 0.5, "attended_pooled": 2.0}
    agree(step_of(args), batch_of(), oracle(3.0), named(weights))


def test_buckets_and_projections() -> None:
    runs = {1: (1, 2), 2: (3, 4)}
    agree(step_of(variant="alp_kd_buckets"), batch_of(), oracle(bucket=runs.get), named(WEIGHTS, "alp_kd_buckets"))
    unequal = step_of(pair=Pair(), variant="alp_kd_projected")
    agree(unequal, batch_of(), oracle(project=True), named(WEIGHTS, "alp_kd_projected"))
    assert len(unequal.projections) == 2


def test_one_teacher_layer_is_the_squared_distance_from_it() -> None:
    step, batch = step_of(pair=Pair((1, 16, 4), (2, 16, 4))), batch_of()
    s, t = (
        step.models[name](batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        for name in "st"
    )
    wanted = sum((s.hidden_states[i][:, 0] - t.hidden_states[1][:, 0]).square().mean() for i in (1, 2))
    close(step(batch)[1]["m_alp_kd/attended"], wanted, "attended")


def test_the_weight_of_the_term_is_read() -> None:
    """GLMKD parses the weight of the term and never reads it."""
    batch = batch_of()
    plain, double = (step_of(f"lam = {lam}")(batch) for lam in (0.2, 0.4))
    close(double[0] - plain[0], 0.2 * plain[1]["m_alp_kd/attended"], "0.2 of the term")


def test_the_gradient_goes_through_the_weights_unless_detached() -> None:
    batch = batch_of()
    flows = []
    for args in ("", "lam = 0.0, detached_lam = 0.2"):
        step = step_of(args)
        _, values = step(batch)
        (name,) = (name for name in values if "attended" in name)
        flows.append((values[name], step.gradients(values[name])))
    close(flows[0][0], flows[1][0], "the value is the same")
    assert max((a - b).abs().max() for a, b in zip(flows[0][1], flows[1][1], strict=True) if a is not None) > 1e-4


def test_products_past_half_precision_stay_finite() -> None:
    step = step_of()
    with torch.no_grad():
        for model in step.models.values():
            for block in model.bert.encoder.layer:
                block.output.LayerNorm.weight.mul_(300.0)
    batch = batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values = step(batch)
    assert torch.isfinite(total)
    assert all(torch.isfinite(value) for value in values.values())
    assert all(torch.isfinite(g).all() for g in step.gradients(total) if g is not None)


@pytest.mark.parametrize(
    ("variant", "pair", "code"),
    [("alp_kd", Pair(), "E0301"), ("alp_kd_buckets", Pair((4, 16, 4), (3, 16, 4)), "E0210")],
)
def test_what_does_not_fit_is_refused(variant, pair, code) -> None:
    found = check_text(pair.spec(*lines(variant)), "spec.gkd", root=world())
    assert {d.code for d in found.diagnostics} == {code}
