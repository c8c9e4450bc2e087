"""TMKD (arXiv 1910.08381): a head for each teacher whose mean is the student's own; one teacher is plain MSE."""

import copy

import pytest
import torch
import torch.nn.functional as F
from method_world import close, plans
from several import batch, logits, step_of, text

ARGS = "alpha = 0.3, one_head_weight = 0.5"


def with_random_heads(step, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in step.projections.values():
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return step


def heads(step, rows):
    """The student's heads, one after the other, from a copy of it."""
    model = copy.deepcopy(step.models["s"])
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    first = model.base_model(**inputs).last_hidden_state[:, 0]
    own, apart = model(**inputs).logits, [block(first) for block in step.projections.values()]
    return own, [own + part - sum(apart) / len(apart) for part in apart]


@pytest.mark.parametrize("teachers", [((3, 24), (4, 16)), ((3, 24), (4, 16), (2, 20))])
def test_the_terms(teachers):
    step, rows = with_random_heads(step_of(text("tmkd", args=ARGS, teachers=teachers), "m.task")), batch()
    total, values = step(rows)
    found, (own, each) = logits(step, rows), heads(step, rows)
    names = "abc"[: len(teachers)]
    assert len(each) == len(names)
    soft = sum(((head - found[n]) ** 2).mean() for n, head in zip(names, each, strict=True)) / len(names)
    close(values["m/soft"], soft, "soft")
    one = sum(((own - found[n]) ** 2).mean() for n in names) / len(names)
    close(values["m/one_head"], one, "one_head")
    hard = F.cross_entropy(own, rows["labels"])
    close(values["m/hard"], hard, "hard")
    close(total, 0.7 * hard + 0.3 * (soft + 0.5 * one), "total")


def test_the_exported_head_is_the_mean_that_the_paper_answers_with():
    step, rows = with_random_heads(step_of(text("tmkd", teachers=((3, 24), (4, 16), (2, 20))), "m.task")), batch()
    own, each = heads(step, rows)
    torch.testing.assert_close(sum(each) / 3, own, rtol=1e-12, atol=1e-12)
    assert (each[0] - own).abs().max() > 0.1


def test_one_teacher_is_mse_of_the_scores():
    step, rows = with_random_heads(step_of(text("tmkd", teachers=((3, 24),)), "m.pretrain")), batch()
    _, values = step(rows)
    found = logits(step, rows)
    close(values["m/soft"], F.mse_loss(found["s"], found["a"]), "soft")
    gradients = dict(zip(step.names, step.gradients(values["m/soft"]), strict=True))
    assert all(g.abs().max() == 0 for name, g in gradients.items() if name.startswith("project"))
    assert gradients["s/classifier.weight"].abs().max() > 0


def test_the_heads_start_as_one_and_part():
    step, rows = step_of(text("tmkd", args="one_head_weight = 1.0"), "m.pretrain"), batch()
    _, values = step(rows)
    close(values["m/soft"], values["m/one_head"], "soft")
    gradients = dict(zip(step.names, step.gradients(values["m/soft"]), strict=True))
    apart = [gradients[f"project/m/D.{k}/weight"] for k in range(2)]
    torch.testing.assert_close(apart[0], -apart[1], rtol=1e-9, atol=1e-12)
    assert apart[0].abs().max() > 1e-4


def test_heads_apart_reach_what_one_head_cannot():
    """Two teachers that disagree: with one head the loss stays above the half of their gap, with two it does not."""
    step, rows = step_of(text("tmkd", args="one_head_weight = 1.0", teachers=((3, 24), (4, 16))), "m.pretrain"), batch()
    found = logits(step, rows)
    least = ((found["a"] - found["b"]) ** 2).mean() / 4
    optimizer = torch.optim.Adam(step.parameters, lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        _, values = step(rows)
        values["m/soft"].backward()
        optimizer.step()
    _, values = step(rows)
    assert values["m/soft"] < 0.2 * least
    assert values["m/one_head"] >= least * (1 - 1e-9)


def test_the_order_of_the_teachers_does_not_matter():
    step, rows = with_random_heads(step_of(text("tmkd"), "m.task")), batch()
    other = step_of(text("tmkd", order="ba"), "m.task", step.models)
    for k in range(2):
        other.projections[f"m/D.{k}"].load_state_dict(step.projections[f"m/D.{1 - k}"].state_dict())
    close(other(rows)[0], step(rows)[0], "total")


def test_the_first_stage_reads_no_labels():
    found = plans(text("tmkd"))
    assert "labels" not in found["m.pretrain"].columns
    assert "labels" in found["m.task"].columns


def test_the_first_stage_on_texts_without_labels():
    body = (
        'data corpus = text("lines.txt")',
        "stage corpus_stage for 2 steps {\n  source = corpus\n  minimize m.soft\n}",
        "stage task for 2 steps {\n  source = rows\n  minimize m\n}",
    )
    found = plans(text("tmkd", *body))
    assert found["corpus_stage"].stage.source.name == "corpus"
    step, rows = step_of(text("tmkd", *body), "corpus_stage"), batch()
    del rows["labels"]
    assert torch.isfinite(step(rows)[0])
