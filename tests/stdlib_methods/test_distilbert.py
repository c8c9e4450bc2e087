"""DistilBERT against its definition (arXiv 1910.01108)."""

import pytest
import torch
from method_cases import Case, of, stages_of
from method_world import agree


@pytest.mark.parametrize(("case", "stage"), stages_of("distilbert"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


def test_orthogonal_states_are_at_distance_one() -> None:
    case = of("distilbert")[0]
    step = case.step()
    with torch.no_grad():
        for name, ones in (("s", slice(0, 8)), ("t", slice(8, 16))):
            norm = step.models[name].base_model.encoder.layer[-1].output.LayerNorm
            norm.weight.zero_()
            norm.bias.zero_()
            norm.bias[ones] = 1.0
    assert step(case.batch())[1]["m_distilbert/cos"].item() == pytest.approx(1.0, abs=1e-12)


def test_the_two_readings_of_the_soft_labels_meet_where_every_token_is_predicted() -> None:
    first, second = (case.step() for case in of("distilbert"))
    batch = of("distilbert")[0].batch()
    batch["labels"] = torch.where(batch["attention_mask"].bool(), torch.full_like(batch["labels"], 6), -100)
    one = first(batch)[1]["m_distilbert/soft"].item()
    assert second(batch)[1]["m_distilbert/soft_all"].item() == pytest.approx(one, rel=1e-12)


def test_a_batch_without_a_token_to_predict_gives_zero_and_no_nan() -> None:
    case = of("distilbert")[0]
    step, batch = case.step(), case.batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    total, values = step(batch)
    assert (values["m_distilbert/soft"].item(), values["m_distilbert/mlm"].item()) == (0.0, 0.0)
    assert all(g is None or torch.isfinite(g).all() for g in step.gradients(total))
