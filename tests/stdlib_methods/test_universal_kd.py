"""Universal-KD against its definition (EMNLP 2021), and what keeps its teacher's heads from the degenerate optimum."""

import torch
from method_world import CLASSES, Pair, Step, agree, batch_of, close, made, plans, row_kl, use, world

from gkd_dsl.meaning.check import check_text

WEIGHTS = {"soft": 0.5, "layers": 0.5, "anchor": 1.0}


def step_of(args: str = "", stage: str = "intermediate", pair: Pair | None = None) -> Step:
    plan = plans((pair or Pair()).spec(*use("universal_kd", args=args)))[f"m_universal_kd.{stage}"]
    return Step(plan, made(plan))


def named(weights):
    return {f"m_universal_kd/{name}": weight for name, weight in weights.items()}


def oracle(T: float = 1.0):
    def terms(students, teachers, blocks, batch):
        head = {name.rpartition("/")[2]: block for name, block in blocks.items()}
        found = dict.fromkeys(
            ("hard", "soft", "layers", "layers_joint", "layers_pooled", "anchor", "anchor_pooled"), 0.0
        )
        rows = len(students)
        for s, t, label in zip(students, teachers, batch["labels"], strict=True):
            found["hard"] = found["hard"] - s.logits.log_softmax(-1)[label] / rows
            found["soft"] = found["soft"] + T * T * row_kl(t.logits / T, s.logits / T) / rows
            for ending, of in (("", lambda x: x[0]), ("_pooled", lambda x: x.mean(0))):
                if f"V{ending}.0" not in head:
                    continue
                inner = range(1, len(t.hidden) - 1)
                v = [of(t.hidden[j]) @ head[f"V{ending}.{j - 1}"].weight.T for j in inner]
                found[f"anchor{ending}"] = (
                    found[f"anchor{ending}"]
                    + sum(torch.log(torch.exp(out).sum()) - out[label] for out in v) / len(v) / rows
                )
                for i in range(1, len(s.hidden) - 1):
                    u = of(s.hidden[i]) @ head[f"U{ending}.{i - 1}"].weight.T
                    powers = [torch.exp((u.detach() * out).sum()) for out in v]
                    mixed = sum(p / sum(powers) * out for p, out in zip(powers, v, strict=True))
                    found[f"layers{ending}"] = found[f"layers{ending}"] + row_kl(mixed.detach(), u) / rows
                    if not ending:
                        found["layers_joint"] = found["layers_joint"] + row_kl(mixed, u) / rows
        return found

    return terms


def test_terms_total_and_gradients() -> None:
    agree(step_of(), batch_of(), oracle(), named(WEIGHTS))
    args = "T = 2.0, layer_weight = 0.0, joint_weight = 0.25, pooled_weight = 2.0, anchor_weight = 0.5"
    weights = {"soft": 0.5, "layers_joint": 0.25, "layers_pooled": 2.0, "anchor": 0.5, "anchor_pooled": 0.5}
    agree(step_of(args, pair=Pair((4, 24, 4), (3, 16, 4))), batch_of(), oracle(2.0), named(weights))


def test_then_the_labels_alone() -> None:
    step, batch = step_of(stage="task"), batch_of()
    assert list(step.models) == ["s"]
    assert not step.projections
    logits = step.models["s"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    close(step(batch)[0], torch.nn.functional.cross_entropy(logits, batch["labels"]), "task")


def test_heads_are_in_the_space_of_the_classes_without_bias() -> None:
    """GLMKD projects to the student's width; the outputs of both sides are distributions over the classes here."""
    blocks = step_of(pair=Pair((4, 24, 4), (3, 16, 4))).projections
    assert {name.rpartition("/")[2]: (b.in_features, b.out_features, b.bias) for name, b in blocks.items()} == {
        **{f"U.{i}": (16, CLASSES, None) for i in range(2)},
        **{f"V.{j}": (24, CLASSES, None) for j in range(3)},
    }


def _flows(step: Step, value) -> set[str]:
    found = zip(step.names, step.gradients(value), strict=True)
    reached = [name for name, g in found if g is not None and g.abs().max() > 0]
    return {
        name.split("/")[-2].split(".")[0] if name.startswith("project/") else name.split("/")[0] for name in reached
    }


def test_labels_alone_train_the_teachers_heads() -> None:
    step = step_of("joint_weight = 1.0")
    _, values = step(batch_of())
    assert _flows(step, values["m_universal_kd/layers"]) == {"s", "U"}
    assert _flows(step, values["m_universal_kd/anchor"]) == {"V"}
    assert _flows(step, values["m_universal_kd/layers_joint"]) == {"s", "U", "V"}
    assert all(p.grad is None and not p.requires_grad for p in step.models["t"].parameters())


def test_constant_heads_are_an_optimum_of_the_divergence_and_none_of_the_objective() -> None:
    """Outputs that are the same for all texts have the divergence 0; the anchor moves the teacher's heads off them."""
    step, batch = step_of("soft_weight = 0.0, joint_weight = 1.0"), batch_of()
    with torch.no_grad():
        for block in step.projections.values():
            block.weight.zero_()
    total, values = step(batch)
    for name in ("layers", "layers_joint"):
        close(values[f"m_universal_kd/{name}"], torch.zeros(()), name)
        assert max(g.abs().max() for g in step.gradients(values[f"m_universal_kd/{name}"]) if g is not None) < 1e-12
    flows = zip(step.names, step.gradients(total), strict=True)
    moved = {name for name, g in flows if g is not None and g.abs().max() > 1e-12}
    assert moved == {f"project/m_universal_kd/V.{j}/weight" for j in range(3)}


def test_without_the_anchor_the_checker_warns_of_the_collapse() -> None:
    for args, codes in (("joint_weight = 1.0, anchor_weight = 0.0", {"W0704"}), ("joint_weight = 1.0", set())):
        found = check_text(Pair().spec(*use("universal_kd", args=args)), "spec.gkd", root=world())
        assert {d.code for d in found.diagnostics} == codes


def test_one_inner_layer_is_the_divergence_from_its_head() -> None:
    step, batch = step_of(pair=Pair((2, 24, 4), (2, 16, 4))), batch_of()
    s, t = (
        step.models[name](batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        for name in "st"
    )
    blocks = {name.rpartition("/")[2]: block for name, block in step.projections.items()}
    u, v = blocks["U.0"](s.hidden_states[1][:, 0]), blocks["V.0"](t.hidden_states[1][:, 0])
    wanted = torch.nn.functional.kl_div(u.log_softmax(-1), v.log_softmax(-1), reduction="batchmean", log_target=True)
    close(step(batch)[1]["m_universal_kd/layers"], wanted, "layers")
