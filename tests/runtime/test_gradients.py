"""`gradient(...)`, swaps and borrowed blocks inside a compiled step, and passes in evaluations."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.evaluate import Evaluator
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.schedules import Clock

CLOCK = Clock(0, 10, 10.0)
CLASSES = 3
CONFIG = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 31, "hidden_size": 16,
    "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.4,
    "id2label": {str(n): str(n) for n in range(CLASSES)},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    for name, layers in (("t", 4), ("s", 2)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(26))]
        (folder / name / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"w{n},{n % CLASSES}\n" for n in range(9)))
    return folder


@pytest.fixture
def build(root):
    def made(body, stage="minimize hard", between=""):
        text = (
            'gkd 1\nteacher t = random_init("t")\nstudent s = random_init("s")\n'
            'data rows = csv("rows.csv", text = "text", label = "label", held_out = 30%)\n'
            f"loss soft(m: model) = kl(m.logits <- t.logits)\n{body}\nstage main for 3 epochs {{\n{stage}\n}}\n"
        )
        checked = check_text(text, "spec.gkd", root=root)
        assert [f"{d.code} {d.message}" for d in checked.diagnostics.errors] == []
        (plan,) = compile_plan(checked.graph).stages
        models = {node.name: load(node.info, dtype=torch.float64, seed=len(node.name)) for node in plan.models}
        return plan, models, StepModule(plan, models)

    return made


def batch_of(lengths=(6, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths)
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 31, (len(lengths), length), generator=generator) * mask
    labels = torch.randint(0, CLASSES, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(step, batch, clock=CLOCK):
    return step(batch, clock, step.denominators([batch], clock))


def embedded(model, batch):
    """(the embeddings of a plain forward, its logits)."""
    seen = []
    handle = model.base_model.embeddings.register_forward_hook(lambda _m, _a, out: seen.append(out))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    return seen[0], logits


def kl(teacher, student):
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


PROBED = """
pass probe = s { grad = discard }
let g = gradient(2 * soft(probe) + 0.5 * cross_entropy(probe.logits, batch.labels), at = probe.embed)
loss hard = cross_entropy(s.logits, batch.labels) + mean(pool(g * s.embed)[0])
"""


def test_a_gradient_is_that_of_the_weighted_sum(build):
    """It is read by a loss that is linear in it, so that its value shows."""
    _, models, step = build(PROBED)
    batch = batch_of()
    out = run(step, batch)
    at, logits = embedded(copy.deepcopy(models["s"]), batch)
    with torch.no_grad():
        _, taught = embedded(models["t"], batch)
    total = 2 * kl(taught, logits) + 0.5 * F.cross_entropy(logits, batch["labels"])
    (found,) = torch.autograd.grad(total, at, retain_graph=True)
    mask = batch["attention_mask"].double()
    pooled = ((found * at)[:, :, 0] * mask).sum(1) / mask.sum(1)
    expected = F.cross_entropy(logits, batch["labels"]) + pooled.mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_loss_without_weight_yet_is_zero(build):
    body = PROBED.replace("gradient(2 * soft(probe) + 0.5 *", "gradient(ramp(0 -> 1, until = 100%) *")
    _, models, step = build(body)
    batch = batch_of()
    logits = models["s"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(run(step, batch).loss, F.cross_entropy(logits, batch["labels"]))
    later = run(step, batch, replace(CLOCK, step=5)).loss
    assert (later - F.cross_entropy(logits, batch["labels"])).abs() > 1e-4


def test_parameters_that_do_not_train_do_not_hide_the_gradient(build):
    """Embeddings that are frozen need no gradient of their own; the one at their output is there."""
    _, _, free = build(PROBED)
    _, _, frozen = build(PROBED, "train s.head\nminimize hard")
    batch = batch_of()
    torch.testing.assert_close(run(frozen, batch).loss, run(free, batch).loss)


def test_one_forward_gives_its_gradient_and_trains(build):
    body = "let g = gradient(soft(s), at = s.hidden[1])\nloss hard = soft(s) + mean(pool(g * s.hidden[2])[0])"
    _, models, step = build(body)
    out = run(step, batch_of())
    out.loss.backward()
    assert all(p.grad is not None for n, p in models["s"].named_parameters() if ".layer." in n)


def test_two_gradients_of_one_pass(build):
    body = """
pass probe = s { grad = discard }
let a = gradient(soft(probe), at = probe.hidden[0])
let b = gradient(soft(probe), at = probe.hidden[1])
loss hard = mean(pool(a * s.hidden[0])[0]) + mean(pool(b * s.hidden[1])[0])
"""
    _, _, step = build(body)
    assert torch.isfinite(run(step, batch_of()).loss)


def test_a_position_without_a_finite_gradient_gets_zero(build):
    _, models, step = build(
        "pass probe = s { grad = discard }\n"
        "let g = gradient(cross_entropy(probe.logits, batch.labels), at = probe.embed)\n"
        "pass moved = s { add embed = l2norm(g) }\nloss hard = mse(moved.embed <- detach(s.embed))"
    )
    with torch.no_grad():
        models["s"].classifier.weight.fill_(float("inf"))
    assert run(step, batch_of()).loss == 0.0


def test_of_a_position_whose_gradient_is_partly_finite_nothing_is_kept(build):
    _, models, step = build(PROBED)
    taken, env = step.gradients.take, {}
    batch = batch_of()

    def spoilt(apply, found, clock):
        env["g"] = taken(apply, found, clock)
        return env["g"]

    def broken(module, inputs, output):
        output.register_hook(lambda g: torch.where(torch.arange(g.shape[-1]) == 5, torch.inf, g))

    models["s"].base_model.embeddings.register_forward_hook(broken)
    step._program._special["gradient"] = spoilt
    run(step, batch)
    assert (env["g"] == 0).all()


def test_a_gradient_without_a_graph_is_refused(build):
    _, _, step = build(PROBED)
    with torch.no_grad(), pytest.raises(RunError, match="does not depend"):
        run(step, batch_of())


def test_the_texts_of_a_rolled_pass_bring_their_types_and_positions(build):
    _, models, step = build("pass x = s(roll(batch))\nloss hard = cross_entropy(x.logits, roll(batch).labels)")
    batch = batch_of()
    batch["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]])
    batch["position_ids"] = torch.arange(6)[None] + torch.tensor([[0], [3], [7]])
    plain = models["s"](**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.testing.assert_close(run(step, batch).loss, F.cross_entropy(plain, batch["labels"]))


def test_the_mask_of_each_micro_batch_is_counted_as_it_is_drawn(build):
    """Spans of the same texts, drawn anew: what counts of them differs, and the sum is that of the forwards."""
    _, _, step = build(
        "mask drawn = random_segment_starts(batch.attention_mask, share = 0.4) & (batch.input_ids != 7)\n"
        "loss hard = mse(s.hidden[1] <- detach(s.hidden[2]), mask = drawn)"
    )
    batch = batch_of((12, 9, 7))
    batch["input_ids"] = torch.where(torch.arange(12) % 2 == 1, 7, batch["input_ids"])
    each = [step.count(batch, replace(CLOCK, micro=micro)) for micro in range(6)]
    assert len({tuple(counts.values()) for counts in each}) > 1
    assert step.denominators([batch] * 6, CLOCK) == {key: sum(one[key] for one in each) for key in each[0]}


def test_a_model_that_trains_lends_its_blocks_without_training_by_it(build):
    body = "pass x = t { replace layer[0] with s.layer[1] }\nloss hard = mse(s.hidden[1] <- x.hidden[1])"
    _, models, step = build(body)
    run(step, batch_of()).loss.backward()
    assert all(p.grad is None for p in models["s"].base_model.encoder.layer[1].parameters())
    assert all(p.grad is not None for p in models["s"].base_model.encoder.layer[0].parameters())


def test_what_enters_a_frozen_model_learns_through_it(build):
    """The teacher's head over the student's last state: the gradient of a stage of two projections reaches both."""
    body = """
project W = linear(s.H -> t.H)
pass x = t { swap hidden[4] from s.hidden[2] }
pass y = t { add hidden[3] = s.hidden[1] |> W }
loss hard = cross_entropy(x.logits, batch.labels) + cross_entropy(y.logits, batch.labels)
"""
    plan, models, step = build(body)
    assert all(forward.grad for forward in plan.forwards if forward.changes)
    run(step, batch_of()).loss.backward()
    assert step.projections["W"].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in models["s"].named_parameters() if ".layer." in n)
    assert all(p.grad is None for p in models["t"].parameters())


def test_a_metric_of_a_mixed_pass(build):
    body = """
pass mixed = s { replace layer[i] with t.layer[js] for (i, js) in groups(s.layer, t.layer) when coin(0.5) }
loss hard = cross_entropy(s.logits, batch.labels)
metric acc = accuracy(mixed.logits, batch.labels)
"""
    plan, models, _ = build(body, "minimize hard\nevaluate acc")

    class Place:
        @staticmethod
        def move(batch):
            return batch

        @staticmethod
        def taps_context():
            return torch.no_grad()

        @staticmethod
        def infer(function):
            function()

    batch = batch_of((5, 5, 5, 5, 5, 5))
    (forward,) = [f for f in plan.metrics[0].forwards if f.changes]
    for number in range(4):
        clock = Clock(number, 10, 10.0)
        found = Evaluator(plan, models, {})(["acc"], [batch], Place(), clock)["acc"]
        hand = copy.deepcopy(models["s"]).eval()
        drawn = {c.index: c.when.value(clock) for c in forward.changes}
        theirs, ours = models["t"].base_model.encoder.layer, hand.base_model.encoder.layer
        blocks = [b for i in range(2) for b in (theirs[2 * i : 2 * i + 2] if drawn[i] else [ours[i]])]
        hand.base_model.encoder.layer = torch.nn.ModuleList(blocks)
        right = (embedded(hand, batch)[1].argmax(-1) == batch["labels"]).double().mean().item()
        assert found == pytest.approx(right)
