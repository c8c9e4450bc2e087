"""Specs drawn at random: what the check accepts runs with the shapes that it said; a size disturbed, it refuses."""

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from zoo import ROOT, Loss, Spec, pairs, specs

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.models.load import load


def codes(text: str, severity: str = "error") -> list[str]:
    return [d.code for d in check_text(text, "spec.gkd", root=ROOT).diagnostics if d.severity == severity]


def plan_of(text: str, optimise: bool = True):
    note(text)
    found = check_text(text, "spec.gkd", root=ROOT)
    assert [f"{d.code} {d.message}" for d in found.diagnostics if d.severity == "error"] == []
    (stage,) = compile_plan(found.graph, optimise=optimise).stages
    return stage


def models_of(plan) -> dict:
    return {node.name: load(node.info, seed=3 + 4 * (node.name == "t")) for node in plan.models}


def batch_of(spec: Spec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, spec.s.V, (3, 6), generator=generator)
    mask = (torch.arange(6)[None] < torch.tensor([6, 4, 3])[:, None]).long()
    if spec.s.task == "classification":
        labels = torch.randint(0, spec.s.C, (3,), generator=generator)
    else:
        kept = (torch.rand(3, 6, generator=generator) < 0.6) | (torch.arange(6) == 1)
        labels = torch.where(kept & mask.bool(), ids, torch.tensor(-100))
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def run(distiller: Distiller, batch, step: int):
    """(loss, terms, gradients by name) in eval mode, so that no dropout is drawn."""
    distiller.module.eval()
    distiller.step_to(step, 10)
    loss = distiller(batch)
    names, parameters = zip(*distiller.named_parameters(), strict=True)
    return (
        loss.detach(),
        distiller.terms,
        dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)),
    )


@given(spec=specs(), seed=st.integers(0, 99), step=st.integers(0, 9))
@settings(max_examples=60)
def test_what_is_accepted_runs_as_it_was_said(spec, seed, step) -> None:
    """One step: its first batch asserts the shape of every tap and result; the plan's passes change nothing."""
    plan, plain = plan_of(spec.text()), plan_of(spec.text(), optimise=False)
    models, batch = models_of(plan), batch_of(spec, seed)
    distiller = Distiller(plan, models)
    loss, terms, gradients = run(distiller, batch, step)
    assert torch.isfinite(loss)
    assert set(terms) == {f"l{n}" for n in range(len(spec.losses))}
    assert all(g is None or torch.isfinite(g).all() for g in gradients.values())
    assert any(g is not None for g in gradients.values())

    plain_loss, plain_terms, plain_gradients = run(Distiller(plain, models, distiller.projections), batch, step)
    torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-6)
    for name, value in terms.items():
        torch.testing.assert_close(plain_terms[name], value, rtol=1e-5, atol=1e-6)
    assert set(plain_gradients) == set(gradients)
    for name, gradient in gradients.items():
        other = plain_gradients[name]
        one, two = (torch.zeros(()) if g is None else g for g in (gradient, other))
        bound = 1e-5 * max(1.0, one.abs().max().item())
        assert (one - two).abs().max().item() <= bound, name

    summed = torch.zeros(())
    for n in range(len(spec.losses)):
        alone = plan_of(spec.text(only=n))
        part, _, _ = run(Distiller(alone, models, distiller.projections), batch, step)
        torch.testing.assert_close(part, terms[f"l{n}"], rtol=1e-5, atol=1e-6)
        summed = summed + distiller.weights[f"l{n}"] * part
    torch.testing.assert_close(summed, loss, rtol=1e-4, atol=1e-5)


def _one(t, s, text: str, *projections: str) -> Spec:
    return Spec(t, s, (Loss(text, projections),), ("1.0",))


def _width(model):
    """Sizes of a wider model of this family, with as many heads."""
    return {"H": model.H + 4} if model.family == "qwen3" else {"D": model.D + 2, "H": model.A * (model.D + 2)}


@given(pair=pairs(), op=st.sampled_from(["mse", "cosine_distance", "normalized_mse", "smooth_l1"]))
@settings(max_examples=25)
def test_a_width_that_differs_is_refused_without_a_projection(pair, op) -> None:
    _, s = pair
    spec = _one(s, s, f"{op}(s.layer[-1].out <- t.layer[-1].out)")
    assert codes(spec.text()) == []
    assert codes(spec.changed(**_width(s)).text()) == ["E0301"]


@given(pair=pairs())
@settings(max_examples=25)
def test_a_projection_is_needed_fits_and_not_by_the_wrong_way(pair) -> None:
    t, s = pair
    spec = _one(t, s, "mse(s.final |> W <- t.final)", "project W = linear(s.H -> t.H)")
    assert codes(spec.text()) == []
    if s.H != t.H:
        assert codes(_one(t, s, "mse(s.final <- t.final)").text()) == ["E0301"]
        assert codes(_one(t, s, "mse(s.final |> W <- t.final)", "project W = linear(t.H -> s.H)").text()) == ["E0302"]
    wrong = _one(t, s, "mse(s.final |> W <- t.final)", f"project W = linear(s.H -> {t.H + 1})")
    assert codes(wrong.text()) == ["E0301"]
    wrong = _one(t, s, "mse(s.final |> W <- t.final)", f"project W = linear({s.H + 1} -> t.H)")
    assert codes(wrong.text()) == ["E0302"]


@given(pair=pairs(), text=st.sampled_from(["attention_kl({s} <- {t})", "mse({s} <- {t})"]))
@settings(max_examples=25)
def test_head_counts_that_differ_are_refused(pair, text) -> None:
    _, s = pair
    spec = _one(s, s, text.format(s="s.layer[-1].attn.scores", t="t.layer[0].attn.scores"))
    assert codes(spec.text()) == []
    more = {"A": 2 * s.A, "KV": 2 * s.KV} | ({} if s.family == "qwen3" else {"H": 2 * s.H})
    assert codes(spec.changed(**more).text()) == ["E0312"]


@given(pair=pairs(), op=st.sampled_from(["kl", "reverse_kl", "soft_cross_entropy", "jsd", "tvd"]))
@settings(max_examples=30)
def test_vocabularies_and_classes_that_differ_are_refused(pair, op) -> None:
    t, s = pair
    spec = _one(t, s, f"{op}(s.logits <- t.logits)")
    assert codes(spec.text()) == []
    if s.task == "classification":
        assert codes(spec.changed(C=s.C + 1).text()) == ["E0322"]
    else:
        assert set(codes(spec.changed(V=s.V + 3).text())) <= {"E0320", "E0321"}
        assert codes(spec.changed(V=s.V + 3).text())
        assert codes(spec.changed(words="u").text()) == ["E0321"]


@given(pair=pairs(), part=st.sampled_from("qkv"), kind=st.sampled_from(["attention_kl", "mse"]))
@settings(max_examples=20)
def test_relation_heads_that_do_not_divide_are_refused(pair, part, kind) -> None:
    t, s = pair
    one, two = (f"self_relation({name}.layer[-1].attn.{part}, heads = {{heads}})" for name in "st")
    good = _one(t, s, f"{kind}({one} <- {two})".format(heads=2))
    assert codes(good.text()) == []
    bad = _one(t, s, f"{kind}({one} <- {two})".format(heads=7))
    assert set(codes(bad.text())) == {"E0309"}


@given(pair=pairs(), layer=st.integers(0, 5))
@settings(max_examples=15)
def test_a_layer_is_there_or_refused(pair, layer) -> None:
    t, s = pair
    spec = _one(t, s, f"mse(gram(s.layer[{layer}].out) <- gram(t.layer[0].out))")
    assert (codes(spec.text()) == []) == (layer < s.N)
    if layer >= s.N:
        assert all(code.startswith("E02") for code in codes(spec.text()))
