"""MobileBERT (arXiv 2004.02984): phases, norms without weights, mixed targets, and its own pair of models."""

import json

import pytest
import torch
import torch.nn.functional as F
from method_world import Pair, Step, agree, batch_of, close, made, plans, row_kl, use, world

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.session import plan_of
from gkd_dsl.runtime.stages import Run

EQUAL = Pair((3, 24, 4), (3, 24, 4), "masked_lm")
DEEPER = Pair((6, 24, 4), (3, 24, 4), "masked_lm")


def normed(x):
    gap = x - x.mean()
    return gap / ((gap * gap).mean() + 1e-5).sqrt()


def oracle(students, teachers, blocks, batch, ratio=1):
    layers = len(students[0].hidden) - 1
    names = [f"{kind}.{i}" for kind in ("feature", "attention") for i in range(layers)]
    rows = {name: [] for name in ("emb", "mlm", "soft", *names)}
    for row, (s, t) in enumerate(zip(students, teachers, strict=True)):
        for place in range(len(s.logits)):
            rows["emb"].append(((normed(s.hidden[0][place]) - normed(t.hidden[0][place])) ** 2).mean())
            for i in range(layers):
                a, b = s.hidden[i + 1][place], t.hidden[(i + 1) * ratio][place]
                rows[f"feature.{i}"].append(((normed(a) - normed(b)) ** 2).mean())
            label = int(batch["labels"][row, place])
            if label != -100:
                rows["mlm"].append(-F.log_softmax(s.logits[place], -1)[label])
                p = F.softmax(t.logits[place], -1)
                rows["soft"].append(-(p * F.log_softmax(s.logits[place], -1)).sum())
        for i in range(layers):
            mine, theirs = s.scores(i), t.scores((i + 1) * ratio - 1)
            for head in range(len(mine)):
                for query in range(mine.shape[1]):
                    rows[f"attention.{i}"].append(row_kl(theirs[head, query], mine[head, query]))
    return {name: sum(values) / len(values) for name, values in rows.items()}


def stages(pair=EQUAL, args=""):
    return plans(pair.spec(*use("mobilebert", args=args)))


@pytest.mark.parametrize(("pair", "ratio"), [(EQUAL, 1), (DEEPER, 2)])
def test_every_phase_against_the_definition(pair, ratio):
    weights = {
        "embed": {"emb": 1.0},
        **{f"transfer.{i}": {f"feature.{i}": 2.0, f"attention.{i}": 0.5} for i in range(3)},
        "distil": {"mlm": 0.3, "soft": 0.7},
    }
    found = stages(pair, "alpha = 0.3, feature_weight = 2.0, attention_weight = 0.5")
    assert list(found) == [f"m_mobilebert.{name}" for name in weights]
    for name, terms in weights.items():
        plan = found[f"m_mobilebert.{name}"]
        agree(
            Step(plan, made(plan)),
            batch_of(task="masked_lm"),
            lambda s, t, blocks, batch: oracle(s, t, blocks, batch, ratio),
            {f"m_mobilebert/{term}": weight for term, weight in terms.items()},
        )


def test_in_a_phase_one_layer_trains_on_its_own_terms():
    found = stages()
    for i in range(3):
        plan = found[f"m_mobilebert.transfer.{i}"]
        step = Step(plan, made(plan))
        assert {name.split(".layer.")[1].split(".")[0] for name in step.names} == {str(i)}
        assert [loss.name for loss in plan.losses] == [f"m_mobilebert/feature.{i}", f"m_mobilebert/attention.{i}"]
        assert plan.forward("s/forward").stop_after.index == i + 1, "nothing beyond the layer is computed"
        assert plan.stage.duration == found["m_mobilebert.embed"].stage.duration
    whole = Step(found["m_mobilebert.distil"], made(found["m_mobilebert.distil"]))
    assert {name.split(".layer.")[1].split(".")[0] for name in whole.names if ".layer." in name} == {"0", "1", "2"}


def test_scale_and_shift_of_a_tokens_features_do_not_count():
    plan = stages()["m_mobilebert.transfer.2"]
    models, batch = made(plan), batch_of(task="masked_lm")
    before = Step(plan, models)(batch)[1]["m_mobilebert/feature.2"]
    for name, scale in (("s", 30.0), ("t", 50.0)):
        norm = models[name].bert.encoder.layer[2].output.LayerNorm
        with torch.no_grad():
            norm.weight.mul_(scale)
            norm.bias.mul_(scale).add_(7.0)
    after = Step(plan, models)(batch)[1]["m_mobilebert/feature.2"]
    torch.testing.assert_close(after.detach(), before.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_targets_are_one_cross_entropy(alpha):
    plan = stages(args=f"alpha = {alpha}")["m_mobilebert.distil"]
    models = made(plan)
    if alpha == 1.0:
        models["t"] = made(stages()["m_mobilebert.distil"])["t"]
    batch = batch_of(task="masked_lm")
    total, _ = Step(plan, models)(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    s, t = (models[name](**inputs).logits for name in "st")
    at = batch["labels"] != -100
    onehot = F.one_hot(batch["labels"][at], s.shape[-1]).double()
    close(total, F.cross_entropy(s[at], alpha * onehot + (1 - alpha) * F.softmax(t[at], -1)), "mixture")


def test_a_teacher_whose_depth_does_not_divide_is_refused():
    found = check_text(Pair((4, 24, 4), (3, 24, 4), "masked_lm").spec(*use("mobilebert")), "x.gkd", root=world())
    assert not found.ok


CHAIN = """gkd 1
import "gkd:mobilebert" use mobilebert, mobilebert_teacher, mobilebert_task
teacher t = random_init("mobile", intra_bottleneck_size = 40, use_bottleneck_attention = true,
                        key_query_shared_bottleneck = false, num_feedforward_networks = 1,
                        normalization_type = "layer_norm", hidden_act = "gelu", intermediate_size = 80)
model s = random_init("mobile")
student c = with_head(s, task = classification, num_labels = 3)
data corpus = text("mobile.txt")
data reviews = csv("mobile.csv", text = "text", label = "label")
use mobilebert_teacher(t, source = corpus) as before
use mobilebert(t = t, s = s, source = corpus) as m
use mobilebert_task(c, source = reviews) as after
run before
run m
run after
"""


@pytest.fixture(scope="module")
def chain():
    root = world()
    (root / "mobile").mkdir(exist_ok=True)
    config = {
        "model_type": "mobilebert", "architectures": ["MobileBertForMaskedLM"], "vocab_size": 41, "hidden_size": 20,
        "embedding_size": 8, "intra_bottleneck_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 28, "num_feedforward_networks": 2, "max_position_embeddings": 40,
    }  # fmt: skip
    (root / "mobile" / "config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(36))]
    (root / "mobile" / "vocab.txt").write_text("\n".join(words) + "\n")
    (root / "mobile.txt").write_text("".join(f"w{n} w{n % 9} w{n % 4}\n" for n in range(36)) * 2)
    (root / "mobile.csv").write_text("text,label\n" + "".join(f"w{n % 30} w{n % 7},{n % 3}\n" for n in range(50)))
    checked = check_text(CHAIN, "chain.gkd", root=root)
    assert [d.message for d in (*checked.diagnostics, *checked.later)] == []
    return checked


def test_the_inverted_bottleneck_teaches_the_bottleneck(chain):
    assert (chain.models["t"].info.size("I"), chain.models["s"].info.size("I")) == (40, 12)
    assert chain.models["t"].info.size("H") == chain.models["s"].info.size("H") == 20
    for plan in compile_plan(chain.graph).stages:
        assert plan.projections == ()


def test_all_stages_run_in_order_and_train_what_they_say(chain):
    seen = {}

    class Watch:
        def on_stage(self, record):
            seen[record.stage] = {
                model: {name: value.clone() for name, value in held.state_dict().items()}
                for model, held in run.models.items()
            }

        def on_step(self, record):
            pass

        def on_evaluate(self, record):
            pass

        def close(self):
            pass

    run = Run(plan_of(chain), root=chain.root, listeners=[Watch()])
    result = run.run()
    names = ["before.teach", "m.embed", "m.transfer.0", "m.transfer.1", "m.distil", "after.finetune"]
    assert list(seen) == names

    def changed(model, first, second):
        later = seen[second] if second is not None else {model: result.models[model].state_dict()}
        return {name for name, value in seen[first][model].items() if not torch.equal(value, later[model][name])}

    assert changed("t", "before.teach", "m.embed"), "the teacher is trained first"
    assert not changed("t", "m.embed", "m.distil"), "and never again"
    embedded = changed("s", "m.embed", "m.transfer.0")
    # The head's decoder is the embedding table.
    assert embedded
    assert all("embeddings" in name or "decoder" in name for name in embedded)
    for i in range(2):
        after = "m.transfer.1" if i == 0 else "m.distil"
        layer = changed("s", f"m.transfer.{i}", after)
        assert layer
        assert all(name.startswith(f"mobilebert.encoder.layer.{i}.") for name in layer)
    body = seen["after.finetune"]
    assert all(
        torch.equal(body["c"][name], value) for name, value in body["s"].items() if name.startswith("mobilebert.")
    )
    assert changed("c", "after.finetune", None)
