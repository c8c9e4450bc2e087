"""Patient KD against its definition (arXiv 1908.09355), and what leaves it unchanged."""

import pytest
import torch
from method_cases import Case, of, stages_of
from method_world import agree, close


@pytest.mark.parametrize(("case", "stage"), stages_of("pkd"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


@pytest.mark.parametrize("scale", [0.1, 7.0])
@pytest.mark.parametrize(("who", "layer"), [("s", 0), ("t", 1)])
def test_the_length_of_a_state_does_not_matter(who: str, layer: int, scale: float) -> None:
    case = of("pkd")[0]
    step, batch = case.step(), case.batch()
    before = step(batch)[1]["m_pkd/patient"]
    norm = step.models[who].base_model.encoder.layer[layer].output.LayerNorm
    with torch.no_grad():
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
    after = step(batch)[1]
    close(after["m_pkd/patient"], before, "patient")
    with torch.no_grad():
        norm.bias.add_(torch.linspace(-1, 1, len(norm.bias), dtype=norm.bias.dtype))
    assert abs(step(batch)[1]["m_pkd/patient"].item() - before.item()) > 1e-4


def test_it_is_two_minus_twice_the_cosine_over_the_width() -> None:
    case = of("pkd")[0]
    step, batch = case.step(), case.batch()
    s, t = (
        step.models[name](batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        for name in "st"
    )
    cosine = torch.cosine_similarity(s.hidden_states[1][:, 0], t.hidden_states[2][:, 0])
    close(step(batch)[1]["m_pkd/patient"], ((2 - 2 * cosine) / 16).mean(), "patient")
