"""The `adapter` of a model's block: `peft("folder")` is merged when weights are loaded, `lora(...)` is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gkd_dsl.diagnostics import Fix
from gkd_dsl.graph.nodes import StageNode, TrainTarget
from gkd_dsl.meaning import libraries
from gkd_dsl.meaning.context import Context, suggest
from gkd_dsl.meaning.context import replace as written
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Items, Model, Num, Text, Truth, Unknown, Value, kind
from gkd_dsl.models import lora
from gkd_dsl.models.info import Lora, ModelInfo
from gkd_dsl.places import is_file
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

_CONFIG = "adapter_config.json"
_INSTALL = '"gkd-dsl[peft]"'
_FORMS = ("lora", "peft")
_EXPORTS = ("merged", "adapter")
_WANTS = {
    "r": "a whole number",
    "alpha": "a number",
    "dropout": "a number",
    "targets": 'names of modules: `["query", "value"]`',
    "export": "merged or adapter",
    "rslora": "true or false",
    "dora": "true or false",
}
_ANY_RANK = 65_536
_R = 16


def adapted(ctx: Context, scope: Scope, info: ModelInfo, expr: ast.Expr) -> ModelInfo | None:
    """What is known of the model with the adapter of its block; None where something was reported."""
    name = expr.func.id if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) else None
    if not isinstance(expr, ast.Call) or name not in _FORMS:
        word = name or (expr.id if isinstance(expr, ast.Name) else "")
        label, near = ("it is called", word) if word in _FORMS else suggest(word, _FORMS)
        fix = None
        if near is not None:
            fix = written(expr.func.span, near) if isinstance(expr, ast.Call) else written(expr.span, f"{near}()")
        ctx.error(
            scope, "E0508", '`adapter` takes `lora(...)` or `peft("folder")`', expr.span,
            label or "write `lora(r = 16)`", fix=fix,
        )  # fmt: skip
        return None
    libraries.need(ctx, scope, "peft", "an adapter", _INSTALL, expr.span)
    if (info.build.lora if name == "lora" else info.build.adapter) is not None:
        ctx.error(scope, "E0245", f"`adapter = {name}(...)` is set twice", expr.span, "again here")
        return None
    return _trained(ctx, scope, info, expr) if name == "lora" else _merged(ctx, scope, info, expr)


def _merged(ctx: Context, scope: Scope, info: ModelInfo, expr: ast.Call) -> ModelInfo | None:
    value = ctx.evaluate(scope, expr.args[0].value) if len(expr.args) == 1 and expr.args[0].name is None else None
    if not isinstance(value, Text):
        ctx.error(scope, "E0508", "`peft` takes the folder of a saved adapter", expr.span, 'write `peft("folder")`')
        return None
    if info.build.kind != "hf":
        ctx.error(scope, "E0508", "an adapter belongs to saved weights", expr.span, "the model is not made by `hf`")
        return None
    folder = Path(scope.root or ".") / value.value
    if not is_file(folder / _CONFIG):
        ctx.error(
            scope, "E0501", f"there is no adapter in `{value.value}`", expr.args[0].span, f"no {_CONFIG} there",
            notes=["paths start at the folder of the spec"],
        )  # fmt: skip
        return None
    return replace(info, build=replace(info.build, adapter=str(folder)))


def _trained(ctx: Context, scope: Scope, info: ModelInfo, expr: ast.Call) -> ModelInfo | None:
    given: dict[str, Value] = {}
    places: dict[str, ast.Expr] = {}
    for arg in expr.args:
        name = arg.name.text if arg.name is not None else "r"
        if name not in _WANTS:
            assert arg.name is not None
            label, near = suggest(name, _WANTS)
            ctx.error(
                scope, "E0234", f"`lora` has no argument `{name}`", arg.name.span, label,
                notes=[f"its arguments: {', '.join(_WANTS)}"], fix=written(arg.name.span, near) if near else None,
            )  # fmt: skip
            return None
        if name in given:
            ctx.error(scope, "E0241", f"`{name}` is given twice", arg.span, "a second time")
            return None
        if name == "export" and isinstance(arg.value, ast.Name):
            value: Value = Text(arg.value.id)
        else:
            value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Unknown) or not _fits(ctx, scope, name, value, arg.value):
            return None
        given[name], places[name] = value, arg.value
    rank = _number(given, "r", _R)
    found = Lora(
        int(rank),
        float(_number(given, "alpha", 2 * rank)),
        float(_number(given, "dropout", 0.0)),
        _texts(given["targets"]) if "targets" in given else lora.TARGETS.get(info.family or "", ()),
        "adapter" if given.get("export") == Text("adapter") else "merged",
        given.get("rslora") == Truth(True),
        given.get("dora") == Truth(True),
    )
    if not _in_range(ctx, scope, info, found, places, expr.span) or not _targets(ctx, scope, info, found, places, expr):
        return None
    return replace(info, build=replace(info.build, lora=found))


def _fits(ctx: Context, scope: Scope, name: str, value: Value, expr: ast.Expr) -> bool:
    fits = {
        "r": isinstance(value, Num) and isinstance(value.value, int),
        "alpha": isinstance(value, Num),
        "dropout": isinstance(value, Num),
        "targets": isinstance(value, Items) and value.items and all(isinstance(item, Text) for item in value.items),
        "export": isinstance(value, Text),
    }.get(name, isinstance(value, Truth))
    if not fits:
        what = "an empty list" if isinstance(value, Items) and not value.items else kind(value)
        ctx.error(scope, "E0404", f"`{name}` of `lora` does not take {what}", expr.span, _WANTS[name])
    elif name == "export" and isinstance(value, Text) and value.value not in _EXPORTS:
        label, near = suggest(value.value, _EXPORTS)
        ctx.error(
            scope, "E0402", f"`export` is one of {', '.join(_EXPORTS)}", expr.span, label,
            fix=written(expr.span, near) if near else None,
        )  # fmt: skip
        return False
    return bool(fits)


def _number(given: dict[str, Value], name: str, otherwise: float) -> float:
    value = given.get(name)
    return value.value if isinstance(value, Num) else otherwise


def _texts(value: Value) -> tuple[str, ...]:
    return tuple(item.value for item in value.items if isinstance(item, Text)) if isinstance(value, Items) else ()


def _in_range(
    ctx: Context, scope: Scope, info: ModelInfo, found: Lora, places: dict[str, ast.Expr], span: Span
) -> bool:
    width = info.size("H") or _ANY_RANK
    wrong: tuple[str, float, str, str, int | None] | None = None
    if not 1 <= found.r <= width:
        wrong = ("r", found.r, f"1 to {width}", "the rank, at most the width of the model", min(max(found.r, 1), width))
    elif found.alpha <= 0:
        wrong = ("alpha", found.alpha, "the numbers above 0", "what B A is multiplied with is alpha / r", 2 * found.r)
    elif not 0 <= found.dropout < 1:
        wrong = ("dropout", found.dropout, "0 to 1, less than 1", "the share of inputs that is dropped", None)
    if wrong is None:
        return True
    name, value, bounds, doc, near = wrong
    place = places.get(name)
    text = doc if place is not None else f"write `lora(r = {near})`"
    ctx.error(
        scope, "E0403", f"`{name}` is {value:g}, outside {bounds}", place.span if place is not None else span, text,
        fix=written(place.span, str(near)) if place is not None and near is not None else None,
    )  # fmt: skip
    return False


def _targets(
    ctx: Context, scope: Scope, info: ModelInfo, found: Lora, places: dict[str, ast.Expr], expr: ast.Call
) -> bool:
    """Every target is a linear map in the blocks of the model, where its family is known."""
    if not found.targets:
        ctx.error(
            scope, "E0434", f'where an adapter belongs in a model of type "{info.config.get("model_type", "?")}" '
            "is not known", expr.span, 'write `targets = ["..."]`: names of its linear maps',
        )  # fmt: skip
        return False
    paths = lora.LINEAR.get(info.family or "")
    if paths is None:
        return True
    numbered = [re.sub(r"\.i\.", ".0.", path) for path in paths]
    good = True
    for name, span in _spans(found, places.get("targets"), expr.span):
        if any(lora.is_target(path, (re.sub(r"\.\d+\.", ".0.", name),)) for path in numbered):
            continue
        known = lora.target_names(info.family or "")
        label, near = suggest(name, known)
        quoted = span.text.startswith('"')
        ctx.error(
            scope, "E0434", f"the blocks of a {info.architecture} have no linear map `{name}`", span, label,
            notes=[f"they have {', '.join(known)}"],
            fix=written(span, f'"{near}"') if near and quoted else None,
        )  # fmt: skip
        good = False
    return good


def _spans(found: Lora, place: ast.Expr | None, otherwise: Span) -> Iterator[tuple[str, Span]]:
    items = place.items if isinstance(place, ast.List) else ()
    for number, name in enumerate(found.targets):
        here = items[number].span if number < len(items) else place.span if place is not None else otherwise
        yield name, here


def finished(ctx: Context, scope: Scope, decl: ast.ModelDecl, info: ModelInfo) -> bool:
    """Whether an adapter that is to be exported alone has a saved model to be put on; else it was reported."""
    held = info.build.lora
    if held is None or held.export == "merged":
        return True
    setting = next(s for s in decl.body if isinstance(s, ast.Setting) and s.name.text == "adapter")
    if info.build.kind != "hf":
        why = "its weights are made here"
    elif info.kept is not None:
        why = "it keeps a part of its vocabulary"
    elif info.build.adapter is not None:
        why = "another adapter is merged into its weights"
    elif info.task in ("masked_lm", "causal_lm") and lora.new_head(info):
        why = "the head of a language model is new"
    else:
        return True
    place = next(
        arg.value.span
        for arg in (setting.value.args if isinstance(setting.value, ast.Call) else ())
        if arg.name is not None and arg.name.text == "export"
    )
    ctx.error(
        scope, "E0434", f"the adapter of `{decl.name.text}` cannot be exported alone: {why}", place,
        "no saved model is what it was trained on", fix=_merge(place),
    )  # fmt: skip
    return False


def _merge(place: Span) -> Fix:
    return written(place, "merged")


def frozen(model: Model | None, target: TrainTarget) -> bool:
    """Whether a part of a model with an adapter holds nothing that is trained."""
    return model is not None and model.info.build.lora is not None and not lora.may_train(model.info, target.part)


def unused(ctx: Context, scope: Scope, stages: list[StageNode]) -> None:
    """Warn of an adapter that no stage trains: B stays zero, and the model what it was."""
    trained = {target.name for stage in stages for target in stage.trains if target.kind == "model"}
    for model in ctx.models.values():
        if model.info.build.lora is not None and model.name not in trained and model.defined is not None:
            ctx.warning(
                scope, "W0705", f"no stage trains `{model.name}`, which has an adapter", model.defined,
                "the adapter stays zero",
            )  # fmt: skip
