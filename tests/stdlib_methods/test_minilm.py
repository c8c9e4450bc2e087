"""MiniLM against its definition (arXiv 2002.10957), and what leaves it unchanged."""

import pytest
import torch
from method_cases import Case, of, stages_of
from method_world import Pair, agree, attention_of, close, permute_heads, plans, rotated, turn, use


@pytest.mark.parametrize(("case", "stage"), stages_of("minilm"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


def test_heads_in_another_order_in_both_models_change_nothing() -> None:
    case = of("minilm")[0]
    step, batch = case.step(), case.batch()
    before = step(batch)[1]
    permute_heads(step.models["s"], [2, 0, 3, 1])
    alone = step(batch)[1]
    permute_heads(step.models["t"], [2, 0, 3, 1])
    after = step(batch)[1]
    for name, value in before.items():
        close(after[name], value, name)
        assert abs(alone[name].item() - value.item()) > 1e-4


@pytest.mark.parametrize("who", ["s", "t"])
def test_a_rotation_of_the_values_in_each_head_changes_nothing(who: str) -> None:
    case = of("minilm")[0]
    step, batch = case.step(), case.batch()
    before = step(batch)[1]["m_minilm/value"]
    linear = attention_of(step.models[who]).self.value
    width = linear.out_features // 4
    turn(linear, torch.block_diag(*(rotated(width, seed) for seed in range(4))))
    close(step(batch)[1]["m_minilm/value"], before, "value")
    turn(linear, rotated(linear.out_features, 9))
    assert abs(step(batch)[1]["m_minilm/value"].item() - before.item()) > 1e-4


def test_a_teacher_is_run_up_to_its_layer_only() -> None:
    plan = plans(Pair((6, 16, 4), (2, 16, 4)).spec(*use("minilm", args="teacher_layer = 2")))["m_minilm.pretrain"]
    forward = next(forward for forward in plan.forwards if forward.model == "t")
    assert forward.stop_after is not None
    assert forward.stop_after.index == 2
