"""TinyBERT against its definition (arXiv 1909.10351), its projections and its stages."""

import pytest
import torch
from method_cases import Case, of, stages_of
from method_world import Pair, agree, batch_of, close, plans, use


@pytest.mark.parametrize(("case", "stage"), stages_of("tinybert"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


def test_scores_are_the_authors_mse_on_rows_of_one_length() -> None:
    """Their code sets what the mask pushed down (<= -100) to 0; without padding nothing is."""
    case = of("tinybert")[0]
    step, batch = case.step(), batch_of((6, 6, 6))
    found = {}
    for name, layers in (("s", (0, 1)), ("t", (1, 3))):
        model, held = step.models[name], []
        placed = [
            linear.register_forward_hook(lambda _m, _i, out, held=held: held.append(out))
            for layer in layers
            for linear in (
                model.base_model.encoder.layer[layer].attention.self.query,
                model.base_model.encoder.layer[layer].attention.self.key,
            )
        ]
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in placed:
            handle.remove()
        split = [x.view(3, 6, 4, -1).transpose(1, 2) for x in held]
        found[name] = [
            q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 for q, k in zip(split[::2], split[1::2], strict=True)
        ]
    floor = [[torch.where(x <= -1e2, torch.zeros_like(x), x) for x in found[name]] for name in "st"]
    expected = sum(torch.nn.functional.mse_loss(a, b) for a, b in zip(*floor, strict=True))
    close(step(batch)[1]["m_tinybert/attn"], expected, "attn")


def test_one_projection_or_two() -> None:
    for args, names in (
        ("", ["m_tinybert/W"]),
        ("hidden_weight = 0.0, separate_weight = 1.0", ["m_tinybert/W_e", "m_tinybert/W_h"]),
    ):
        stages = plans(Pair().spec(*use("tinybert", args=args)))
        assert [block.name for block in stages["m_tinybert.intermediate"].projections] == names
        assert stages["m_tinybert.prediction"].projections == ()


def test_the_last_stage_reads_logits_alone() -> None:
    plan = plans(Pair().spec(*use("tinybert")))["m_tinybert.prediction"]
    assert [tap.key for forward in plan.forwards for tap in forward.taps] == ["s/logits", "t/logits"]
    assert "labels" not in plan.columns
