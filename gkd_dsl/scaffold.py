"""`gkd init`: a spec for a method, two or more models and a file of rows, that checks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap

from gkd_dsl.diagnostics import Diagnostics
from gkd_dsl.library import MethodInfo, MethodParam, describe
from gkd_dsl.meaning.check import Checked, check_text
from gkd_dsl.models import describe as models
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import ModelInfo, Task
from gkd_dsl.places import expanded, is_dir
from gkd_dsl.scaffold_data import Found, InitError, found_in, kind_of
from gkd_dsl.scaffold_stages import readers, same_stages, written_out
from gkd_dsl.usage import Declared, call_of, members, model_names

_WIDTH = 110
_METRICS = {
    "classification": (
        ("accuracy", "accuracy(s.logits, batch.labels)", "the share of held-out rows that the student gets right"),
        ("agreement", "agreement(s.logits <- t.logits)", "the share where it answers as the teacher does"),
    ),
    "masked_lm": (
        ("perplexity", "perplexity(cross_entropy(s.logits, batch.labels))", "of the student on held-out rows"),
    ),
    "causal_lm": (
        ("perplexity", "perplexity(cross_entropy(s.logits, batch.labels))", "of the student on held-out rows"),
    ),
    "encoder": (
        ("similarity", "similarity_spearman(pool(s.final) <- pool(t.final))", "whether texts lie as for the teacher"),
    ),
}


@dataclass(frozen=True)
class Request:
    """What a spec is asked for. Places of models are as given; `num_labels` is for a teacher without a classifier."""

    method: str
    teachers: tuple[str, ...]
    student: str | None = None
    models: tuple[str, ...] = ()
    data: Path | None = None
    text: str | None = None
    label: str | None = None
    num_labels: int | None = None
    offline: bool = True


@dataclass(frozen=True)
class Draft:
    """A text and what the checker says of it."""

    text: str
    checked: Checked

    @property
    def ok(self) -> bool:
        """Whether the spec may be run."""
        return self.checked.ok and not len(self.checked.later)

    @property
    def diagnostics(self) -> Diagnostics:
        """What was found, with what this version does not run."""
        for diagnostic in self.checked.later:
            self.checked.diagnostics.add(diagnostic)
        return self.checked.diagnostics


@dataclass(frozen=True)
class _Model:
    """A model to declare: its place as it is written from the folder of the spec, and its config."""

    role: str
    name: str
    place: str
    info: ModelInfo


def draft(request: Request, out: Path) -> Draft:
    """The first spec that checks, of those that the models and the rows suggest; else the likeliest, with its errors.

    Raises KeyError for a method that is not in the library, and InitError for models or rows that cannot be read.
    """
    info = describe(request.method)
    root = out.resolve().parent
    held = _models(info, request, root)
    first: Draft | None = None
    for task in _tasks(info, request, held[0].info):
        rows = _rows(info, request, task)
        for metrics, explicit in ((True, True), (False, True), (False, False)):
            found = _draft(_Writer(info, request, held, task, rows, root), out, metrics=metrics, explicit=explicit)
            if found is not None and found.ok:
                return found
            if not explicit:
                first = first or found
    assert first is not None
    return first


def _draft(writer: _Writer, out: Path, *, metrics: bool, explicit: bool) -> Draft | None:
    """A draft, or None where the stages of the method cannot be written out."""
    text = writer.text(metrics=metrics, explicit=explicit)
    if text is None:
        return None
    found = writer.checked(text, out)
    if explicit and found.ok:
        bare, plain = (writer.text(metrics=False, explicit=written) for written in (True, False))
        assert bare is not None
        assert plain is not None
        one, two = writer.checked(bare, out), writer.checked(plain, out)
        if not one.ok or not two.ok or not same_stages(one.checked, two.checked):
            return None
    return found


def _length(info: MethodInfo, request: Request) -> int:
    """How many models the list of a method holds; 1 where it takes none."""
    single = sum(role == "teacher" and name not in info.several for role, name in info.roles)
    given = len(request.teachers) - single
    if not any(role == "model" and name in info.several for role, name in info.roles):
        return max(1, given)
    # A chain with nothing between teacher and student gets a model cut out of the teacher.
    return max(2, given + len(request.models))


def _models(info: MethodInfo, request: Request, root: Path) -> list[_Model]:
    """The models that were given, by the formals of the method. Raises InitError."""
    slots = [member for held in members(info, _length(info, request)).values() for member in held]
    teachers = [name for role, name in slots if role == "teacher"]
    between = [name for role, name in slots if role == "model"]
    given = len(request.teachers)
    if given < len(teachers):
        raise InitError(f"{info.name} takes {_counted(teachers)}, and {given} given", "write --teacher DIR for each")
    chain = any(role == "model" for role, name in info.roles if name in info.several)
    if given > len(teachers) and not chain:
        are = "is" if given == 1 else "are"
        raise InitError(
            f"{info.name} takes {_counted(teachers)}, and {given} {are} given",
            "gkd methods --teachers several lists those that take more",
        )
    places = [("--teacher", place) for place in request.teachers] + [("--model", place) for place in request.models]
    if len(places) > len(teachers) + len(between):
        takes = f"{len(between)} further models ({', '.join(between)})" if between else "no further model"
        raise InitError(f"{info.name} takes {takes}, and {len(request.models)} are given by --model", "leave them out")
    named = [("teacher", name) for name in teachers] + [("model", name) for name in between]
    found = [
        _given(role, name, option, place, request, root)
        for (role, name), (option, place) in zip(named, places, strict=False)
    ]
    if request.student is not None:
        student = next(name for role, name in slots if role == "student")
        found.append(_given("student", student, "--student", request.student, request, root))
    return found


def _counted(teachers: Sequence[str]) -> str:
    return "1 teacher" if len(teachers) == 1 else f"{len(teachers)} teachers ({', '.join(teachers)})"


def _given(role: str, name: str, option: str, place: str, request: Request, root: Path) -> _Model:
    try:
        found = models.describe(place, offline=request.offline, root=Path.cwd())
    except ModelError as error:
        raise InitError(f"{option} {place}: {error.reason}", error.hint or "") from None
    return _Model(role, name, _relative(place, root), found)


def _relative(place: str, root: Path) -> str:
    """A place as the spec names it: a folder from the folder of the spec, anything else as it is."""
    folder = expanded(place)
    if place.startswith("package:") or not is_dir(folder) or folder.is_absolute():
        return place
    written = Path(os.path.relpath(folder.resolve(), root)).as_posix()
    return written if "/" in written or written.startswith(".") else f"./{written}"


def _tasks(info: MethodInfo, request: Request, teacher: ModelInfo) -> list[Task]:
    """The heads to try: that of the teacher, but classes where the method reads labels and the rows have them."""
    own = teacher.task
    table = request.data is not None and kind_of(request.data) != "text"
    if info.needs.startswith(("language models", "masked language models")):
        return [own if own in ("masked_lm", "causal_lm") else "masked_lm"]
    if info.labelled and (table or own in ("classification", "encoder")):
        return ["classification"]
    if own == "classification":
        return ["classification", "encoder"]
    others: tuple[Task, ...] = ("classification",) if info.labelled else ("encoder", "classification")
    return [own, *(task for task in others if task != own)]


def _rows(info: MethodInfo, request: Request, task: Task) -> Found | None:
    if request.data is None:
        return None
    labels = task == "classification" and (info.labelled or request.label is not None)
    return found_in(request.data, labels=labels, text=request.text, label=request.label, causal=task == "causal_lm")


@dataclass
class _Writer:
    """Writes the text of a spec for one head."""

    info: MethodInfo
    request: Request
    held: list[_Model]
    task: Task
    rows: Found | None
    root: Path

    def text(self, *, metrics: bool, explicit: bool) -> str | None:
        """The spec; None where its stages cannot be written out and `explicit` asks for that."""
        info = self.info
        bound = model_names(info, self._count())
        measured = self._metrics(bound) if metrics else []
        if metrics and not measured:
            return None
        stages = self._run()
        alone, shared = readers(info.name) if explicit else (set(), set())
        params = [_param(param) for param in info.params if param.name in shared]
        if explicit:
            ends = self._measure([name for name, _, _ in measured])
            written = written_out(info.name, bound, ends)
            if written is None:
                return None
            stages = written
        lines = ["gkd 1", "", *self._head(), "", f'import "gkd:{info.name}" use {info.name}', ""]
        if self.request.data is None:
            kind = "a table with the columns text and label" if self._labelled() else "a file with one text a line"
            lines += [f'param data: text "{kind}: gkd run SPEC --set data=FILE"', ""]
        lines += [*params, ""] if params else []
        for model in self._declared():
            lines += model.lines()
        lines += ["", *self._data(), ""]
        for name, value, words in measured:
            lines += [f"metric {name} = {value}  # {words}"]
        lines += [""] if measured else []
        lines += [*self._use(bound, alone, shared), "", *self._teach(), *stages]
        return "\n".join(lines) + "\n"

    def checked(self, text: str, out: Path) -> Draft:
        """A text with what the checker says of it."""
        return Draft(text, check_text(text, str(out), root=self.root, offline=self.request.offline))

    def _count(self) -> int:
        return _length(self.info, self.request)

    def _labelled(self) -> bool:
        return self.task == "classification" and self.info.labelled

    def _head(self) -> list[str]:
        info = self.info
        said = [f"{info.title} ({info.short_venue}): {info.equation}"]
        said.append(
            f"`gkd methods {info.name}` explains the method, `gkd explain` what this spec does with it, and `gkd run` "
            "trains the student."
        )
        return [f"# {line}" for text in said for line in wrap(text, _WIDTH)]

    def _declared(self) -> Iterator[Declared]:
        """The models: those given, and those cut out of the first teacher."""
        slots = [member for held in members(self.info, self._count()).values() for member in held]
        for wanted in ("teacher", "model", "student"):
            for role, name in slots:
                if role == wanted:
                    model = next((each for each in self.held if each.name == name), None)
                    yield self._cut(role, name) if model is None else self._loaded(model)

    def _loaded(self, model: _Model) -> Declared:
        args = [f'"{model.place}"']
        first = self.held[0]
        sizes = self._sizes(model.info)
        said = {"teacher": "teaches, and is not trained", "student": "is trained", "model": "stands between them"}
        comment = f"{model.name} {said[model.role]}: {sizes}."
        if self.task == "classification":
            labels, wanted = self._own_labels(model.info), self._labels()
            if model is first and labels is None:
                args.append(f"num_labels = {wanted}")
                comment = f"{model.name} teaches: {sizes}. Its classifier is new; the first stage trains it."
            elif model is not first and labels != wanted:
                args.append(f"num_labels = {first.name}.num_labels")
                comment = f"{comment[:-1]}, with a new classifier."
        elif model.info.task != self.task:
            args.append(f"task = {self.task}")
        return Declared(model.role, model.name, f"hf({', '.join(args)})", (comment,))

    def _sizes(self, info: ModelInfo) -> str:
        layers, width, heads = (info.size(name) for name in ("N", "H", "A"))
        labels = self._own_labels(info)
        classes = f", {labels} classes" if labels and self.task == "classification" else ""
        return f"{layers} layers, {width} wide, {heads} heads{classes}"

    def _own_labels(self, info: ModelInfo) -> int | None:
        return info.size("C") if info.task == "classification" else None

    def _labels(self) -> int:
        """The classes of all models: the teacher's, else those of the rows."""
        own = self._own_labels(self.held[0].info)
        return own or self.request.num_labels or (self.rows.classes if self.rows else None) or 2

    def _cut(self, role: str, name: str) -> Declared:
        """A model that keeps half of the teacher's layers, or, to stand between them, three quarters."""
        teacher = self.held[0]
        count = teacher.info.size("N") or 0
        if teacher.info.family is None or count < 2:
            option = "--student" if role == "student" else "--model"
            raise InitError(
                f"no layers can be cut out of {teacher.place} ({teacher.info.config.get('model_type')})",
                f"give {'the student' if role == 'student' else name} by {option} DIR",
            )
        keep = count // 2 if role == "student" else max(count // 2 + 1, 3 * count // 4)
        layers = [-(-(place + 1) * count // keep) - 1 for place in range(keep)]
        which = ""
        if role == "student" and re.search(r"teacher's first (layers|blocks)", " ".join(self.info.remarks.split())):
            layers, which = list(range(keep)), "the first "
        comment = f"{name} is cut out of {teacher.name}: {which}{keep} of its {count} layers, with their weights."
        return Declared(role, name, f"truncated({teacher.name}, layers = {layers})", (comment,))

    def _data(self) -> list[str]:
        if self.rows is None:
            columns = ', text = "text", label = "label"' if self._labelled() else ""
            return [f"data texts = {'csv' if self._labelled() else 'text'}(data{columns}, held_out = 10%)"]
        assert self.request.data is not None
        place = Path(os.path.relpath(self.request.data.resolve(), self.root)).as_posix()
        if self.request.data.is_absolute():
            place = self.request.data.as_posix()
        found = replace(self.rows, args=(*self.rows.args, ("held_out", "10%")))
        held = "A tenth of the rows is held out: never trained on, and measured on."
        comments = [f"# {comment}" for comment in (*self.rows.comments, held)]
        return [*comments, *_filled(f"data texts = {found.kind}(", found.words(place))]

    def _metrics(self, bound: dict[str, tuple[str, ...]]) -> list[tuple[str, str, str]]:
        """The measures of the head, over the student and the first teacher."""
        if self.task == "classification" and not (self.rows.labelled if self.rows else self._labelled()):
            return []
        student = next(bound[name][0] for role, name in self.info.roles if role == "student")
        places = {"student": student, "teacher": self.held[0].name}
        return [
            (
                name,
                re.sub(r"\b[st]\.", lambda found: places["student" if found[0] == "s." else "teacher"] + ".", value),
                said,
            )
            for name, value, said in _METRICS.get(self.task, ())
        ]

    def _measure(self, names: list[str]) -> list[str]:
        if not names:
            return []
        return [f"evaluate {', '.join(names)} every 1 epoch", f"keep best by {names[0]}"]

    def _use(self, bound: dict[str, tuple[str, ...]], alone: set[str], shared: set[str]) -> list[str]:
        """The `use`, with every parameter that is a plain value at its default, and what it means.

        Parameters of `alone` stand in the stages, and those of `shared` are parameters of the spec.
        """
        call = call_of(self.info, bound)
        literal = re.compile(r'-?[\d.][\w.+-]*(%| [a-z]+)?|true|false|"[^"]*"')
        values = {param.name: param.default for param in self.info.params if literal.fullmatch(param.default)}
        values |= {name: name for name in shared}
        plain = [param for param in self.info.params if param.name in values and param.name not in alone]
        if not plain:
            return [f"use {self.info.name}({call}) as m"]
        lines = ["# The parameters of the method at their defaults.", f"use {self.info.name}(", f"  {call},"]
        texts = [f"  {param.name} = {values[param.name]}," for param in plain]
        wide = max(map(len, texts))
        lines += [
            f"{text:{wide}}  # {param.doc}" if param.doc else text for text, param in zip(texts, plain, strict=True)
        ]
        return [*lines, ") as m"]

    def _teach(self) -> list[str]:
        """A stage for each teacher whose classifier is new."""
        lines: list[str] = []
        if self.task != "classification" or not (self.rows.labelled if self.rows else self._labelled()):
            return lines
        for model in self.held:
            if model.role != "teacher" or self._own_labels(model.info) is not None:
                continue
            lines += [
                f"# {model.name} learns the task before it teaches it.",
                f"stage teach_{model.name} for 3 epochs {{",
                f"  train {model.name}",
                f"  minimize cross_entropy({model.name}.logits, batch.labels)",
                "  optim = adamw(lr = 5e-5, warmup = 6%)",
                "}",
                "",
            ]
        return lines

    def _run(self) -> list[str]:
        names = ", ".join(self.info.stage_names)
        return [f"# Runs the stages that the method carries, one after the other: {names}.", "run m"]


def _filled(head: str, args: Sequence[str]) -> list[str]:
    """A call with its arguments, over as many lines as it takes."""
    lines, line = [], head
    for place, arg in enumerate(args):
        text = arg + ("," if place < len(args) - 1 else ")")
        if place and len(line) + 1 + len(text) > _WIDTH:
            lines.append(line)
            line = " " * len(head) + text
        else:
            line += f" {text}" if place else text
    return [*lines, line]


def _param(param: MethodParam) -> str:
    """A parameter of the spec like that of the method."""
    within = f" in {param.within}" if param.within else ""
    return f'param {param.name}: {param.type} = {param.default}{within} "{param.doc}"'
