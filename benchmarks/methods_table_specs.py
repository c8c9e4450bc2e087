"""Specs of the methods table: every method from one template a kind, with equal stages.

A method's own file is copied beside the spec with its stages made equal to everyone's: their lengths share out one
number of steps in the proportion of the file, and their optimiser, batch and seed are the common ones. Nothing else
of it is changed, and every weight has the default of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gkd_dsl
from gkd_dsl import library
from gkd_dsl.library import MethodInfo
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source

LAYERS = (1, 3, 5)
"""The student's blocks, of the encoder's six."""
MIDDLE = (0, 2, 3, 5)
"""Those of an assistant and of the small teacher."""
UPPER = (0, 1, 2, 3, 5)
"""Those of a second assistant, before it."""
BASELINE = "no teacher"
OWN = ("seed", "batch_size", "optim", "max_length", "accumulate")
"""Settings of a stage that are the same for all."""


@dataclass(frozen=True)
class Settings:
    """What all methods share. `steps` are the student's optimiser steps, over all stages; `data` is a digest."""

    encoder: str
    steps: int
    teacher_steps: int
    batch_size: int
    max_length: int
    lr: float
    teacher_lr: float
    warmup: int = 10
    device: str = "cpu"
    data: str = ""

    def key(self) -> str:
        """The settings that a result depends on, but for the place of the encoder."""
        return json.dumps({**asdict(self), "encoder": ""}, sort_keys=True)


@dataclass(frozen=True)
class Stage:
    """A stage of a made spec: whether it trains the student, and whether it is the plain fine-tuning put behind."""

    name: str
    steps: int
    student: bool
    plain: bool = False


@dataclass(frozen=True)
class Made:
    """A spec in its folder."""

    path: Path
    stages: tuple[Stage, ...]


# What the header of a file cannot say: arguments by name in place of the usual models.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {"dgkd": {"chain": "[t, upper, middle]"}}
BEFORE: Mapping[str, tuple[str, str]] = {"pd": ("pd_pretrain", "lm")}
"""What is run first of the same file, and on which models: it trains the student as a language model."""
AFTER: Mapping[str, tuple[str, str]] = {"glmd": ("glmd_task", "t = c, s = s"), "mobilebert": ("mobilebert_task", "s")}
"""What is run last of the same file."""
PLAIN = ("after.finetune", "finetune", "plain")
"""Stages that are plain fine-tuning."""
WHOLE: Mapping[str, str] = {"theseus": "train s.layer"}
"""Lines left out, since they need a student that starts with its teacher's own head."""


def names(wanted: Sequence[str] | None = None) -> list[str]:
    """The methods to run, the library's unless given. Raises SystemExit for a name that is not there."""
    there = library.names()
    if unknown := [name for name in wanted or () if name not in (*there, BASELINE)]:
        raise SystemExit(f"there is no method {', '.join(unknown)}; methods: {', '.join(there)}")
    return list(wanted or there)


def is_language_model(info: MethodInfo) -> bool:
    """Whether a method distils language models; its student is fine-tuned afterwards."""
    return info.needs.removeprefix("masked ").startswith("language models")


def models(settings: Settings, info: MethodInfo | None, seed: int, root: str) -> tuple[list[str], dict[str, str]]:
    """The model declarations of a method's spec, and what its formals are given."""
    place = f"{root}/models/{seed}"
    language = info is not None and is_language_model(info)
    spoken = language or (info is not None and info.name in BEFORE)
    base = f'model base = hf("{place if spoken else f"{root}/models"}/start")'
    cut = f"student s = truncated(base, layers = {list(LAYERS)}, num_labels = 2)"
    if info is None:
        return [base, cut], {}
    own = ARGUMENTS.get(info.name, {})
    given: dict[str, str] = {}
    lines = [base]
    if spoken:
        lines.append(f"student lm = truncated(base, layers = {list(LAYERS)})")
        lines.append("student s = with_head(lm, task = classification, num_labels = 2)")
    else:
        lines.append(cut)
    teachers = {"t": "language", "c": "teacher"} if language else {"t": "teacher", "u": "second", "v": "small"}
    for role, name in info.roles:
        if name in own:
            given[name] = own[name]
        elif role == "student":
            given[name] = "lm" if language else "s"
        elif role == "model":
            given[name] = "[t, middle]" if "assistants" in info.teachers else "middle"
    roles = [name for role, name in info.roles if role == "teacher" and name not in own]
    if len(roles) == 1 and info.teachers.strip() != "1":
        given[roles[0]] = "[v, t]" if "small to large" in info.teachers else "[t, u]"
    else:
        given |= dict(zip(roles, teachers, strict=False))
    run_after = AFTER[info.name][1] if info.name in AFTER else ""
    used = f"{' '.join(given.values())} {run_after}".replace("[", " ").replace("]", " ").replace(",", " ").split()
    for name, layers in (("middle", MIDDLE), ("upper", UPPER)):
        if name in used:
            lines.append(f"model {name} = truncated(base, layers = {list(layers)}, num_labels = 2)")
    lines += [f'teacher {name} = hf("{place}/{what}")' for name, what in teachers.items() if name in used]
    return lines, given


def teachers_of(settings: Settings, name: str) -> list[str]:
    """The trained teachers that a method's spec reads."""
    lines, _ = models(settings, library.describe(name), 0, "")
    found = [line.split('"')[1].rpartition("/")[2] for line in lines if line.startswith("teacher ")]
    # The start of a student that is a language model is made with that teacher.
    return list(dict.fromkeys([*found, *(["language"] if any("/0/start" in line for line in lines) else [])]))


def header(settings: Settings, about: str, root: str) -> list[str]:
    """The first lines of a spec, and its data."""
    return [
        "gkd 1",
        f"# {about}",
        f"data rows = {rows(settings, root)}",
        f"runtime {{ device = {settings.device} }}",
    ]


def rows(settings: Settings, root: str) -> str:
    """The source: tab-separated sentences with labels 0 and 1, held-out rows in a file of their own."""
    return (
        f'csv("{root}/data/train.tsv", delimiter = "\\t", quoting = false, text = "text", label = "label", '
        f'held_out = "{root}/data/held_out.tsv", max_length = {settings.max_length}, workers = 1)'
    )


def common(settings: Settings, seed: int, lr: float) -> list[str]:
    """The settings that every stage has."""
    optim = f"adamw(lr = {lr!r}, warmup = {settings.warmup}%)"
    return [f"seed = {seed}", f"batch_size = {settings.batch_size}", f"optim = {optim}"]


def stage(name: str, steps: int, objective: str, settings: Settings, seed: int, *, trains: str = "", lr: float) -> str:
    """A stage of ours."""
    inner = ([f"train {trains}"] if trains else []) + [f"minimize {objective}", *common(settings, seed, lr)]
    return f"stage {name} for {counted(steps)} {{\n  " + "\n  ".join(inner) + "\n}"


def counted(steps: int) -> str:
    """A duration as the language writes it."""
    return f"{steps} step{'s' if steps != 1 else ''}"


def baseline(settings: Settings, seed: int, folder: Path, root: str = "../..") -> Made:
    """The student without a teacher."""
    lines = header(settings, "The student without a teacher.", root) + models(settings, None, seed, root)[0]
    lines += ["", "loss hard = cross_entropy(s.logits, batch.labels)", ""]
    lines.append(stage("plain", settings.steps, "hard", settings, seed, lr=settings.lr))
    return Made(_write(folder / "spec.gkd", lines), (Stage("plain", settings.steps, True, True),))


def teacher(settings: Settings, what: str, seed: int, folder: Path, root: str = "../..") -> Path:
    """The spec that trains a teacher: `teacher`, `second` (another seed), `small` (four blocks), `language`."""
    seed += {"teacher": 0, "second": 1000, "small": 2000, "language": 3000}[what]
    lines = header(settings, f"A teacher: {what}.", root)
    if what == "language":
        lines.append(f'student t = hf("{settings.encoder}", task = masked_lm)')
    elif what == "small":
        lines.append(f'model base = hf("{settings.encoder}", num_labels = 2)')
        lines.append(f"student t = truncated(base, layers = {list(MIDDLE)}, num_labels = 2)")
    else:
        lines.append(f'student t = hf("{settings.encoder}", num_labels = 2)')
    lines += ["", "loss learn = cross_entropy(t.logits, batch.labels)", ""]
    lines.append(stage("teach", settings.teacher_steps, "learn", settings, seed, lr=settings.teacher_lr))
    return _write(folder / "spec.gkd", lines)


def method(
    settings: Settings,
    name: str,
    seed: int,
    folder: Path,
    root: str = "../..",
    *,
    each: int | None = None,
    weights: str = "",
) -> Made:
    """The spec of a method and, beside it, the method's file with equal stages.

    With `each`, every stage has so many steps, and no fine-tuning follows. `weights` are further arguments, as the
    language writes them. Raises SpecError where it does not check.
    """
    info = library.describe(name)
    declared, given = models(settings, info, seed, root)
    arguments = ", ".join(
        [*(f"{formal} = {value}" for formal, value in given.items()), *([weights] if weights else [])]
    )
    used = [name, *(chosen[name][0] for chosen in (BEFORE, AFTER) if name in chosen)]
    lines = [*header(settings, f"{info.title}.", root), f'import "./{name}.gkd" use {", ".join(used)}', *declared, ""]
    if name in BEFORE:
        lines += [f"use {BEFORE[name][0]}({BEFORE[name][1]}) as before", "run before"]
    lines += [f"use {name}({arguments}) as m", "run m"]
    if name in AFTER:
        lines += [f"use {AFTER[name][0]}({AFTER[name][1]}) as after", "run after"]
    students = {"s", "lm"}
    # First with one step a stage, to see which stages there are and whom they train.
    folder.mkdir(parents=True, exist_ok=True)
    text = library.method_text(name)
    if name in WHOLE:
        text = text.replace(WHOLE[name], "")
    (folder / f"{name}.gkd").write_text(equal(text, used, {}, settings, seed), encoding="utf-8")
    plan = gkd_dsl.loads("\n".join(lines) + "\n", name="spec.gkd", root=folder).plan()
    trains = {
        found.name: any(target.name in students for target in found.stage.trains if target.kind == "model")
        for found in plan.stages
    }
    # Whether its own stages, or those put behind it, end on the task.
    labelled = name in AFTER or (not is_language_model(info) and info.labelled)
    lengths = shared_out(text, used, trains, settings.steps if labelled else settings.steps - settings.steps // 2)
    lengths = lengths if each is None else dict.fromkeys(lengths, each)
    (folder / f"{name}.gkd").write_text(equal(text, used, lengths, settings, seed), encoding="utf-8")
    stages = [Stage(key, lengths[_family(key)], trained, key in PLAIN) for key, trained in trains.items()]
    if not labelled and each is None:
        steps = settings.steps - sum(each.steps for each in stages if each.student)
        lines += ["", "# Then as the student without a teacher.", "loss hard = cross_entropy(s.logits, batch.labels)"]
        lines.append(stage("finetune", steps, "hard", settings, seed, lr=settings.lr))
        stages.append(Stage("finetune", steps, True, plain=True))
    return Made(_write(folder / "spec.gkd", lines), tuple(stages))


def _family(name: str) -> str:
    """The stage of the file that a stage of the plan is: `m.transfer.2` is one of `transfer`."""
    return name.split(".")[1]


def shared_out(text: str, used: Sequence[str], trains: Mapping[str, bool], steps: int) -> dict[str, int]:
    """Steps of one stage of each kind in the file.

    The stages that train the student share out `steps` in the proportion of the durations in the file; those that
    train others first, which the student does not profit from directly, share out as many again.
    """
    declared = {item.name.text: item for item in _stages(text, used)}
    spans = {key: item.duration for key, item in declared.items() if item.duration is not None}
    units = {span.unit for span in spans.values()}
    found: dict[str, int] = {}
    for student in (True, False):
        keys = [_family(key) for key, trained in trains.items() if trained == student]
        parts = {key: (spans[key].value if len(units) == 1 else 1.0) for key in keys}
        whole = sum(parts[key] for key in keys)
        left = steps
        for key in dict.fromkeys(keys):
            found[key] = max(1, int(steps * parts[key] / whole))
            left -= found[key] * keys.count(key)
        # What rounding leaves goes to the last stage of its own.
        single = [key for key in keys if keys.count(key) == 1]
        if single and left > 0:
            found[single[-1]] += left
    return found


def equal(text: str, used: Sequence[str], lengths: Mapping[str, int], settings: Settings, seed: int) -> str:
    """The text of a method's file with other lengths (one step unless given) and the common settings.

    `used` are the methods of the file whose stages are run.
    """
    edits: list[tuple[int, int, str]] = []
    for item in _stages(text, used):
        if item.duration is None:
            continue
        edits.append((item.duration.span.start, item.duration.span.end, counted(lengths.get(item.name.text, 1))))
        for stmt in item.body:
            if isinstance(stmt, ast.Setting) and stmt.name.text in OWN:
                edits.append((stmt.span.start, stmt.span.end, ""))
        end = item.span.end - 1
        assert text[end] == "}", f"the block of stage {item.name.text} ends in {text[end]!r}"
        inner = "".join(f"  {line}\n  " for line in common(settings, seed, settings.lr))
        edits.append((end, end, inner))
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return "\n".join(line for line in text.splitlines() if line.strip() or not line) + "\n"


def _stages(text: str, used: Sequence[str]) -> list[ast.Stage]:
    file, _ = parse(Source("method.gkd", text))
    methods = [item for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text in used]
    return [item for method in methods for item in method.body if isinstance(item, ast.Stage)]


def _write(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
