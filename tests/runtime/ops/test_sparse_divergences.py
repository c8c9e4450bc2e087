"""Divergences from the k largest logits of a teacher, against sums over all classes."""

import numpy as np
import pytest
import torch

from gkd_dsl.runtime.ops.registry import functions
from gkd_dsl.runtime.ops.sparse import over_top_k, tail_at, tail_mass

OPS = ("kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy")
V = 23


def pair(rows=5, seed=0, scale=2.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, V, generator=random, dtype=dtype) for _ in range(2))


def stored(teacher, k, temperatures=(1.0,)):
    values, ids = teacher.topk(k, dim=-1)
    return {"teacher": values, "ids": ids.int(), "tail": tail_mass(teacher, ids, temperatures)}


def loss(op, student, teacher, k, temperatures=(1.0,), **options):
    return over_top_k(op)(student, **stored(teacher, k, temperatures), temperatures=temperatures, **options)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_hand(op, student, teacher, k, T, treatment):
    """Row by row: the k largest of the teacher's classes, and one class of the others."""
    found = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        q, p = softmax(s / T), softmax(t / T)
        top = np.argsort(-t)[:k]
        others = [c for c in range(len(t)) if c not in set(top)]
        p_tail = sum(p[c] for c in others) if treatment == "bucket" else 0.0
        p_top = p[top] if treatment == "bucket" else p[top] / p[top].sum()
        P, Q = [*p_top, p_tail], [*q[top], sum(q[c] for c in others)]
        if op == "kl":
            value = sum(a * np.log(a / b) for a, b in zip(P, Q, strict=False) if a > 0)
        elif op == "reverse_kl":
            value = sum(b * np.log(b / a) for a, b in zip(P, Q, strict=False))
        elif op == "soft_cross_entropy":
            value = -sum(a * np.log(b) for a, b in zip(P, Q, strict=False))
        elif op == "tvd":
            value = 0.5 * sum(abs(a - b) for a, b in zip(P, Q, strict=False))
        else:
            M = [0.5 * (a + b) for a, b in zip(P, Q, strict=False)]
            value = 0.5 * sum(a * np.log(a / m) for a, m in zip(P, M, strict=False) if a > 0)
            value += 0.5 * sum(b * np.log(b / m) for b, m in zip(Q, M, strict=False))
        found.append(value)
    return np.array(found)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_a_bucket_for_the_others_is_the_sum_by_hand(op, T, k):
    student, teacher = pair()
    found = loss(op, student, teacher, k, (1.0, 2.5), temperature=T, t2=False)
    np.testing.assert_allclose(found.numpy(), by_hand(op, student, teacher, k, T, "bucket"), rtol=1e-10)


@pytest.mark.parametrize("op", ["kl", "soft_cross_entropy", "tvd", "jsd"])
def test_renormalised_is_the_sum_by_hand(op):
    student, teacher = pair(seed=3)
    found = loss(op, student, teacher, 4, temperature=1.7, t2=False, treatment="renormalise")
    np.testing.assert_allclose(found.numpy(), by_hand(op, student, teacher, 4, 1.7, "renormalise"), rtol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_with_all_classes_it_is_the_dense_one_in_value_and_gradient(op):
    student, teacher = pair(seed=1)
    grads = []
    for sparse in (True, False):
        s = student.clone().requires_grad_()
        value = loss(op, s, teacher, V, temperature=2.0) if sparse else functions()[op](s, teacher, temperature=2.0)
        value.sum().backward()
        grads.append((value.detach(), s.grad))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("op", ["kl", "reverse_kl", "jsd", "tvd"])
def test_putting_classes_together_never_makes_it_larger(op):
    student, teacher = pair(rows=200, seed=2, scale=3.0)
    dense = functions()[op](student, teacher)
    previous = torch.zeros_like(dense)
    for k in (1, 2, 8, V - 1):
        found = loss(op, student, teacher, k)
        assert (found <= dense + 1e-12).all()
        # More classes apart are never closer.
        assert (found >= previous - 1e-12).all()
        previous = found


@pytest.mark.parametrize("op", OPS)
def test_gradient(op):
    student, teacher = pair(rows=3, seed=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(op, s, teacher, 3, (1.0, 2.0), temperature=2.0), (student,))


def test_a_sure_student_keeps_a_finite_loss_and_gradient():
    # 1 - sum of the stored probabilities rounds to 0 here; the sum of the others does not.
    _, teacher = pair(dtype=torch.float32)
    student = (40.0 * torch.nn.functional.one_hot(teacher.argmax(-1), V)).float().requires_grad_()
    found = loss("kl", student, teacher, 3)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(student.grad).all()
    dense = functions()["kl"](student.detach(), teacher)
    assert (found <= dense + 1e-4).all()


def test_the_mass_at_another_temperature_is_exact_for_equal_others_and_an_upper_bound_above():
    ids = torch.tensor([[0, 1]])
    alike = torch.tensor([[5.0, 3.0, 0.7, 0.7, 0.7]])
    found = tail_at(tail_mass(alike, ids, (1.0,)), (1.0,), 3.0, 3)
    torch.testing.assert_close(found, torch.logsumexp(alike[:, 2:] / 3.0, -1))
    apart = torch.tensor([[5.0, 3.0, 2.0, -1.0, 0.3]])
    for T in (1.5, 4.0):
        assert tail_at(tail_mass(apart, ids, (1.0,)), (1.0,), T, 3) >= torch.logsumexp(apart[:, 2:] / T, -1)
    assert tail_at(tail_mass(apart, ids, (1.0, 4.0)), (1.0, 4.0), 4.0, 3) == torch.logsumexp(apart[:, 2:] / 4.0, -1)


def test_the_nearest_temperature_is_that_of_the_least_ratio():
    """2.4 is nearer to 1 than to 4 by difference, and nearer to 4 by ratio."""
    tail = tail_mass(torch.tensor([[5.0, 3.0, 2.0, -1.0, 0.3]]), torch.tensor([[0, 1]]), (1.0, 4.0))
    for temperature, own in ((2.4, 1), (1.6, 0)):
        alone = tail_at(tail[..., own : own + 1], ((1.0, 4.0)[own],), temperature, 3)
        assert tail_at(tail, (1.0, 4.0), temperature, 3) == alone


def test_rows_that_do_not_count_give_0_and_no_gradient_even_where_they_are_not_finite():
    student, teacher = pair(rows=6)
    student = student.view(2, 3, V).clone()
    student[0, 2] = float("inf")
    student.requires_grad_()
    valid = torch.tensor([[True, True, False], [True, False, False]])
    found = loss("kl", student, teacher.view(2, 3, V), 4, valid=valid, dims=("B", "L"))
    found.sum().backward()
    assert (found[~valid] == 0).all()
    assert (found[valid] > 0).all()
    assert (student.grad[~valid] == 0).all()
    assert torch.isfinite(student.grad).all()


def test_t2_follows_the_operator():
    student, teacher = pair()
    for op, factor in (("kl", 4.0), ("reverse_kl", 4.0), ("soft_cross_entropy", 4.0), ("jsd", 1.0), ("tvd", 1.0)):
        plain = loss(op, student, teacher, 3, (2.0,), temperature=2.0, t2=False)
        torch.testing.assert_close(loss(op, student, teacher, 3, (2.0,), temperature=2.0), factor * plain)
