"""The method library as data: what each file's header and signature say."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import ForwardPlan, StagePlan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.meaning.imports import library as names
from gkd_dsl.meaning.imports import library_folder
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source

FIELDS = ("paper", "venue", "arxiv", "equation", "taps", "stages", "teachers", "needs")


@dataclass(frozen=True)
class MethodParam:
    """A parameter of a method, as it is written."""

    name: str
    type: str
    default: str
    within: str
    doc: str


@dataclass(frozen=True)
class ForwardCost:
    """What a stage asks of one model: how many of its blocks run (of how many), and the taps by kind."""

    model: str
    trains: bool
    blocks: int
    of: int
    taps: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.taps)
        run = "whole" if self.blocks == self.of else f"{self.blocks} of {self.of} blocks"
        return f"{self.model} ({'forward and backward' if self.trains else 'forward'}, {run}): {counts}"


@dataclass(frozen=True)
class StageCost:
    """What a stage runs in a step, over the specimen pair; `projected` parameters train beside the student's."""

    stage: str
    forwards: tuple[ForwardCost, ...]
    projected: int


@dataclass(frozen=True)
class MethodInfo:
    """A method: its header and its parameters."""

    name: str
    title: str
    paper: str
    venue: str
    arxiv: str
    equation: str
    taps: str
    stages: str
    teachers: str
    needs: str
    remarks: str
    roles: tuple[tuple[str, str], ...]
    params: tuple[MethodParam, ...]
    losses: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "example": self.example, "costs": [asdict(cost) for cost in costs(self.name)]}

    @property
    def labelled(self) -> bool:
        """Whether its stages read labelled rows."""
        return "labelled" in self.needs

    @property
    def example(self) -> str:
        """A spec to copy: it checks once the three paths are those of two models that fit and a file of rows."""
        data = 'csv("train.csv", text = "text", label = "label")' if self.labelled else 'text("corpus.txt")'
        lines = ["gkd 1", f'import "gkd:{self.name}" use {self.name}', ""]
        lines += ['teacher t = hf("path/to/teacher")', 'student s = hf("path/to/student")', f"data texts = {data}", ""]
        lines += [f"use {self.name}(t -> s) as m", "run m"]
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """What `gkd methods NAME` prints."""
        head = f"{self.name}: {self.title}"
        lines = [head, "=" * len(head), "", f"{self.paper}", f"{self.venue}, arXiv {self.arxiv}", ""]
        lines += [f"minimises  {self.equation}", f"losses     {', '.join(self.losses)}"]
        lines += [f"taps       {self.taps}", f"stages     {self.stages}", f"needs      {self.needs}", ""]
        if self.remarks:
            lines += [self.remarks, ""]
        width = max((len(param.name) for param in self.params), default=0)
        lines.append("parameters")
        for param in self.params:
            within = f" in {param.within}" if param.within else ""
            lines.append(f"  {param.name:{width}}  {param.type} = {param.default}{within}")
            if param.doc:
                lines.append(f"  {'':{width}}  {param.doc}")
        lines += ["", f"a step of each stage, {SPECIMEN}"]
        for cost in costs(self.name):
            lines.append(f"  {cost.stage}")
            lines += [f"    {forward}" for forward in cost.forwards]
            if cost.projected:
                lines.append(f"    projections: {cost.projected:,} parameters")
        lines += ["", "to use it", "", *(f"  {line}" if line else "" for line in self.example.splitlines())]
        return "\n".join(lines)


def method_text(name: str) -> str:
    """The text of a library file. Raises KeyError for a name that is not in the library."""
    path = library_folder() / f"{name}.gkd"
    if not path.is_file():
        raise KeyError(name)
    return path.read_text(encoding="utf-8")


def describe(name: str) -> MethodInfo:
    """A method by the header of its file. Raises KeyError for a name that is not in the library."""
    text = method_text(name)
    file, _ = parse(Source(f"gkd:{name}", text))
    method = next(item for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text == name)
    title, fields, remarks = _header(text)
    roles = tuple((formal.role, formal.name.text) for formal in method.formals if formal.role is not None)
    params = tuple(
        MethodParam(
            formal.name.text,
            formal.type.name.text,
            formal.default.span.text if formal.default is not None else "required",
            formal.within.span.text if formal.within is not None else "",
            formal.doc or "",
        )
        for formal in method.formals
        if formal.type is not None
    )
    losses = tuple(stmt.name.text for stmt in method.body if isinstance(stmt, ast.LossDecl))
    said = {field: fields.get(field, "") for field in FIELDS}
    return MethodInfo(name=name, title=title, remarks=remarks, roles=roles, params=params, losses=losses, **said)


def library() -> list[MethodInfo]:
    """Every method that ships, by name."""
    return [describe(name) for name in names()]


SPECIMEN = "a teacher of 12 layers, a student of 6, both 768 wide with 12 heads"


@lru_cache(maxsize=64)
def costs(name: str) -> tuple[StageCost, ...]:
    """What each stage of a method runs in a step over the specimen pair, read from its compiled plan.

    Raises KeyError for a name that is not in the library.
    """
    info = describe(name)
    with TemporaryDirectory(prefix="gkd-") as folder:
        root = Path(folder)
        _specimens(root, _head(info))
        checked = check_text(info.example, f"{name}.gkd", root=root)
        plan = compile_plan(checked.graph)
    return tuple(_cost(stage) for stage in plan.stages)


def _head(info: MethodInfo) -> str:
    """The class of the specimen pair."""
    if info.needs.startswith("language models"):
        return "BertForMaskedLM"
    return "BertModel" if info.needs.startswith("models") else "BertForSequenceClassification"


def _specimens(root: Path, head: str) -> None:
    for role, layers in (("teacher", 12), ("student", 6)):
        place = root / "path" / "to" / role
        place.mkdir(parents=True)
        config = {
            "architectures": [head], "model_type": "bert", "vocab_size": 30522, "hidden_size": 768,
            "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 3072,
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (place / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    (root / "train.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    (root / "corpus.txt").write_text("good\nbad\n", encoding="utf-8")


def _cost(stage: StagePlan) -> StageCost:
    layers = {node.name: node.info.size("N") or 0 for node in stage.models}
    projected = sum(node.in_features * node.out_features + node.out_features * node.bias for node in stage.projections)
    return StageCost(
        stage.name.partition(".")[2] or stage.name,
        tuple(_forward_cost(forward, layers[forward.model]) for forward in stage.forwards),
        projected,
    )


def _forward_cost(forward: ForwardPlan, layers: int) -> ForwardCost:
    stop = forward.stop_after
    blocks = layers
    if stop is not None and stop.kind in ("embed", "hidden", "layer"):
        index = stop.index or 0
        blocks = index + 1 if stop.kind == "layer" else index
    kinds = Counter(tap.path.part if tap.path.part else tap.path.kind for tap in forward.taps)
    return ForwardCost(forward.model, forward.grad, blocks, layers, tuple(kinds.items()))


def _header(text: str) -> tuple[str, dict[str, str], str]:
    """The title, the fields and the remarks of the comment block that opens a library file."""
    block: list[str] = []
    for line in text.splitlines()[1:]:
        if line.startswith("#"):
            block.append(line[1:].strip())
        elif block:
            break
    title = next((line for line in block if line), "")
    fields: dict[str, str] = {}
    remarks: list[str] = []
    for line in block[block.index(title) + 1 :] if title else []:
        found = re.match(rf"({'|'.join(FIELDS)})\s+(.*)", line)
        if found and found[1] not in fields and not remarks:
            fields[found[1]] = found[2]
        elif line or remarks:
            remarks.append(line)
    return title, fields, "\n".join(remarks).strip()


__all__ = [
    "FIELDS",
    "SPECIMEN",
    "ForwardCost",
    "MethodInfo",
    "MethodParam",
    "StageCost",
    "costs",
    "describe",
    "library",
    "method_text",
    "names",
]
