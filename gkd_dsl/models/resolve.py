"""From a tap as written to its canonical path, its type, and the place in the modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gkd_dsl.models.errors import ModelError, TapError, near_misses
from gkd_dsl.models.families import FAMILIES, Family
from gkd_dsl.models.families.table import Place
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.taps import TapPath
from gkd_dsl.types import BATCH, LENGTH, Dim, TensorType

TOP = ("embed", "hidden", "final", "layer", "cls", "pooled", "logits", "weight", "module")
IN_LAYER = ("in", "out", "mlp", "attn")
IN_ATTENTION = ("q", "k", "v", "scores", "probs", "out")
UNMEASURED = Dim("?")

_LAST = 1 << 30
_STEPS = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs", "attn.out", "mlp")

Part = tuple[str, "tuple[int | str, ...] | None"]


@dataclass(frozen=True)
class ResolvedTap:
    """A tap that exists. `note` says what only the first batch can tell."""

    path: TapPath
    type: TensorType
    note: str | None = None


@dataclass(frozen=True)
class Hook:
    """Where a tap is taken.

    module     dotted path relative to the base model ("" is the base model itself);
               of a `module("...")` tap as the user wrote it
    side       what the module is given, what it gives, or what its attention function computes
    index      the element, where a module gives or is given a tuple
    transform  how the tap is made of it (see `Place`)
    heads      the number of heads that `transform` splits into
    """

    module: str
    side: Literal["input", "output", "scores", "probs"]
    index: int = 0
    transform: str = "none"
    heads: int | None = None

    def __str__(self) -> str:
        place = {"input": "what {} is given", "output": "what {} gives"}.get(self.side, "attention {} of")
        text = place.format(self.side if self.side in ("scores", "probs") else self.module)
        if self.side in ("scores", "probs"):
            return f"{text} {self.module}"
        if self.transform.startswith("fused."):
            text += f", part {self.transform[-1]} of 3"
        return text if self.heads is None else f"{text}, as {self.heads} heads"


@dataclass(frozen=True)
class TapRow:
    """One line of `gkd taps`."""

    path: str
    type: str
    hook: str
    available: bool
    why: str = ""


def resolve_tap(info: ModelInfo, model_name: str, parts: Sequence[Part]) -> ResolvedTap:
    """The canonical tap of a path such as `[("layer", (-1,)), ("attn", None), ("scores", None)]`.

    Raises TapError.
    """
    if not parts:
        raise TapError(f"`{model_name}` is a model, not a tap", taps_here=TOP)
    head, argument = parts[0]
    if head not in TOP:
        raise TapError(
            f"`{model_name}` has no tap `{head}`", near=near_misses(head, TOP), at=0, taps_here=_available(info)
        )
    if head == "weight":
        path = TapPath("weight", name=_name(model_name, head, argument))
        _end(parts, 1)
    elif head == "module":
        name = _name(model_name, head, argument)
        side = _one_of(parts, 1, ("in", "out"), f'module("{name}")')
        _end(parts, 2)
        path = TapPath("module", part=side, name=name)
    elif head == "layer":
        path = _layer(info, model_name, parts)
    else:
        indexed = head == "hidden"
        index = _index(info, model_name, head, argument) if indexed else None
        if not indexed and argument is not None:
            raise TapError(f"`{head}` takes no index", kind="index", at=0)
        _end(parts, 1)
        path = TapPath(head, index)
    path = canonical(info, path)
    if why := unavailable(info, path):
        kind: Literal["headless", "unavailable"] = (
            "headless" if path.kind == "logits" and info.task == "encoder" else "unavailable"
        )
        raise TapError(
            f"`{model_name}` has no tap `{path}`: {why}",
            kind=kind,
            hint=why,
            at=len(parts) - 1,
            taps_here=_available(info),
        )
    type_, note = _type(info, model_name, path)
    return ResolvedTap(path, type_, note)


def canonical(info: ModelInfo, path: TapPath) -> TapPath:
    """One path for each tensor: `embed`, the ends of blocks and, after post-norm blocks, `final` are `hidden`.

    Inside a method (no sizes) negative indices stay as they are.
    """
    if path.kind == "embed":
        return TapPath("hidden", 0)
    if path.kind == "layer" and path.index is not None and path.part in ("in", "out"):
        # hidden has one entry more than layer, so counted from the end it is layer[-1].out that keeps its index
        before = path.index if path.index >= 0 else path.index - 1
        return TapPath("hidden", before if path.part == "in" else before + 1)
    family = FAMILIES.get(info.family or "")
    count = info.size("N")
    if path.kind == "final" and family is not None and family.post_norm and count is not None:
        return TapPath("hidden", count)
    return path


def unavailable(info: ModelInfo, path: TapPath) -> str:
    """Why a model lacks a (well-formed) tap; "" where it has it."""
    if info.formal or path.kind in ("weight", "module"):
        return ""
    if path.kind == "logits":
        return "" if info.task != "encoder" else f"{info.architecture} has no head, it gives hidden states only"
    family = FAMILIES.get(info.family or "")
    if family is None:
        return (
            f'model_type "{info.config.get("model_type", "?")}" has no table of taps: '
            'only `logits`, `weight("...")` and `module("...")` exist'
        )
    if path.kind == "pooled" and not info.has_pooler:
        return f"{info.architecture}: {family.no_pooler}"
    return ""


def order(path: TapPath) -> tuple[int, int]:
    """A key that sorts taps as a forward reaches them.

    Weights come first (they need no forward); `module(...)` taps come last, since nothing says
    where they lie; `pooled` and `logits` need the whole forward.
    """
    if path.kind == "weight":
        return (-1, 0)
    if path.kind in ("embed", "hidden"):
        return (path.index or 0, 0)
    if path.kind == "layer":
        index = path.index or 0
        if path.part == "in":
            return (index, 0)
        return (index + 1, 0) if path.part == "out" else (index, 1 + _STEPS.index(path.part or ""))
    return (_LAST, ("final", "cls", "pooled", "logits", "module").index(path.kind))


def last_needed(paths: Iterable[TapPath]) -> TapPath | None:
    """The tap after which a forward may stop; None where the whole forward is needed (or there is no tap)."""
    needed = [path for path in paths if path.kind != "weight"]
    if not needed:
        return None
    last = max(needed, key=order)
    return None if last.kind in ("pooled", "logits", "module") else last


def hook(info: ModelInfo, path: TapPath) -> Hook:
    """Where to take a canonical tap. `cls` is taken from `final`, whose place this gives.

    Raises TapError for a tap that the model lacks, and for `logits` and `weight`, which are not hooked.
    """
    if why := unavailable(info, path):
        raise TapError(f"no tap `{path}`: {why}", kind="unavailable", hint=why)
    if path.kind == "module":
        return Hook(path.name or "", "input" if path.part == "in" else "output")
    family = FAMILIES.get(info.family or "")
    if family is None or path.kind in ("logits", "weight"):
        raise TapError(f"`{path}` is not taken by a hook", kind="unavailable")
    if path.kind == "cls":
        return hook(info, canonical(info, TapPath("final")))
    if path.kind == "pooled":
        return Hook(family.pooler or "", "output")
    if path.kind == "final":
        return Hook(family.final_norm or "", "output")
    if path.kind == "hidden":
        if path.index == 0:
            return _at(info, "", family.embed, path)
        return Hook(f"{family.blocks}.{(path.index or 0) - 1}", "output")
    block = f"{family.blocks}.{path.index}."
    if path.part in ("attn.scores", "attn.probs"):
        return Hook(block + family.attention, "scores" if path.part == "attn.scores" else "probs")
    places = {
        "attn.q": family.q,
        "attn.k": family.k,
        "attn.v": family.v,
        "attn.out": family.attn_out,
        "mlp": family.mlp,
    }
    return _at(info, block, places[path.part or ""], path)


def list_taps(info: ModelInfo, name: str) -> list[TapRow]:
    """Every kind of tap of a model, layer taps with their range, and why some are missing."""
    count = info.size("N")
    upto = "k" if count is None else f"0..{count}"
    layers = "i" if count is None else f"0..{count - 1}"
    example = (count or 1) - 1
    rows = [
        _row(info, name, "embed", TapPath("embed")),
        _row(info, name, f"hidden[{upto}]", TapPath("hidden", count or 1)),
        _row(info, name, "final", TapPath("final")),
    ]
    for part in ("in", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs", "attn.out", "mlp", "out"):
        rows.append(_row(info, name, f"layer[{layers}].{part}", TapPath("layer", example, part)))
    rows += [_row(info, name, kind, TapPath(kind)) for kind in ("cls", "pooled", "logits")]
    rows += [
        TapRow('weight("name")', "its own", "a parameter, by its name in the model", True),
        TapRow('module("path").out', "its own", "what any module gives (`.in`: is given)", True),
    ]
    return rows


def part_modules(info: ModelInfo, part: str) -> tuple[str, ...]:
    """The modules of a part of a model, relative to the whole model with a head.

    `embed` is the embeddings, `layer.3` a block, `body` the base model (embeddings, blocks, final norm,
    pooler), `rest` what of it is neither embeddings nor a block, `head` what lies outside it. A language model's head
    may share its weight with the embeddings.

    Raises ModelError for a part that the model lacks.
    """
    family = FAMILIES.get(info.family or "")
    names = ("body", "embed", "head", "layer[i]")
    if part == "head" and info.task == "encoder":
        raise ModelError(f"{info.architecture} has no head", "its parts are body, embed and layer[i]")
    if part not in ("body", "embed", "rest", "head") and not part.startswith("layer."):
        raise ModelError(f"a model has no part {part}", f"its parts are {', '.join(names)}", near_misses(part, names))
    if family is None:
        raise ModelError(f'parts of a model of type "{info.config.get("model_type", "?")}" are not known')
    body = "" if info.task == "encoder" else family.prefix
    prefix = f"{body}." if body else ""
    if part == "body":
        return (body,)
    if part == "head":
        return family.heads[info.task]
    if part == "embed":
        return tuple(prefix + module for module in family.embeddings)
    if part == "rest":
        return tuple(prefix + module for module in _rest(info, family))
    index, count = part.removeprefix("layer."), info.size("N") or 0
    if not index.isdecimal() or int(index) >= count:
        raise ModelError(f"a {info.architecture} has no part {part}", f"its layers run from 0 to {count - 1}")
    return (f"{prefix}{family.blocks}.{index}",)


def has_rest(info: ModelInfo) -> bool:
    """Whether the body of a model has a final norm or a pooler, which are neither embeddings nor a block."""
    family = FAMILIES.get(info.family or "")
    return family is not None and bool(_rest(info, family))


def _rest(info: ModelInfo, family: Family) -> list[str]:
    pooler = family.pooler if info.has_pooler else None
    return [module for module in (family.final_norm, pooler) if module is not None]


def _row(info: ModelInfo, name: str, text: str, path: TapPath) -> TapRow:
    path = canonical(info, path)
    type_, _ = _type(info, name, path)
    why = unavailable(info, path)
    if why:
        return TapRow(text, type_.long, "", False, why)
    if info.formal:
        return TapRow(text, type_.long, "known when the method is used", True)
    if path.kind == "logits":
        return TapRow(text, type_.long, f"the logits that {info.architecture} gives", True)
    where = str(hook(info, path))
    blocks = FAMILIES[info.family or ""].blocks
    if path.kind == "cls":
        where += f", at the {'last' if info.left_to_right else 'first'} real token"
    elif text.startswith("hidden"):
        where = f"what {blocks}.(k - 1) gives; for k = 0 that of `embed`"
    elif text.endswith(".in"):
        where = f"what {blocks}.(i - 1) gives; for i = 0 that of `embed`"
    elif text.endswith("].out"):
        where = f"what {blocks}.i gives"
    elif path.kind == "layer":
        where = where.replace(f"{blocks}.{path.index}.", f"{blocks}.i.")
    return TapRow(text, type_.long, where, True)


def _at(info: ModelInfo, prefix: str, place: Place, path: TapPath) -> Hook:
    heads = None
    if place.transform != "none":
        heads = info.size("KV" if path.part in ("attn.k", "attn.v") else "A")
    return Hook(prefix + place.path, place.side, 0, place.transform, heads)


def _layer(info: ModelInfo, model: str, parts: Sequence[Part]) -> TapPath:
    if parts[0][1] is None:
        count = info.size("N")
        within = f" (0 to {count - 1})" if count is not None else ""
        raise TapError(
            f"`layer` is every layer of `{model}`: say which{within}", kind="index", at=0, hint="write `layer[i]`"
        )
    index = _index(info, model, "layer", parts[0][1])
    name = _one_of(parts, 1, IN_LAYER, f"layer[{index}]")
    if name != "attn":
        _end(parts, 2)
        return TapPath("layer", index, name)
    part = _one_of(parts, 2, IN_ATTENTION, f"layer[{index}].attn")
    _end(parts, 3)
    return TapPath("layer", index, f"attn.{part}")


def _index(info: ModelInfo, model: str, head: str, argument: tuple[int | str, ...] | None) -> int:
    if argument is None or len(argument) != 1 or isinstance(argument[0], (bool, str)):
        raise TapError(f"`{head}` takes one whole number: `{head}[3]`", kind="index", hint=f"write `{head}[i]`", at=0)
    index = argument[0]
    count = info.size("N")
    if count is None:
        return index
    entries = count + 1 if head == "hidden" else count
    if not -entries <= index < entries:
        extra = f": {count} layers give {entries} hidden states, `hidden[0]` is `embed`" if head == "hidden" else ""
        thing = "no hidden state" if head == "hidden" else "no layer"
        raise TapError(
            f"`{model}` has {thing} {index}",
            kind="index",
            hint=f"they run from 0 to {entries - 1}, or -{entries} to -1{extra}",
            at=0,
        )
    return index % entries


def _name(model: str, head: str, argument: tuple[int | str, ...] | None) -> str:
    if argument is None or len(argument) != 1 or not isinstance(argument[0], str) or not argument[0].strip("."):
        raise TapError(f'`{head}` takes one name: `{model}.{head}("...")`', at=0)
    return argument[0]


def _one_of(parts: Sequence[Part], at: int, legal: Sequence[str], before: str) -> str:
    if len(parts) <= at:
        raise TapError(
            f"`{before}` is not a tensor",
            hint=f"go on with {', '.join(f'`.{name}`' for name in legal)}",
            at=at - 1,
            taps_here=legal,
        )
    name, argument = parts[at]
    if name not in legal:
        raise TapError(f"`{before}` has no tap `{name}`", near=near_misses(name, legal), at=at, taps_here=legal)
    if argument is not None:
        raise TapError(f"`{name}` takes no index", kind="index", at=at)
    return name


def _end(parts: Sequence[Part], count: int) -> None:
    if len(parts) > count:
        raise TapError(f"`{parts[count - 1][0]}` is a tensor: it has no `{parts[count][0]}`", at=count)


def _available(info: ModelInfo) -> list[str]:
    return [name for name in TOP if not unavailable(info, TapPath(name, 0 if name in ("hidden", "layer") else None))]


def _type(info: ModelInfo, model: str, path: TapPath) -> tuple[TensorType, str | None]:
    def dims(*names: str) -> TensorType:
        axes = {"B": BATCH, "L": LENGTH}
        return TensorType("float", tuple(axes.get(name) or info.dim(name, model) for name in names))

    if path.kind in ("cls", "pooled"):
        return dims("B", "H"), None
    if path.kind == "logits":
        return dims("B", "C") if info.task in ("classification", "encoder") else dims("B", "L", "V"), None
    if path.kind == "layer" and path.part is not None and path.part.startswith("attn."):
        if path.part in ("attn.scores", "attn.probs"):
            return dims("B", "A", "L", "L"), None
        if path.part != "attn.out":
            return dims("B", "A" if path.part == "attn.q" else "KV", "L", "D"), None
    if path.kind == "layer" and path.part in ("attn.out", "mlp") and info.size("I") is not None:
        return dims("B", "L", "I"), None
    if path.kind == "weight":
        return _weight_type(info, model, path.name or "")
    if path.kind == "module":
        return _module_type(info, path.name or "")
    return dims("B", "L", "H"), None


def _relative(info: ModelInfo, family: Family, name: str) -> str:
    """A dotted name without the attribute that holds the base model."""
    return name if info.task == "encoder" else name.removeprefix(f"{family.prefix}.")


def _weight_type(info: ModelInfo, model: str, name: str) -> tuple[TensorType, str | None]:
    family = FAMILIES.get(info.family or "")
    if info.kept is not None and name in ("id_map", "kept_ids"):
        # Of a model that keeps a part of its vocabulary: the row of each id, the id of each row.
        axis = info.dim("V", model) if name == "kept_ids" else Dim(f"{model}.ids", info.kept.full)
        return TensorType("int", (axis,)), None
    if family is not None and _relative(info, family, name) == family.words:
        features = "H" if info.size("E") is None else "E"
        return TensorType("float", (info.dim("V", model), info.dim(features, model))), None
    last = name.rpartition(".")[2]
    flat = last == "bias" or any(word in name.lower().rpartition(".")[0].rpartition(".")[2] for word in ("norm", "ln_"))
    axes = (UNMEASURED,) if flat else (UNMEASURED, UNMEASURED)
    return TensorType("float", axes), f'the shape of weight("{name}") is checked when the model is there'


def _module_type(info: ModelInfo, name: str) -> tuple[TensorType, str | None]:
    family = FAMILIES.get(info.family or "")
    note = f'the shape of module("{name}") is checked on the first batch'
    if family is not None and not info.formal:
        first = name.partition(".")[0]
        relative = _relative(info, family, name)
        rows = first in family.heads.get(info.task, ()) and info.task in family.row_heads
        if rows or (family.pooler is not None and relative.partition(".")[0] == family.pooler):
            return TensorType("float", (BATCH, UNMEASURED)), note
    return TensorType("float", (BATCH, LENGTH, UNMEASURED)), note


__all__ = [
    "Hook",
    "ResolvedTap",
    "TapError",
    "TapRow",
    "canonical",
    "has_rest",
    "hook",
    "last_needed",
    "list_taps",
    "order",
    "part_modules",
    "resolve_tap",
    "unavailable",
]
