"""CKD against its definition (arXiv 2109.08359), and what leaves it unchanged."""

import pytest
import torch
from method_world import Pair, Step, agree, batch_of, close, made, plans, row_kl, use, world
from structure_oracles import angle_errors, mean, relation_rows

from gkd_dsl.meaning.check import check_text

STATES = [(0, 0), (1, 2), (2, 4)]  # embeddings and the uniform map of 2 from 4, by hand
TERMS = {"soft": 1.0, "tokens": 1.0, "layers": 1.0, "token_angles": 10.0, "layer_angles": 10.0}


def step_of(args: str = "", pair: Pair | None = None) -> Step:
    plan = plans((pair or Pair()).spec(*use("ckd", args=args)))["m_ckd.task"]
    return Step(plan, made(plan))


def oracle(T: float = 3.0, window: int = 21, denominator: str = "rows", angle_denominator: str = "pairs"):
    def square(d):
        return d * d

    def token_angles(s, t):
        found = []
        for j in range(len(s)):
            ends = [a for a in range(len(s)) if a != j and abs(a - j) <= window // 2]
            errors = angle_errors(s, t, j, ends, square)
            found.append(
                sum(errors, 0.0 * s.sum()) / (window**2 if angle_denominator == "window" else max(1, len(errors)))
            )
        return found

    def over_batch(rows_of, pairs_of):
        """The sum over all rows of the batch over their number, or that of the pairs."""
        rows = [rows_of(*both) for both in pairs_of]
        count = sum(len(r) for r in rows) if denominator == "rows" else sum(len(r) ** 2 for r in rows)
        return sum(sum(r) for r in rows) / count

    def terms(students, teachers, blocks, batch):
        texts = list(zip(students, teachers, strict=True))
        found = dict.fromkeys(TERMS, 0.0) | {"hard": 0.0}
        for s, t, label in zip(students, teachers, batch["labels"], strict=True):
            found["soft"] = found["soft"] + T * T * row_kl(t.logits / T, s.logits / T) / len(texts)
            found["hard"] = found["hard"] - s.logits.log_softmax(-1)[label] / len(texts)
        for i, j in STATES:
            states = [(s.hidden[i], t.hidden[j]) for s, t in texts]
            found["tokens"] = found["tokens"] + over_batch(relation_rows, states)
            found["token_angles"] = found["token_angles"] + mean([v for both in states for v in token_angles(*both)])
        places = []
        for s, t in texts:
            for place in range(len(s.hidden[0])):
                places.append((
                    torch.stack([s.hidden[i][place] for i, _ in STATES]),
                    torch.stack([t.hidden[j][place] for _, j in STATES]),
                ))  # fmt: skip
        found["layers"] = over_batch(relation_rows, places)
        found["layer_angles"] = mean(
            [
                mean([v for j in range(3) for v in angle_errors(a, b, j, [k for k in range(3) if k != j], square)])
                for a, b in places
            ]
        )
        return found

    return terms


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ("", {}),
        ("T = 1.5, window = 3", {"T": 1.5, "window": 3}),
        ('denominator = "pairs", angle_denominator = "window", window = 5',
         {"denominator": "pairs", "angle_denominator": "window", "window": 5}),
    ],
)  # fmt: skip
def test_terms_total_and_gradients(args, options) -> None:
    agree(step_of(args), batch_of(lengths=(5, 3, 1)), oracle(**options), {f"m_ckd/{k}": w for k, w in TERMS.items()})


def test_soft_labels_alone_unless_alpha_says_more() -> None:
    assert "m_ckd/hard" not in step_of()(batch_of())[1]
    weights = TERMS | {"soft": 0.9, "hard": 1 - 0.9}
    agree(step_of("alpha = 0.9"), batch_of(lengths=(4, 2)), oracle(), {f"m_ckd/{k}": w for k, w in weights.items()})


def test_no_padding_and_one_token_texts_are_finite() -> None:
    """The authors' own masking gives NaN even where nothing is padded."""
    step = step_of()
    for lengths in ((4, 4), (1, 1), (2, 1)):
        total, values = step(batch_of(lengths=lengths))
        assert all(torch.isfinite(value) for value in values.values())
        assert all(torch.isfinite(g).all() for g in step.gradients(total) if g is not None)


def test_pairs_as_denominator_shrink_a_relation_by_the_length() -> None:
    batch = batch_of(lengths=(6, 6))
    rows, pairs = (step_of(args)(batch)[1]["m_ckd/tokens"] for args in ("", 'denominator = "pairs"'))
    close(pairs * 6, rows, "tokens")


def test_the_order_of_the_students_features_does_not_matter() -> None:
    """An orthogonal map of all its states, put into the weights so that the model computes the same."""
    step, batch = step_of(), batch_of()
    before = step(batch)[1]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    model = step.models["s"]
    with torch.no_grad():
        for name, parameter in model.bert.named_parameters():
            if "embeddings" in name:
                parameter.copy_(parameter[..., order])
            elif ("attention.self" in name or "intermediate" in name) and name.endswith("weight"):
                parameter.copy_(parameter[:, order])
            elif "output." in name:
                parameter.copy_(parameter[order])
        model.bert.pooler.dense.weight.copy_(model.bert.pooler.dense.weight[:, order])
    after = step(batch)[1]
    for name, value in before.items():
        close(after[name], value, name)


def test_a_student_of_one_layer_has_no_triple() -> None:
    found = check_text(Pair(student=(1, 16, 4)).spec(*use("ckd")), "spec.gkd", root=world())
    assert [(d.code, d.message) for d in found.diagnostics] == [("E0309", "n = 2 is less than 3")]


def test_an_even_window_has_no_centre() -> None:
    found = check_text(Pair().spec(*use("ckd", args="window = 4")), "spec.gkd", root=world())
    assert [d.code for d in found.diagnostics] == ["E0309"]
