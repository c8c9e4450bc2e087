import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gkd_dsl.runtime import metrics
from gkd_dsl.runtime.metrics import make
from gkd_dsl.runtime.ops.divergences import cross_entropy


def fed(name, batches, **attrs):
    accumulator = make(name, attrs)
    for batch in batches:
        accumulator.update(**batch)
    return accumulator.compute()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_for(classes, n=4):
    return torch.nn.functional.one_hot(torch.tensor(classes), n).float() * 3 + 0.5


def in_batches(size=3, **columns):
    length = len(next(iter(columns.values())))
    return [{k: v[i : i + size] for k, v in columns.items()} for i in range(0, length, size)]


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(labels)
@settings(max_examples=50, deadline=None)
def test_classification_by_counting(pairs):
    predicted, true = [p for p, _ in pairs], [t for _, t in pairs]
    batches = in_batches(student=logits_for(predicted), labels=torch.tensor(true))
    assert fed("accuracy", batches) == pytest.approx(np.mean([p == t for p, t in pairs]))
    agreement = in_batches(student=logits_for(predicted), teacher=logits_for(true))
    assert fed("agreement", agreement) == pytest.approx(np.mean([p == t for p, t in pairs]))
    counts = Counter(pairs)

    def f1(c):
        tp = counts[c, c]
        fp = sum(n for (p, t), n in counts.items() if p == c != t)
        fn = sum(n for (p, t), n in counts.items() if t == c != p)
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0

    assert fed("f1", batches) == pytest.approx(f1(1))
    assert fed("f1", batches, positive=3) == pytest.approx(f1(3))
    assert fed("f1", batches, average="macro") == pytest.approx(np.mean([f1(c) for c in set(predicted) | set(true)]))
    assert fed("f1", batches, average="micro") == pytest.approx(np.mean([p == t for p, t in pairs]))
    # Matthews of several classes is the correlation of the one-hot vectors, taken together.
    x, y = np.eye(4)[predicted], np.eye(4)[true]
    xx, yy, xy = (((a - a.mean(0)) * (b - b.mean(0))).sum() for a, b in ((x, x), (y, y), (x, y)))
    expected = xy / math.sqrt(xx * yy) if xx * yy > 1e-12 else 0.0
    assert fed("matthews", batches) == pytest.approx(expected, abs=1e-9)


def test_matthews_of_two_classes_is_the_phi_coefficient():
    predicted, true = [1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1]
    found = fed("matthews", in_batches(student=logits_for(predicted), labels=torch.tensor(true)))
    assert found == pytest.approx(stats.pearsonr(predicted, true).statistic)


def test_positions_without_a_label_or_outside_the_mask_do_not_count():
    student = logits_for([[0, 1, 2], [3, 3, 3]])
    labels = torch.tensor([[0, 2, -100], [3, 3, 0]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert fed("accuracy", [{"student": student, "labels": labels}]) == pytest.approx(3 / 5)
    assert fed("accuracy", [{"student": student, "labels": labels, "valid": valid}]) == pytest.approx(2 / 4)
    other = logits_for([[0, 1, 2], [0, 3, 0]])
    assert fed("agreement", [{"student": student, "teacher": other, "valid": valid}]) == pytest.approx(3 / 5)


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_classes_of_what_does_not_count_are_left_out(name):
    student = logits_for([[0, 1, 2], [3, 3, 1]])
    labels = torch.tensor([[0, 2, -100], [3, 1, 1]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    kept = [{"student": logits_for([0, 1, 3, 1]), "labels": torch.tensor([0, 2, 3, 1])}]
    assert fed(name, [{"student": student, "labels": labels, "valid": valid}]) == pytest.approx(fed(name, kept))
    assert fed(name, [{"student": student, "labels": labels}]) != pytest.approx(fed(name, kept))


@pytest.mark.parametrize("name", ["pearson", "spearman", "r2"])
def test_numbers_of_what_does_not_count_are_left_out(name):
    batch = {"student": randn(9)[:, None], "labels": randn(9, seed=1)}
    valid = torch.arange(9) % 4 != 1
    kept = {key: value[valid] for key, value in batch.items()}
    assert fed(name, [{**batch, "valid": valid}]) == fed(name, [kept])
    assert fed(name, [batch]) != pytest.approx(fed(name, [kept]))


def test_the_mean_loss_is_that_of_the_whole_set_not_of_its_batches():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    batches = in_batches(1, x=values, valid=valid)
    assert fed("mean_loss", batches, dims=("B", "L")) == pytest.approx(7 / 3)
    assert fed("perplexity", batches, dims=("B", "L")) == pytest.approx(math.exp(7 / 3))
    assert fed("perplexity", [{"x": torch.tensor([1000.0])}]) == math.inf


def test_the_mean_loss_of_a_causal_map_counts_its_lower_half():
    x = torch.arange(4.0).reshape(1, 2, 2)
    assert fed("mean_loss", [{"x": x}], dims=("B", "L", "L"), causal=True) == pytest.approx((0 + 2 + 3) / 3)


def test_a_loss_with_a_gradient_can_be_measured():
    logits = randn(4, 3).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    found = fed("mean_loss", [{"x": cross_entropy(logits, labels)}], dims=("B",))
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-10, 10)), min_size=3, max_size=40))
@settings(max_examples=60, deadline=None)
def test_correlations_are_scipys(pairs):
    x, y = torch.tensor([float(a) for a, _ in pairs]), torch.tensor([b for _, b in pairs], dtype=torch.float64)
    batches = in_batches(student=x[:, None], labels=y)
    for name, oracle in {"pearson": stats.pearsonr, "spearman": stats.spearmanr}.items():
        found = fed(name, batches)
        if x.std() < 1e-6 or y.std() < 1e-6:
            continue
        assert found == pytest.approx(oracle(x.numpy(), y.numpy()).statistic, abs=1e-6)


def test_a_constant_series_has_no_correlation():
    batches = in_batches(student=torch.ones(5), labels=torch.arange(5))
    assert math.isnan(fed("pearson", batches))
    assert math.isnan(fed("spearman", batches))
    assert math.isnan(fed("r2", in_batches(student=torch.arange(5), labels=torch.ones(5))))


@pytest.mark.parametrize("number", [0.1, 0.3, 1e-3, 1234.567])
@pytest.mark.parametrize("many", [3, 5, 6, 7, 1000])
def test_a_constant_whose_mean_is_rounded_is_still_constant(number, many):
    """A model that says the same of every text has no correlation, and not that of the rounding."""
    constant, other = torch.full((many,), number, dtype=torch.float64), randn(many).double()
    for name in ("pearson", "spearman", "r2"):
        for size in (many, 2):
            assert math.isnan(fed(name, in_batches(size, student=other, labels=constant)))
            assert name == "r2" or math.isnan(fed(name, in_batches(size, student=constant, labels=other)))


def test_r2_of_the_best_line_is_the_squared_correlation():
    x = np.random.default_rng(0).normal(size=50)
    y = 2 * x + np.random.default_rng(1).normal(size=50)
    line = stats.linregress(x, y)
    student = torch.from_numpy(line.slope * x + line.intercept)
    assert fed("r2", in_batches(student=student, labels=torch.from_numpy(y))) == pytest.approx(line.rvalue**2)


@given(st.lists(st.floats(-3, 3) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ranks_are_scipys(values):
    np.testing.assert_array_equal(metrics.ranks(np.array(values)), stats.rankdata(values))


def test_similarity_spearman_takes_all_pairs_of_the_set_at_once():
    student, teacher = randn(11, 4), randn(11, 7, seed=1)

    def similarities(x):
        x = x.double().numpy()
        return [
            x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            for i in range(len(x))
            for j in range(i + 1, len(x))
        ]

    oracle = stats.spearmanr(similarities(student), similarities(teacher)).statistic
    for size in (1, 4, 11):
        found = fed("similarity_spearman", in_batches(size, student=student, teacher=teacher))
        assert found == pytest.approx(oracle, abs=1e-9)
    kept = torch.arange(11) != 3
    batch = {"student": student, "teacher": teacher, "valid": kept}
    alone = fed("similarity_spearman", [{"student": student[kept], "teacher": teacher[kept]}])
    assert fed("similarity_spearman", [batch]) == alone


def test_similarity_spearman_is_one_for_a_rotated_space_and_needs_three_texts():
    teacher = randn(9, 5).double()
    rotation = torch.linalg.qr(randn(5, 5, seed=1).double())[0]
    assert fed("similarity_spearman", [{"student": 2 * teacher @ rotation, "teacher": teacher}]) == pytest.approx(1.0)
    assert math.isnan(fed("similarity_spearman", [{"student": teacher[:2], "teacher": teacher[:2]}]))


@pytest.mark.parametrize("name", sorted(metrics.metrics()))
def test_nothing_measured_is_nan(name):
    attrs = {"dims": ("B",)} if name in ("mean_loss", "perplexity") else {}
    assert math.isnan(fed(name, [], **attrs))


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="already"):
        metrics.metric("accuracy")(object)
