"""MiniLMv2 against its definition (arXiv 2012.15828), and what leaves it unchanged."""

import pytest
import torch
from method_cases import Case, stages_of
from method_world import Pair, Step, agree, attention_of, batch_of, close, made, plans, rotated, turn, use


@pytest.mark.parametrize(("case", "stage"), stages_of("minilmv2"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_rotation_within_relation_heads_changes_nothing(heads: int, name: str) -> None:
    plan = plans(Pair((3, 24, 2), (2, 16, 2)).spec(*use("minilmv2", args=f"heads = {heads}")))["m_minilmv2.pretrain"]
    step, batch = Step(plan, made(plan)), batch_of()
    before = step(batch)[1]
    linear = getattr(attention_of(step.models["t"]).self, name)
    width = linear.out_features // heads
    turn(linear, torch.block_diag(*(rotated(width, seed) for seed in range(heads))))
    after = step(batch)[1]
    for key, value in before.items():
        close(after[key], value, key)
    if heads > 1:
        turn(linear, rotated(linear.out_features, 8))
        key = f"m_minilmv2/{name[0]}"
        assert abs(step(batch)[1][key].item() - before[key].item()) > 1e-4


def test_head_counts_of_the_models_do_not_matter() -> None:
    """The same weights cut into other attention heads give other outputs, but layer 0 has the same q, k and v."""
    found = []
    for heads in (2, 4):
        args = "heads = 8, student_layer = 0, teacher_layer = 0"
        plan = plans(Pair((1, 16, heads), (1, 16, heads)).spec(*use("minilmv2", args=args)))["m_minilmv2.pretrain"]
        found.append(Step(plan, made(plan))(batch_of())[1])
    for name, value in found[0].items():
        close(found[1][name], value, name)
