"""Settings of stages and of the runtime block: one table, typed and bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gkd_dsl.diagnostics import Fix, Label
from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Length, Num, Optimiser, Source, Text, Truth, Unknown, Value, digits, kind, plain
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span


@dataclass(frozen=True)
class SettingRule:
    """What a setting takes. `words` are the bare names or texts that are allowed."""

    kind: Literal["int", "float", "bool", "word", "folder", "duration", "source", "optim"]
    doc: str
    words: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    later: tuple[str, ...] = ()
    """Words that are checked and not run in this version."""


STAGE: Mapping[str, SettingRule] = {
    "source": SettingRule("source", "the data source"),
    "optim": SettingRule("optim", "the optimiser: `adamw(...)` or `sgd(...)`"),
    "batch_size": SettingRule("int", "texts in a micro-batch", low=1, high=1_000_000),
    "accumulate": SettingRule("int", "micro-batches in a step", low=1, high=1_000_000),
    "max_length": SettingRule("int", "tokens of a text that are kept", low=2, high=10_000_000),
    "seed": SettingRule("int", "seed of order, masking and dropout", low=0, high=2**63 - 1),
    "checkpoint_every": SettingRule("duration", "how often the state is saved"),
}

RUNTIME: Mapping[str, SettingRule] = {
    "backend": SettingRule("word", "where it runs", ("local", "ddp", "gemini")),
    "precision": SettingRule("word", "precision of the forwards", ("fp32", "bf16", "fp16")),
    "device": SettingRule("word", "the device", ("auto", "cpu", "cuda")),
    "checkpoint": SettingRule("bool", "gradient checkpointing: recompute activations in the backward"),
    "fuse_logits": SettingRule("word", "losses over language-model logits run with the head", ("auto", "on", "off")),
}

GEMINI: Mapping[str, SettingRule] = {
    "placement_policy": SettingRule("word", "who decides where chunks live", ("static", "auto")),
    "shard_param_frac": SettingRule("float", "share of the parameters that are sharded over ranks", low=0, high=1),
    "offload_optim_frac": SettingRule("float", "share of the optimiser state in host memory", low=0, high=1),
    "offload_param_frac": SettingRule("float", "share of the parameters in host memory", low=0, high=1),
    "warmup_non_model_data_ratio": SettingRule("float", "share of memory kept for activations at first", low=0, high=1),
    "steady_cuda_cap_ratio": SettingRule("float", "share of memory that chunks may fill", low=0, high=1),
    "gpu_margin_mem_ratio": SettingRule("float", "share of what is left for optimiser state", low=0, high=1),
    "search_range_m": SettingRule("int", "range of the chunk size search, in 2^20 elements", low=1, high=65536),
    "min_chunk_size_m": SettingRule("float", "least chunk size, in 2^20 elements", low=0.001, high=65536),
    "hidden_dim": SettingRule("int", "step of the chunk size search", low=1, high=10_000_000),
    "max_prefetch": SettingRule("int", "chunks fetched ahead", low=0, high=1024),
    "pin_memory": SettingRule("bool", "page-locked host memory for chunks"),
    "initial_scale": SettingRule("float", "fp16: the loss scale of the first step", low=1, high=2**32),
    "min_scale": SettingRule("float", "fp16: the least loss scale", low=2**-24, high=2**32),
    "max_scale": SettingRule("float", "fp16: the largest loss scale", low=1, high=2**40),
    "growth_factor": SettingRule("float", "fp16: what the scale grows by", low=1.0001, high=65536),
    "backoff_factor": SettingRule("float", "fp16: what the scale is multiplied with", low=0.0001, high=0.9999),
    "growth_interval": SettingRule("int", "fp16: steps without overflow before it grows", low=1, high=10_000_000),
    "hysteresis": SettingRule("int", "fp16: overflows before it shrinks", low=1, high=1000),
}
"""Settings of the gemini backend, under Gemini's own names."""

PLACEMENT: Mapping[str, SettingRule] = {
    "placement": SettingRule(
        "word",
        "where the weights live",
        ("resident", "offload", "disk", "gemini", "cached"),
    ),
    "cache": SettingRule("folder", "`auto`, `off` or a folder with its stored outputs", ("off", "auto")),
    "top_k": SettingRule("int", "how many logits of a row are stored (0: all)", low=0, high=10_000_000),
    "tail": SettingRule("word", "the mass of the logits that are not stored", ("bucket", "renormalise")),
    "shard_param_frac": SettingRule("float", "share of the model that each process holds a part of", low=0, high=1),
    "offload_param_frac": SettingRule("float", "share of the model in host memory", low=0, high=1),
}

TENSOR_PARALLEL = "tensor_parallel"
"""What users of ColossalAI look for, and what its release cannot do with the transformers of today."""

_WANTS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "duration": "a duration such as `100 steps`",
    "source": "a data source",
    "optim": "an optimiser",
}


def read(
    ctx: Context, scope: Scope, rules: Mapping[str, SettingRule], settings: list[ast.Setting], what: str
) -> dict[str, Value]:
    """The values of some settings by name; what is wrong with one is reported, and it is left out."""
    found: dict[str, Value] = {}
    places: dict[str, ast.Setting] = {}
    for setting in settings:
        name = setting.name.text
        rule = rules.get(name)
        if rule is None:
            if name == TENSOR_PARALLEL and "backend" in rules:
                ctx.error(
                    scope, "E0421", f"`{name}` is not offered: ColossalAI 0.5.0 cuts layers as transformers 4 has them",
                    setting.span, "BERT, GPT-2 and Llama fail with transformers 5",
                    notes=[
                        "`shard_param_frac` shares out what is trained over the processes",
                        "`placement = gemini` shares out a teacher",
                    ],
                )  # fmt: skip
                continue
            label, near = suggest(name, rules)
            ctx.error(
                scope, "E0408", f"{what} has no setting `{name}`", setting.name.span, label or "not a setting",
                notes=[f"its settings: {', '.join(rules)}"],
                fix=replace(setting.name.span, near) if near else None,
            )  # fmt: skip
            continue
        if name in places:
            ctx.error(scope, "E0245", f"`{name}` is set twice", setting.name.span, "again here")
            continue
        places[name] = setting
        value = _value(ctx, scope, rule, name, setting.value)
        if not isinstance(value, Unknown):
            found[name] = value
    return found


def _value(ctx: Context, scope: Scope, rule: SettingRule, name: str, expr: ast.Expr) -> Value:
    if rule.kind == "folder" and isinstance(expr, ast.String):
        return Text(expr.value)
    if rule.kind in ("word", "folder"):
        return _word(ctx, scope, rule, name, expr)
    value = ctx.evaluate(scope, expr)
    if isinstance(value, Unknown):
        return value
    fits = {
        "int": isinstance(value, Num) and isinstance(value.value, int),
        "float": isinstance(value, Num),
        "bool": isinstance(value, Truth),
        "duration": isinstance(value, Length),
        "source": isinstance(value, Source),
        "optim": isinstance(value, Optimiser),
    }[rule.kind]
    if not fits:
        code = "E0401" if isinstance(value, Length) or rule.kind == "duration" else "E0404"
        fix = None
        if rule.kind == "duration" and isinstance(value, Num) and value.value > 0:
            fix = replace(expr.span, f"{digits(value.value)} steps")
        elif isinstance(value, Length):
            fix = _without_unit(rule, value, expr.span)
        return ctx.error(
            scope, code, f"`{name}` is {_WANTS[rule.kind]}, and this is {kind(value)}", expr.span, rule.doc, fix=fix
        )
    low, high = rule.low, rule.high
    if isinstance(value, Num) and low is not None and high is not None and not low <= value.value <= high:
        bounds = f"{_number(low)} to {_number(high)}"
        return ctx.error(
            scope, "E0403", f"`{name}` is {value.value}, outside {bounds}", expr.span, rule.doc,
            fix=replace(expr.span, str(_nearest(value.value, low, high))),
        )  # fmt: skip
    return value


def _without_unit(rule: SettingRule, value: Length, span: Span) -> Fix | None:
    """The number of a duration or a percentage where a number belongs, if it is one that fits there."""
    if rule.kind == "float" and value.span.unit != "percent":
        return None
    amount = value.span.amount / 100 if rule.kind == "float" else value.span.amount
    fits = rule.kind == "float" or (rule.kind == "int" and amount == int(amount))
    held = rule.low is not None and rule.high is not None and rule.low <= amount <= rule.high
    return replace(span, digits(amount)) if fits and held else None


def _nearest(value: float, low: float, high: float) -> float:
    """The end of a range that a number outside of it is nearer to."""
    end = low if value < low else high
    return int(end) if end == int(end) else end


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _word(ctx: Context, scope: Scope, rule: SettingRule, name: str, expr: ast.Expr) -> Value:
    word = expr.id if isinstance(expr, ast.Name) else expr.value if isinstance(expr, ast.String) else None
    if isinstance(word, str) and word in rule.words:
        if word in rule.later:
            ctx.not_yet(scope, f"`{name} = {word}`", expr.span)
        return Text(word)
    label, near = suggest(str(word), rule.words)
    return ctx.error(
        scope, "E0402", f"`{name}` is one of {', '.join(rule.words)}", expr.span, label or rule.doc,
        fix=replace(expr.span, near) if near else None,
    )  # fmt: skip


def runtime(ctx: Context, scope: Scope, decl: ast.Runtime) -> tuple[tuple[str, AttrValue], ...]:
    """The runtime block: how, never what. The settings of a model's placement are named `t.placement`, `t.cache`."""
    plain_settings = [stmt for stmt in decl.body if isinstance(stmt, ast.Setting)]
    found = read(ctx, scope, {**RUNTIME, **GEMINI}, plain_settings, "`runtime`")
    for stmt in decl.body:
        if isinstance(stmt, ast.Placement):
            _placed(ctx, scope, stmt)
            placed = read(ctx, scope, PLACEMENT, list(stmt.body), f"the placement of `{stmt.name.text}`")
            found |= {f"{stmt.name.text}.{name}": value for name, value in placed.items()}
    return tuple(sorted((name, plain(value)) for name, value in found.items()))  # type: ignore[misc]


def _placed(ctx: Context, scope: Scope, placement: ast.Placement) -> None:
    """The model of a placement is there, and has the role that is written."""
    name = placement.name.text
    found = scope.find(name)
    if found is None:
        label, near = suggest(name, ctx.models)
        ctx.error(
            scope, "E0203", f"no model is called `{name}`", placement.name.span, label,
            fix=replace(placement.name.span, near) if near else None,
        )  # fmt: skip
        return
    decl = found[0].decl
    if not isinstance(decl, ast.ModelDecl):
        ctx.error(scope, "E0233", f"`{name}` is no model, and has no place", placement.name.span)
    elif decl.role != placement.role:
        written = Span(placement.span.source, placement.span.start, placement.span.start + len(placement.role))
        ctx.error(
            scope, "E0244", f"`{name}` is declared as a {decl.role}, not as a {placement.role}", written,
            labels=[Label(decl.name.span, "declared here", primary=False)], fix=replace(written, decl.role),
        )  # fmt: skip
