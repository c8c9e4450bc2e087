"""One step of distillation, written for each tool: the same models, batch, losses and optimiser.

Each contestant owns copies of teacher, student and projections, and has

    loss()   the loss of the batch, with its graph
    step()   a whole training step: forwards, loss, backward, optimiser
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

TEMPERATURE = 4.0
RATE = 1e-5


@dataclass(frozen=True)
class Task:
    """What is distilled.

    pairs    student and teacher positions in the residual stream (0: the embeddings) that an MSE compares,
             the student's through a projection of its own
    maps     pairs of student and teacher layers (from 0) whose attention maps an MSE compares
    what     which maps: `scores` (before the softmax) or `probs`
    logits   whether KL at T = 4 on the logits is part of it
    """

    pairs: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int], ...] = ()
    what: str = "probs"
    logits: bool = True


@dataclass
class Setup:
    """Seeded models with dropout off, projections, and one batch without padding."""

    teacher: BertForSequenceClassification
    student: BertForSequenceClassification
    projections: nn.ModuleList
    batch: dict[str, Tensor]
    task: Task

    def copies(self, attention: str | None = None) -> tuple[Any, Any, nn.ModuleList]:
        """Teacher, student and projections for one contestant."""
        teacher, student = copy.deepcopy(self.teacher), copy.deepcopy(self.student)
        if attention is not None:
            teacher.set_attn_implementation(attention)
            student.set_attn_implementation(attention)
        teacher.eval().requires_grad_(False)
        return teacher, student.train(), copy.deepcopy(self.projections)


def config(layers: int, hidden: int, heads: int, inner: int, vocabulary: int = 30522) -> BertConfig:
    made = BertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=inner,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    made.architectures = ["BertForSequenceClassification"]
    return made


def setup(task: Task, *, small: bool = False, seed: int = 0, rows: int = 16, length: int = 128) -> Setup:
    """BERT-base (12 x 768) and a 4 x 312 student with 12 heads; `small`: the same shape in miniature."""
    torch.manual_seed(seed)
    if small:
        teacher, student, vocabulary = config(12, 48, 12, 64, 100), config(4, 24, 12, 32, 100), 100
        rows, length = min(rows, 4), min(length, 16)
    else:
        teacher, student, vocabulary = config(12, 768, 12, 3072), config(4, 312, 12, 1200), 30522
    models = BertForSequenceClassification(teacher), BertForSequenceClassification(student)
    # Random weights give nearly equal logits and flat attention; wider ones make each term count.
    for model in models:
        nn.init.normal_(model.classifier.weight, std=1.0)
        for layer in model.bert.encoder.layer:
            nn.init.normal_(layer.attention.self.query.weight, std=0.15)
            nn.init.normal_(layer.attention.self.key.weight, std=0.15)
    projections = nn.ModuleList(nn.Linear(student.hidden_size, teacher.hidden_size) for _ in task.pairs)
    batch = {
        "input_ids": torch.randint(5, vocabulary, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(rows, length, dtype=torch.int64),
    }
    return Setup(*models, projections, batch, task)


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    """KL at the temperature, times its square, mean over rows."""
    T = TEMPERATURE
    return F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="batchmean") * T**2


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=RATE)


class Contestant:
    name = ""
    note = ""
    optimizer: torch.optim.Optimizer

    def loss(self) -> Tensor:
        raise AssertionError

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Those of the student by name; what the equality of the losses is checked with."""
        self.optimizer.zero_grad()
        self.loss().backward()
        found = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
        self.optimizer.zero_grad()
        return found


class Bare(Contestant):
    """Teacher forward, student forward and backward, optimiser; no distillation. The sum that nothing can undercut."""

    name = "bare sum"

    def __init__(self, made: Setup, attention: str | None = None) -> None:
        self.teacher, self.student, _ = made.copies(attention)
        self.batch, self.optimizer = made.batch, adamw(self.student)

    def loss(self) -> Tensor:
        with torch.no_grad():
            self.teacher(**self.batch)
        return self.student(**self.batch).logits.square().mean()


class Hooks(Contestant):
    """A loop by hand: forward hooks that stay on, F.mse_loss, F.kl_div. Scores come from hooks on query and key."""

    name = "hand-placed hooks"

    def __init__(self, made: Setup, attention: str | None = None, layers: int | None = None) -> None:
        self.teacher, self.student, self.projections = made.copies(attention)
        if layers is not None:
            self.teacher.bert.encoder.layer = self.teacher.bert.encoder.layer[:layers]
        self.batch, self.task = made.batch, made.task
        self.optimizer = adamw(self.student, self.projections)
        self.seen: dict[Any, Any] = {}
        for side, model in ((0, self.student), (1, self.teacher)):
            for place in {pair[side] for pair in self.task.pairs}:
                module = model.bert.embeddings if place == 0 else model.bert.encoder.layer[place - 1]
                self._keep(module, (side, "hidden", place))
            for place in {pair[side] for pair in self.task.maps}:
                inner = model.bert.encoder.layer[place].attention.self
                if self.task.what == "probs":
                    self._keep(inner, (side, "attention", place))
                else:
                    self._keep(inner.query, (side, "query", place))
                    self._keep(inner.key, (side, "key", place))

    def _keep(self, module: nn.Module, key: tuple[int, str, int]) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.seen[key] = output

        module.register_forward_hook(hook)

    def _hidden(self, side: int, place: int) -> Tensor:
        value = self.seen[side, "hidden", place]
        return value if isinstance(value, Tensor) else value[0]

    def _map(self, side: int, place: int) -> Tensor:
        if self.task.what == "probs":
            return self.seen[side, "attention", place][1]
        heads = (self.student if side == 0 else self.teacher).config.num_attention_heads
        q, k = (self.seen[side, what, place].unflatten(-1, (heads, -1)).transpose(1, 2) for what in ("query", "key"))
        return (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5

    def loss(self) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(**self.batch) if self.task.logits else self.teacher.bert(**self.batch)
            maps = [self._map(1, j) for _, j in self.task.maps]
        student = self.student(**self.batch)
        total = kd(student.logits, teacher.logits) if self.task.logits else torch.zeros(())
        for (i, j), projection in zip(self.task.pairs, self.projections, strict=True):
            total = total + F.mse_loss(projection(self._hidden(0, i)), self._hidden(1, j))
        for (i, _), target in zip(self.task.maps, maps, strict=True):
            total = total + F.mse_loss(self._map(0, i), target)
        self.seen.clear()
        return total


class Outputs(Contestant):
    """A loop by hand on `output_hidden_states=True` (and `output_attentions=True`, which needs eager attention)."""

    name = "output_hidden_states"

    def __init__(self, made: Setup, attention: str | None = None) -> None:
        self.teacher, self.student, self.projections = made.copies(attention)
        self.batch, self.task = made.batch, made.task
        self.optimizer = adamw(self.student, self.projections)
        self.asked = {"output_hidden_states": True} | ({"output_attentions": True} if made.task.maps else {})

    def loss(self) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(**self.batch, **self.asked)
        student = self.student(**self.batch, **self.asked)
        total = kd(student.logits, teacher.logits) if self.task.logits else torch.zeros(())
        for (i, j), projection in zip(self.task.pairs, self.projections, strict=True):
            total = total + F.mse_loss(projection(student.hidden_states[i]), teacher.hidden_states[j])
        for i, j in self.task.maps:
            total = total + F.mse_loss(student.attentions[i], teacher.attentions[j])
        return total


class TextBrewer(Contestant):
    """TextBrewer's GeneralDistiller: its train_on_batch and write_loss, in the order of its own loop.

    Its soft loss is a cross-entropy: more than the KL by the teacher's entropy, with the same gradient.
    """

    name = "TextBrewer"

    def __init__(self, made: Setup, attention: str | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import textbrewer

        self.teacher, self.student, self.projections = made.copies(attention)
        self.batch, task = made.batch, made.task
        sizes = [self.student.config.hidden_size, self.teacher.config.hidden_size]
        matches: list[dict[str, Any]] = [
            {
                "layer_S": i,
                "layer_T": j,
                "feature": "hidden",
                "loss": "hidden_mse",
                "weight": 1,
                "proj": ["linear", *sizes],
            }
            for i, j in task.pairs
        ] + [
            {"layer_S": i, "layer_T": j, "feature": "attention", "loss": "attention_mse", "weight": 1}
            for i, j in task.maps
        ]

        def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
            found = {"hidden": outputs.hidden_states}
            if task.logits:
                found["logits"] = outputs.logits
            if task.maps:
                found["attention"] = outputs.attentions
            return found

        self.distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(device="cpu", output_dir=tempfile.mkdtemp()),
            textbrewer.DistillationConfig(
                temperature=TEMPERATURE, kd_loss_weight=TEMPERATURE**2, intermediate_matches=matches
            ),
            self.teacher,
            self.student,
            adaptor,
            adaptor,
        )
        for ours, theirs in zip(self.projections, [p for p in self.distiller.projs if p is not None], strict=True):
            theirs.load_state_dict(ours.state_dict())
        self.optimizer = adamw(self.student)
        self.distiller.initialize_training(self.optimizer, None, None, None)
        self.asked = {"output_hidden_states": True} | ({"output_attentions": True} if task.maps else {})

    def loss(self) -> Tensor:
        return self.distiller.train_on_batch(self.batch, self.asked)[0]

    def constant(self) -> float:
        """What its loss has more than the others': T^2 times the teacher's entropy."""
        with torch.no_grad():
            log_p = F.log_softmax(self.teacher(**self.batch).logits / TEMPERATURE, -1)
        return float(-(log_p.exp() * log_p).sum(-1).mean()) * TEMPERATURE**2

    def step(self) -> None:
        total, terms = self.distiller.train_on_batch(self.batch, self.asked)
        self.distiller.write_loss(total, 0, terms)
        total /= self.distiller.t_config.gradient_accumulation_steps
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class ModelOpt(Contestant):
    """ModelOpt's mtd.convert with pairs of module names; projections inside the criteria, losses summed."""

    name = "ModelOpt"

    def __init__(self, made: Setup, attention: str | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.distill as mtd
            from torch.nn.modules.loss import _Loss

        class Hidden(_Loss):
            def __init__(self, projection: nn.Module) -> None:
                super().__init__()
                self.projection = projection

            def forward(self, student: Any, teacher: Any) -> Tensor:
                s, t = (v if isinstance(v, Tensor) else v[0] for v in (student, teacher))
                return F.mse_loss(self.projection(s), t)

        class Maps(_Loss):
            def forward(self, student: Any, teacher: Any) -> Tensor:
                return F.mse_loss(student[1], teacher[1])

        class Sum(mtd.DistillationLossBalancer):
            def forward(self, losses: dict[str, Tensor]) -> Tensor:
                return sum(losses.values())  # type: ignore[return-value]

        teacher, student, projections = made.copies(attention)
        task, criterion = made.task, {}
        if task.logits:
            criterion["classifier", "classifier"] = mtd.LogitsDistillationLoss(TEMPERATURE, reduction="batchmean")
        for (i, j), projection in zip(task.pairs, projections, strict=True):
            names = tuple("bert.embeddings" if n == 0 else f"bert.encoder.layer.{n - 1}" for n in (i, j))
            criterion[names] = Hidden(projection)
        for i, j in task.maps:
            criterion[f"bert.encoder.layer.{i}.attention.self", f"bert.encoder.layer.{j}.attention.self"] = Maps()
        mode = ("kd_loss", {"teacher_model": teacher, "criterion": criterion, "loss_balancer": Sum()})
        self.student = mtd.convert(student, mode=[mode])
        self.student.train()  # its train() gives back None
        self.teacher = teacher
        self.batch = made.batch
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)

    def loss(self) -> Tensor:
        self.student(**self.batch)
        return self.student.compute_kd_loss()


def spec_text(task: Task) -> str:
    """The spec of a task."""
    lines = [
        "gkd 1",
        "",
        'teacher t = random_init("teacher")',
        'student s = random_init("student")',
        'data rows = csv("rows.csv", text = "text", label = "label")',
        "",
    ]
    terms = []
    if task.logits:
        lines.append(f"loss soft = kl(s.logits <- t.logits, temperature = {TEMPERATURE})")
        terms.append("soft")
    for n, (i, j) in enumerate(task.pairs):
        lines.append(f"project W_{n} = linear(s.H -> t.H)")
        lines.append(f"loss hid_{n} = mse(s.hidden[{i}] |> W_{n} <- t.hidden[{j}])")
        terms.append(f"hid_{n}")
    for n, (i, j) in enumerate(task.maps):
        lines.append(f"loss map_{n} = mse(s.layer[{i}].attn.{task.what} <- t.layer[{j}].attn.{task.what})")
        terms.append(f"map_{n}")
    lines += [
        "",
        "stage main for 1000 steps {",
        "  source = rows",
        "  batch_size = 16",
        f"  minimize {' + '.join(terms)}",
        f"  optim = adamw(lr = {RATE})",
        "}",
        "",
    ]
    return "\n".join(lines)


class Ours(Contestant):
    """A spec, checked and compiled; `loss = distiller(batch)` in a loop of one's own."""

    name = "gkd-dsl"

    def __init__(self, made: Setup, *, whole_teacher: bool = False, optimise: bool = True) -> None:
        from gkd_dsl.graph.passes import compile_plan
        from gkd_dsl.meaning.check import check_path
        from gkd_dsl.runtime.distiller import Distiller

        self.teacher, self.student, self.projections = made.copies()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.teacher.config.save_pretrained(folder / "teacher")
            self.student.config.save_pretrained(folder / "student")
            (folder / "rows.csv").write_text("text,label\na,0\nb,1\n")
            (folder / "spec.gkd").write_text(spec_text(made.task))
            checked = check_path(folder / "spec.gkd")
            assert checked.ok, [str(d.message) for d in checked.diagnostics]
            plan = compile_plan(checked.graph, optimise=optimise).stages[0]
        if whole_teacher:
            plan = replace(plan, forwards=tuple(replace(f, stop_after=None) for f in plan.forwards))
        self.plan = plan
        blocks = {f"W_{n}": block for n, block in enumerate(self.projections)}
        self.distiller = Distiller(plan, {"t": self.teacher, "s": self.student}, blocks)
        self.batch = made.batch
        self.optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=RATE)
        self.done = 0

    def loss(self) -> Tensor:
        self.distiller.step_to(self.done, 1000)
        return self.distiller(self.batch)

    def step(self) -> None:
        super().step()
        self.done += 1


def agree(contestants: dict[str, Contestant], reference: str, tolerance: float) -> list[dict[str, Any]]:
    """Assert that all give the loss and the student's gradient of `reference`; the differences found.

    Loss: relative difference. Gradient: norm of the difference over the norm.
    """
    with_hooks = contestants[reference]
    expected, gradient = with_hooks.loss().item(), with_hooks.gradients()
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    rows = []
    for name, contestant in contestants.items():
        if isinstance(contestant, Bare):
            continue
        value = contestant.loss().item()
        if (
            isinstance(contestant, TextBrewer)
            and contestant.distiller.d_config.kd_loss_weight
            and with_hooks.task.logits
        ):  # type: ignore[attr-defined]
            value -= contestant.constant()
        found = contestant.gradients()
        missing = set(gradient) - set(found)
        assert not missing, f"{name} has no gradient for {sorted(missing)[:3]}"
        apart = torch.stack([(found[key] - gradient[key]).norm() for key in gradient]).norm() / norm
        rows.append(
            {
                "name": name,
                "loss": value,
                "loss_difference": abs(value - expected) / abs(expected),
                "gradient_difference": float(apart),
            }
        )
        assert rows[-1]["loss_difference"] <= tolerance, f"{name}: loss {value}, {reference} has {expected}"
        assert rows[-1]["gradient_difference"] <= 10 * tolerance, f"{name}: gradient is {float(apart):.2e} away"
    return rows
