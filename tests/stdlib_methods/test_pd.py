"""PD (arXiv 1908.08962): soft labels alone, the labels after them, and a body that was a language model before."""

import pytest
import torch
import torch.nn.functional as F
from method_world import Pair, Step, agree, batch_of, close, folder, made, plans, row_kl, use, world

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.session import plan_of, run_spec
from gkd_dsl.runtime.stages import Run


def oracle(T):
    def terms(students, teachers, _blocks, _batch):
        entropy = [-(F.softmax(t.logits / T, -1) * F.log_softmax(t.logits / T, -1)).sum() for t in teachers]
        soft = sum(h + row_kl(t.logits / T, s.logits / T) for h, s, t in zip(entropy, students, teachers, strict=True))
        return {"soft": T * T * soft / len(students)}

    return terms


def step_of(stage="task", args="", **options):
    plan = plans(Pair().spec(*use("pd", args=args)))[f"m_pd.{stage}"]
    return Step(plan, made(plan, **options))


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_the_soft_stage_is_one_term(T):
    agree(step_of("task", f"T = {T}"), batch_of(), oracle(T), {"m_pd/soft": 1.0})


def test_fine_tuning_is_cross_entropy():
    step, batch = step_of("finetune"), batch_of()
    logits = step.models["s"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    close(step(batch)[0], F.cross_entropy(logits, batch["labels"]), "hard")


def test_a_teacher_that_is_certain_makes_it_cross_entropy():
    step, batch = step_of(), batch_of()
    with torch.no_grad():
        classifier = step.models["t"].classifier
        classifier.weight.zero_()
        classifier.bias.copy_(torch.tensor([0.0, 500.0, 0.0]))
    logits = step.models["s"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    close(step(batch)[0], F.cross_entropy(logits, torch.full((len(logits),), 1)), "one-hot")


def test_its_least_value_is_the_entropy_of_the_teacher():
    plan = plans(Pair(student=(4, 24, 4)).spec(*use("pd")))["m_pd.task"]
    models = made(plan)
    models["s"].load_state_dict(models["t"].state_dict())
    step, batch = Step(plan, models), batch_of()
    logits = models["t"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, _ = step(batch)
    close(total, torch.distributions.Categorical(logits=logits).entropy().mean(), "entropy")
    for gradient in step.gradients(total):
        assert gradient is None or gradient.abs().max() < 1e-10


def test_the_first_stage_reads_no_labels_and_the_second_no_teacher():
    stages = plans(Pair().spec(*use("pd")))
    assert "labels" not in stages["m_pd.task"].columns
    assert [node.name for node in stages["m_pd.finetune"].models] == ["s"]


CHAIN = """gkd 1
import "gkd:pd" use pd, pd_pretrain
teacher t = random_init("{t}")
model lm = random_init("{lm}")
student s = with_head(lm, num_labels = 3)
data corpus = text("corpus.txt")
data reviews = csv("reviews.csv", text = "text", label = "label")
use pd_pretrain(lm, source = corpus) as before
use pd(t -> s, source = reviews) as m
run before
run m
"""


@pytest.fixture
def chain():
    root = world()
    (root / "corpus.txt").write_text("".join(f"w{n} w{n + 1} w{n + 2}\n" for n in range(40)))
    (root / "reviews.csv").write_text("text,label\n" + "".join(f"w{n % 30} w{n % 7},{n % 3}\n" for n in range(50)))
    text = CHAIN.format(t=folder("classification", 4, 24, 4, 0.0), lm=folder("masked_lm", 2, 16, 4, 0.0))
    checked = check_text(text, "chain.gkd", root=root)
    assert [d.message for d in (*checked.diagnostics, *checked.later)] == []
    return checked


def test_the_chain_has_the_papers_order_and_data(chain):
    stages = compile_plan(chain.graph).stages
    assert [stage.name for stage in stages] == ["before.pretrain", "m.task", "m.finetune"]
    assert [stage.stage.source.name for stage in stages] == ["corpus", "reviews", "reviews"]
    assert [[node.name for node in stage.models] for stage in stages] == [["lm"], ["s", "t"], ["s"]]
    assert [("labels" in stage.columns) for stage in stages] == [True, False, True]


def test_what_was_pretrained_is_what_is_distilled(chain):
    held = {}

    class Watch:
        run = None

        def on_stage(self, record):
            if record.stage == "m.task":
                lm, s = (held["models"][name].base_model.state_dict() for name in ("lm", "s"))
                held["same"] = all(torch.equal(s[name], value) for name, value in lm.items())

        def on_step(self, record):
            pass

        def on_evaluate(self, record):
            pass

        def close(self):
            pass

    run = Run(plan_of(chain), root=chain.root, listeners=[Watch()])
    held["models"] = run.models
    before = {name: value.clone() for name, value in run.model("lm").state_dict().items()}
    result = run.run()
    assert held["same"]
    assert any(not torch.equal(result.models["lm"].state_dict()[name], value) for name, value in before.items())


def test_the_export_is_the_classifier(chain, tmp_path):
    outcome = run_spec(chain, name="chain", out=tmp_path / "run", measure=False)
    assert list(outcome.exports) == ["s"]
