"""MT-BERT (arXiv 2106.01023): co-finetuned teachers under shared layers, and how much each counts for a sample."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_world import CLASSES, batch_of, close, world
from several import NAMES, batch, step_of, text

from gkd_dsl.clock import Span
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run

T = 2.0
TEACHERS = ((4, 24), (2, 24))
ARGS = f"T = {T}, soft_weight = 0.5, hidden_weight = 2.0, student_side_weight = 3.0, hard_weight = 0.25"


def spec(**options):
    return text("mt_bert", args=ARGS, teachers=TEACHERS, **options)


@pytest.fixture(autouse=True)
def _by_design(monkeypatch):
    """W trains on the teacher's side, as in the paper, which the checker points at."""

    def plans_of(text):
        found = check_text(text, "spec.gkd", root=world())
        assert [d.code for d in found.diagnostics] in ([], ["W0704"])
        return {stage.name: stage for stage in compile_plan(found.graph).stages}

    monkeypatch.setattr("several.plans", plans_of)


def states(model, rows):
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    return model.base_model(**inputs, output_hidden_states=True).hidden_states


def said(step, name, rows, grad=False):
    """A teacher's scores: pooler of the first token and classes, both shared."""
    with torch.set_grad_enabled(grad):
        first = states(step.models[name], rows)[-1][:, 0]
        blocks = step.projections
        return blocks["m/prediction"](torch.tanh(blocks["m/pooling"](first)))


def test_the_terms_of_the_second_stage():
    step, rows = step_of(spec(), "m.task"), batch()
    total, values = step(rows)
    s_logits = copy.deepcopy(step.models["s"])(**{n: rows[n] for n in ("input_ids", "attention_mask")}).logits.detach()
    s_states, count = states(step.models["s"], rows), len(rows["labels"])
    mask = rows["attention_mask"].bool()
    soft = hidden = student_side = 0.0
    for k, (name, pairs) in enumerate((("a", ((0, 1), (1, 3))), ("b", ((0, 0), (1, 1))))):
        scores = said(step, name, rows)
        for row in range(count):
            label = int(rows["labels"][row])
            own = -math.log(scores[row].softmax(-1)[label])
            p = (scores[row] / T).softmax(-1)
            soft += T * T * -(p * (s_logits[row] / T).log_softmax(-1)).sum() / (1 + own) / count
        t_states = states(step.models[name], rows)
        for i, j in pairs:
            down, up = step.projections[f"m/W.{k}"], step.projections[f"m/V.{k}"]
            here, there = s_states[i + 1][mask], t_states[j + 1][mask]
            hidden += ((here - down(there)) ** 2).mean()
            student_side += ((up(here) - there) ** 2).mean()
    close(values["m/soft"], soft, "soft")
    close(values["m/hidden"], hidden, "hidden")
    close(values["m/student_side"], student_side, "student_side")
    hard = F.cross_entropy(s_logits, rows["labels"])
    close(values["m/hard"], hard, "hard")
    close(total, 0.5 * soft + 2.0 * hidden + 3.0 * student_side + 0.25 * hard, "total")


def make_sure(step, label, by=60.0):
    """Shared layers that give one class to every text."""
    with torch.no_grad():
        step.projections["m/prediction"].weight.zero_()
        step.projections["m/prediction"].bias.copy_(torch.tensor([by * (c == label) for c in range(CLASSES)]))


def test_a_teacher_that_is_right_counts_whole_and_one_that_is_wrong_hardly():
    step, rows = step_of(spec(), "m.task"), batch()
    rows["labels"] = torch.full_like(rows["labels"], 1)
    s = copy.deepcopy(step.models["s"])(**{n: rows[n] for n in ("input_ids", "attention_mask")}).logits.detach()
    for label, weight in ((1, 1.0), (0, 1 / 61)):
        make_sure(step, label)
        soft = 2 * weight * T * T * F.cross_entropy(s / T, torch.full_like(rows["labels"], label))
        close(step(rows)[1]["m/soft"], soft, "soft", rtol=1e-6)


def test_the_order_of_the_teachers_does_not_matter():
    step, rows = step_of(spec(), "m.task"), batch()
    other = step_of(spec(order="ba"), "m.task", step.models)
    for name, block in other.projections.items():
        twin = {"m/W.0": "m/W.1", "m/W.1": "m/W.0", "m/V.0": "m/V.1", "m/V.1": "m/V.0"}.get(name, name)
        block.load_state_dict(step.projections[twin].state_dict())
    (total, values), (again, others) = step(rows), other(rows)
    close(again, total, "total")
    for name, value in values.items():
        close(others[name], value, name)


def test_in_the_second_stage_only_the_student_and_its_maps_learn():
    step, rows = step_of(spec(), "m.task"), batch()
    trained = {name.rsplit("/", 1)[0] if name.startswith("project") else name.split("/")[0] for name in step.names}
    assert trained == {"s", "project/m/W.0", "project/m/W.1", "project/m/V.0", "project/m/V.1"}
    total, _ = step(rows)
    total.backward()
    for name in NAMES[:2]:
        assert not step.models[name].training
        assert all(p.grad is None and not p.requires_grad for p in step.models[name].parameters())
    for name in ("m/pooling", "m/prediction"):
        assert all(p.grad is None and not p.requires_grad for p in step.projections[name].parameters())


def test_the_weight_of_a_teacher_is_a_constant():
    """Nothing that trains stands in it: not even where the student is one of the models that it could reach."""
    step, rows = step_of(spec(), "m.task"), batch()
    _, values = step(rows)
    gradients = dict(zip(step.names, step.gradients(values["m/soft"]), strict=True))
    assert {name.split("/")[0] for name, g in gradients.items() if g is not None} == {"s"}


def test_the_first_stage_trains_both_teachers_under_the_shared_layers():
    step, rows = step_of(spec(), "m.cofinetune"), batch()
    assert set(step.models) == {"a", "b"}
    total, _ = step(rows)
    wanted = sum(F.cross_entropy(said(step, name, rows, grad=True), rows["labels"]) for name in "ab")
    close(total, wanted, "teach")
    found = step.gradients(total)
    expected = torch.autograd.grad(wanted, step.parameters, allow_unused=True)
    reached = set()
    for name, one, two in zip(step.names, found, expected, strict=True):
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
            reached.add("/".join(name.split("/")[:-1]) if name.startswith("project") else name.split("/")[0])
    assert reached == {"a", "b", "project/m/pooling", "project/m/prediction"}


# --- both stages in one run -----------------------------------------------------------------------


class Rows:
    def steps_per_epoch(self, accumulate=1):
        return 3

    def epoch(self, epoch, start=0):
        for number in range(start, 3):
            yield batch_of((7, 4, 2, 5), seed=10 * epoch + number)

    def held_out(self):
        return iter(())

    def tokens(self, rows):
        return int(rows["attention_mask"].sum())


class CrashError(Exception):
    pass


class At:
    def __init__(self, step, run=None):
        self.step, self.run, self.border = step, run, {}

    def on_stage(self, record):
        if record.stage == "m.task" and self.run is not None:
            self.border = kept(self.run())

    def on_step(self, record):
        self.step -= 1
        if self.step == 0:
            raise CrashError

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def kept(run):
    found = {f"{name}/{key}": v.clone() for name, m in run.models.items() for key, v in m.state_dict().items()}
    blocks = run.projections.items()
    return found | {f"project/{name}/{key}": v.clone() for name, b in blocks for key, v in b.state_dict().items()}


def compiled():
    return compile_plan(check_text(spec(), "spec.gkd", root=world()).graph)


def run(folder, crash=0, resume=False):
    plan = compiled()
    short = replace(plan, stages=tuple(_short(stage) for stage in plan.stages))
    listener = At(crash)
    made = Run(short, folder=folder, root=world(), listeners=[listener], loaders=lambda _: Rows())
    listener.run = lambda: made
    made.run(resume=resume)
    return kept(made), listener.border


def _short(stage):
    node = replace(stage.stage, duration=Span(4, "steps"), checkpoint_every=Span(1, "steps"))
    return replace(stage, stage=node)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(RunFolder.create("whole", root=tmp_path_factory.mktemp("runs")))


def test_teachers_and_shared_layers_are_trained_first_and_then_stay(whole):
    end, border = whole
    fresh = kept(_unrun())
    for name in ("a", "b", "project/m/pooling", "project/m/prediction"):
        own = [key for key in border if key.startswith(f"{name}/")]
        assert any(not torch.equal(border[key], fresh[key]) for key in own if key in fresh), name
        assert all(torch.equal(border[key], end[key]) for key in own), name
    assert any(not torch.equal(end[key], border[key]) for key in end if key.startswith("s/"))


def _unrun():
    plan = compiled()
    made = Run(plan, root=world(), loaders=lambda _: Rows())
    for stage in plan.stages:
        for node in stage.models:
            made.model(node.name)
        made.make_projections(stage)
    return made


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_killed_and_resumed_over_the_border_is_as_never_killed(whole, tmp_path, step):
    folder = RunFolder.create("killed", root=tmp_path)
    with pytest.raises(CrashError):
        run(folder, crash=step)
    found, _ = run(RunFolder.open(folder.path), resume=True)
    assert found.keys() == whole[0].keys()
    assert all(torch.equal(value, whole[0][key]) for key, value in found.items())
