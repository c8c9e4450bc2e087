"""The `quantize` of a model's block: `bitsandbytes(...)` or `torchao(...)`, by the libraries' own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.meaning import libraries
from gkd_dsl.meaning.context import Context, suggest
from gkd_dsl.meaning.context import replace as written
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Items, Num, Text, Truth, Unknown, Value, kind, plain
from gkd_dsl.models.info import ModelInfo, Quantised
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

CODE = "E0436"
LIBRARIES = ("bitsandbytes", "torchao")
_INSTALL = {"bitsandbytes": '"gkd-dsl[bitsandbytes]"', "torchao": '"gkd-dsl[torchao]"'}


@dataclass(frozen=True)
class Argument:
    """What an argument takes."""

    kind: Literal["bool", "float", "int", "word", "names"]
    words: tuple[str, ...] = ()


_NAMES = Argument("names")
_FLOATS = ("float32", "bfloat16", "float16")
_GRANULARITY = Argument("word", ("per_row", "per_tensor"))

BITSANDBYTES: Mapping[str, Argument] = {
    "load_in_4bit": Argument("bool"),
    "load_in_8bit": Argument("bool"),
    "bnb_4bit_quant_type": Argument("word", ("nf4", "fp4")),
    "bnb_4bit_compute_dtype": Argument("word", _FLOATS),
    "bnb_4bit_use_double_quant": Argument("bool"),
    "llm_int8_threshold": Argument("float"),
    "llm_int8_skip_modules": _NAMES,
}
"""Arguments of `transformers.BitsAndBytesConfig`; not those for training, or for a model in several places."""


@dataclass(frozen=True)
class Scheme:
    """A way of torchao: its class, the bits of a weight, and its arguments."""

    name: str
    bits: int
    arguments: Mapping[str, Argument]


TORCHAO: Mapping[str, Scheme] = {
    "int8_weight_only": Scheme("Int8WeightOnlyConfig", 8, {"group_size": Argument("int"), "granularity": _GRANULARITY}),
    "int8_dynamic_activation_int8_weight": Scheme(
        "Int8DynamicActivationInt8WeightConfig", 8, {"granularity": _GRANULARITY, "reduce_range": Argument("bool")}
    ),
    "float8_weight_only": Scheme("Float8WeightOnlyConfig", 8, {"granularity": _GRANULARITY}),
    "int4_weight_only": Scheme(
        "Int4WeightOnlyConfig",
        4,
        {
            "group_size": Argument("int"),
            "int4_packing_format": Argument("word", ("plain", "preshuffled", "plain_int32", "tile_packed_to_4d")),
            "int4_choose_qparams_algorithm": Argument("word", ("tinygemm", "hqq")),
        },
    ),
}
"""The schemes of torchao under their names, which are those of its classes in small letters."""

_WANTS = {"bool": "true or false", "float": "a number", "int": "a whole number from 1", "names": "a list of texts"}


def quantised(ctx: Context, scope: Scope, decl: ast.ModelDecl, info: ModelInfo, stmt: ast.Setting) -> ModelInfo | None:
    """What is known of the model with quantised weights; None where something was reported."""
    expr = stmt.value
    if not isinstance(expr, ast.Call) or not isinstance(expr.func, ast.Name) or expr.func.id not in LIBRARIES:
        name = expr.func.id if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) else expr.span.text
        at = expr.func.span if isinstance(expr, ast.Call) else expr.span
        label, near = suggest("bitsandbytes" if name == "bnb" else name, LIBRARIES)
        ctx.error(
            scope, CODE, f"`{name}` is no library that quantises", at, label,
            notes=["write `bitsandbytes(load_in_4bit = true)` or `torchao(\"int8_weight_only\")`"],
            fix=written(at, near) if near and isinstance(expr, ast.Call) else None,
        )  # fmt: skip
        return None
    library = expr.func.id
    if info.build.kind != "hf":
        ctx.error(scope, CODE, "weights are quantised as they are read", expr.span, "the model is not made by `hf`")
        return None
    if decl.role == "student":
        ctx.error(
            scope, CODE, f"`{decl.name.text}` is a student, and quantised weights are not trained", expr.span,
            notes=["quantise the teacher; the student's weights are trained in full precision"],
        )  # fmt: skip
        return None
    if info.quantised is not None:
        ctx.error(
            scope, CODE, f'the weights of "{info.location}" are saved quantised', expr.span,
            f"by {info.quantised.library}: leave `quantize` away",
        )  # fmt: skip
        return None
    if library == "torchao" and info.family == "gpt2":
        ctx.error(
            scope, CODE, "torchao quantises `torch.nn.Linear`, and a GPT-2 has none in its blocks", expr.span,
            notes=["bitsandbytes knows its layers"],
        )  # fmt: skip
        return None
    found = _bitsandbytes(ctx, scope, expr) if library == "bitsandbytes" else _torchao(ctx, scope, expr, info)
    if found is None:
        return None
    if not libraries.need(ctx, scope, library, f"`{library}(...)`", _INSTALL[library], expr.span):
        return None
    if not libraries.need(ctx, scope, "accelerate", f"`{library}(...)`", _INSTALL[library], expr.span):
        return None
    return replace(info, build=replace(info.build, quantised=found))


def alone(ctx: Context, scope: Scope, decl: ast.ModelDecl, info: ModelInfo) -> bool:
    """Refuse what needs plain weights beside `quantize`, after the whole block was read. True where all is well."""
    other = "vocabulary" if info.build.kept is not None else "adapter" if info.build.adapter is not None else None
    if info.quantised is None or other is None:
        return True
    setting = next(s for s in decl.body if isinstance(s, ast.Setting) and s.name.text == other)
    why = {"vocabulary": "a part of the vocabulary is cut from", "adapter": "a saved adapter is merged into"}[other]
    ctx.error(scope, CODE, f"{why} plain weights, and these are quantised", setting.span, "not both")
    return False


def _bitsandbytes(ctx: Context, scope: Scope, expr: ast.Call) -> Quantised | None:
    args = _arguments(ctx, scope, expr, "bitsandbytes", BITSANDBYTES)
    if args is None:
        return None
    four, eight = args.get("load_in_4bit", False), args.get("load_in_8bit", False)
    if four == eight:
        ctx.error(
            scope, CODE, "bitsandbytes is asked for both 4 and 8 bits" if four else "bitsandbytes is asked for no bits",
            expr.span, "write one of `load_in_4bit = true` and `load_in_8bit = true`",
        )  # fmt: skip
        return None
    wrong = "llm_int8_threshold" if four else next((name for name in args if name.startswith("bnb_4bit")), None)
    if wrong in args:
        at = next(arg for arg in expr.args if arg.name is not None and arg.name.text == wrong)
        ctx.error(scope, CODE, f"`{wrong}` is for {8 if four else 4} bits", at.span, "not read")
        return None
    return Quantised("bitsandbytes", 4 if four else 8, None, tuple(sorted(args.items())))


def _torchao(ctx: Context, scope: Scope, expr: ast.Call, info: ModelInfo) -> Quantised | None:
    first = expr.args[0] if expr.args and expr.args[0].name is None else None
    name = first.value.value if first is not None and isinstance(first.value, ast.String) else None
    if first is not None and isinstance(first.value, ast.Name):
        name = first.value.id
    classes = {scheme.name: spelling for spelling, scheme in TORCHAO.items()}
    scheme = TORCHAO.get(classes.get(str(name), str(name)))
    if scheme is None:
        label, near = suggest(str(name), TORCHAO) if name is not None else ("", None)
        at = first.span if first is not None else expr.span
        ctx.error(
            scope, CODE, f"torchao has no scheme `{name}`" if name is not None else "`torchao` takes a scheme first",
            at, label, notes=[f"schemes: {', '.join(TORCHAO)}"], fix=written(at, f'"{near}"') if near else None,
        )  # fmt: skip
        return None
    known = {**scheme.arguments, "modules_to_not_convert": _NAMES}
    args = _arguments(ctx, scope, replace(expr, args=expr.args[1:]), f"torchao's {name}", known)
    if args is None:
        return None
    if "group_size" in args and "granularity" in args:
        ctx.error(scope, CODE, "`group_size` is a granularity of its own", expr.span, "not beside `granularity`")
        return None
    group = args.get("group_size", 128 if scheme.bits == 4 else None)
    sizes = {size: info.size(size) for size in ("H", "F")}
    for size, width in sizes.items():
        if isinstance(group, int) and width is not None and width % group:
            ctx.error(
                scope, CODE, f"`group_size` is {group}, which does not divide {size} = {width}", expr.span,
                "a group is a part of a row of a weight", notes=["it divides the input width of each quantised layer"],
            )  # fmt: skip
            return None
    return Quantised("torchao", scheme.bits, scheme.name, tuple(sorted(args.items())))


def _arguments(
    ctx: Context, scope: Scope, expr: ast.Call, what: str, known: Mapping[str, Argument]
) -> dict[str, object] | None:
    found: dict[str, object] = {}
    for arg in expr.args:
        if arg.name is None or arg.name.text not in known:
            name = arg.name.text if arg.name is not None else arg.value.span.text
            at = arg.name.span if arg.name is not None else arg.span
            label, near = suggest(name, known)
            ctx.error(
                scope, "E0234", f"{what} has no argument `{name}`", at, label,
                notes=[f"its arguments: {', '.join(known)}"],
                fix=written(at, near) if near and arg.name is not None else None,
            )  # fmt: skip
            return None
        name = arg.name.text
        if name in found:
            ctx.error(scope, "E0241", f"`{name}` is given twice", arg.span, "a second time")
            return None
        rule = known[name]
        value = (
            Text(arg.value.id)
            if rule.kind == "word" and isinstance(arg.value, ast.Name)
            else ctx.evaluate(scope, arg.value)
        )
        if isinstance(value, Unknown):
            return None
        if not _fits(rule, value):
            if rule.kind == "word" and isinstance(value, Text):
                label, near = suggest(value.value, rule.words)
                ctx.error(
                    scope, "E0402", f"`{name}` is one of {', '.join(rule.words)}", arg.value.span, label,
                    fix=written(arg.value.span, f'"{near}"') if near else None,
                )  # fmt: skip
            else:
                wants = _WANTS.get(rule.kind) or f"one of {', '.join(rule.words)}"
                ctx.error(scope, "E0404", f"`{name}` takes {wants}, and this is {kind(value)}", arg.value.span)
            return None
        given = plain(value)
        found[name] = float(given) if rule.kind == "float" else given  # type: ignore[arg-type]
    return found


def _fits(rule: Argument, value: Value) -> bool:
    match rule.kind:
        case "bool":
            return isinstance(value, Truth)
        case "float":
            return isinstance(value, Num)
        case "int":
            return isinstance(value, Num) and isinstance(value.value, int) and value.value >= 1
        case "word":
            return isinstance(value, Text) and value.value in rule.words
    return isinstance(value, Items) and all(isinstance(item, Text) for item in value.items)


def check(ctx: Context, scope: Scope, runtime: Mapping[str, object]) -> None:
    """Refuse what stages and placements do with quantised models. The graph is complete here."""
    names = [name for name, model in ctx.models.items() if model.info.quantised is not None]
    if not names or not ctx.diagnostics.ok:
        return
    plan = compile_plan(ctx.builder.graph)
    for name in names:
        for reason in _reasons(plan.stages, name, runtime):
            span = _span(scope, name)
            ctx.error(
                scope, CODE, f"`{name}` is quantised, and {reason}", span if span else ctx.models[name].defined,
                "quantised here" if span else "saved quantised",
            )  # fmt: skip
            break


def _reasons(stages: tuple[StagePlan, ...], name: str, runtime: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    place = runtime.get(f"{name}.placement", "resident")
    if place in ("offload", "disk", "gemini"):
        found.append(f"`placement = {place}` moves plain weights")
    for plan in stages:
        where = f"stage `{plan.name}`"
        forwards = [*plan.forwards, *(forward for item in plan.metrics for forward in item.forwards)]
        if any(target.kind == "model" and target.name == name for target in plan.stage.trains):
            found.append(f"{where} trains it")
        if any(isinstance(c, ReplaceBlock) and name in (c.model, f.model) for f in forwards for c in f.changes):
            found.append(f"{where} exchanges blocks with another model")
        if any(forward.grad and forward.model == name for forward in forwards):
            found.append(f"{where} takes a gradient through it")
        if any(t.path.kind == "weight" for f in forwards if f.model == name for t in f.taps):
            found.append(f"{where} reads a weight of it")
        for node in plan.models:
            if node.info.build.base == name:
                found.append(f"`{node.name}` is made from its weights")
    return found


def _span(scope: Scope, name: str) -> Span | None:
    definition = scope.names.get(name)
    decl = definition.decl if definition is not None else None
    if not isinstance(decl, ast.ModelDecl):
        return None
    return next((s.span for s in decl.body if isinstance(s, ast.Setting) and s.name.text == "quantize"), None)
