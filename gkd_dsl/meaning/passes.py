"""Further passes of a model: over other texts, with changed blocks and tensors, or for their gradient alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as with_fields

from gkd_dsl import schedules
from gkd_dsl.diagnostics import Note
from gkd_dsl.graph.nodes import ALWAYS, AddToTap, BatchNode, Change, OpNode, ReplaceBlock, SwapTap, TapNode
from gkd_dsl.meaning import conditions, operators, paths
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Batch,
    Layers,
    Model,
    Passed,
    TapPart,
    Tensor,
    Unknown,
    Value,
    kind,
)
from gkd_dsl.models.fields import rotary
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import TOP, ResolvedTap
from gkd_dsl.syntax import ast
from gkd_dsl.types import BATCH, LENGTH, TensorType

_SETTINGS = {"grad": ("keep", "discard")}
_COLUMNS = ("input_ids", "attention_mask")
_ALIKE = {"H": "width", "A": "heads", "KV": "key heads", "D": "width of a head"}


@dataclass
class _Making:
    """A pass while its block is read."""

    base: Model
    scope: Scope
    changes: list[Change] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)
    carries: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    replaced: dict[int, str] = field(default_factory=dict)
    discard: bool = False

    def slot(self, word: str) -> str:
        """The slot of the next change."""
        return f"{word}.{len(self.changes)}"

    def takes(self, tensor: Tensor, slot: str) -> None:
        """Note a tensor that a change reads."""
        self.edges.append((tensor.key, slot))
        self.carries |= tensor.carries
        self.reads |= tensor.reads


def declare(ctx: Context, scope: Scope, decl: ast.Pass) -> Value:
    """`pass cf = s(roll(batch)) { ... }`: a further forward with taps of its own."""
    call = decl.value if isinstance(decl.value, ast.Call) else None
    target: ast.Expr = call.func if call is not None else decl.value
    base = ctx.evaluate(scope, target)
    shift = _texts(ctx, scope, call) if call is not None else 0
    if isinstance(base, Unknown) or shift is None:
        return UNKNOWN
    if not isinstance(base, Model):
        return ctx.error(scope, "E0247", f"a pass is of a model, and this is {kind(base)}", target.span)
    if base.passed is not None:
        return ctx.error(
            scope, "E0247", f"a pass is of a model, and `{target.span.text}` is a pass", target.span,
            "put the changes of both into one",
        )  # fmt: skip
    made = _Making(base, scope)
    good = True
    for change in decl.body:
        good = _change(ctx, scope, made, change) and good
    if not good:
        return UNKNOWN
    columns = tuple(_rolled_column(ctx, scope, column, shift, decl.value) for column in _COLUMNS if shift)
    # A teacher draws nothing, so that equal passes of it are one; a student's dropout is drawn for each.
    inputs = f"{scope.prefix}{decl.name.text}"
    if base.role == "teacher":
        inputs = f"roll(batch, {shift})" if shift else "batch"
    passed = Passed(
        decl.name.text,
        inputs,
        columns,
        tuple(made.changes),
        tuple(made.edges),
        made.discard,
        tuple(made.replaced.items()),
        made.carries,
        made.reads,
        shift,
    )
    return Model(
        base.name, base.info, base.role, f"{scope.prefix}{decl.name.text}/forward", decl.name.span, passed=passed
    )


# --- other texts --------------------------------------------------------------------------------


def _texts(ctx: Context, scope: Scope, call: ast.Call) -> int | None:
    """By how many rows the batch that a pass reads is moved; None where it was reported."""
    values = [ctx.evaluate(scope, arg.value) for arg in call.args]
    if any(isinstance(value, Unknown) for value in values):
        return None
    if len(values) == 1 and isinstance(values[0], Batch):
        return values[0].shift
    what = kind(values[0]) if len(values) == 1 else f"{len(values)} arguments"
    ctx.error(
        scope, "E0247", f"a pass reads a batch, and this is {what}", call.span, "write `s(roll(batch))`"
    )  # fmt: skip
    return None


def _rolled_column(ctx: Context, scope: Scope, column: str, shift: int, expr: ast.Expr) -> tuple[str, str]:
    key = paths.column_node(ctx, column)
    tokens = frozenset({paths.column_node(ctx, "attention_mask")})
    node = ctx.builder.node(key)
    assert isinstance(node, BatchNode)
    return column, rolled(ctx, scope, Tensor(key, node.type, from_batch=True, tokens=tokens), shift, expr).key


def rolled(ctx: Context, scope: Scope, tensor: Tensor, shift: int, expr: ast.Expr) -> Tensor:
    """A tensor with the rows of other samples: row b is row b + shift, the last ones the first. Made once."""
    if not shift:
        return tensor
    made = ctx.shared.get((f"roll.{shift}", tensor.key))
    if made is None:
        moved = operators.apply(ctx, scope, "roll", {"x": tensor}, {"by": shift}, expr)
        assert isinstance(moved, Tensor)
        # It counts the tokens of the texts that it is of now.
        masks = set()
        for key in tensor.tokens:
            mask = Tensor(key, TensorType("int", (BATCH, LENGTH)), from_batch=True, tokens=frozenset({key}))
            masks.add(moved.key if key == tensor.key else rolled(ctx, scope, mask, shift, expr).key)
        made = ctx.shared[f"roll.{shift}", tensor.key] = with_fields(moved, tokens=frozenset(masks))
    return made


def roll(ctx: Context, scope: Scope, expr: ast.Call) -> Value | None:
    """`roll(batch)`, `roll(batch.labels)`, `roll(s.logits, by = 2)`; None for what the operator itself reports."""
    values = {arg.name.text if arg.name is not None else "x": ctx.evaluate(scope, arg.value) for arg in expr.args}
    if any(isinstance(value, Unknown) for value in values.values()):
        return UNKNOWN
    base, by = values.get("x"), values.get("by")
    shift = getattr(by, "value", None) if by is not None else 1
    if len(values) != len(expr.args) or set(values) - {"x", "by"} or type(shift) is not int:
        return None
    if isinstance(base, Batch):
        return Batch(base.shift + shift)
    if base is None:
        return None
    tensor = paths.as_tensor(ctx, scope, base, expr.args[0].value)
    if isinstance(tensor, Unknown):
        return UNKNOWN
    return rolled(ctx, scope, tensor, shift, expr) if isinstance(tensor, Tensor) and tensor.type.dims else None


# --- changes ------------------------------------------------------------------------------------


def _change(
    ctx: Context, scope: Scope, made: _Making, change: ast.Setting | ast.Replace | ast.Swap | ast.AddTo
) -> bool:
    """One line of a pass; False where something was reported."""
    if isinstance(change, ast.Setting):
        return _setting(ctx, scope, made, change)
    if isinstance(change, ast.AddTo):
        return _add(ctx, scope, made, change)
    bound = _bound(ctx, scope, change)
    for inner, weight in bound:
        if isinstance(change, ast.Replace):
            good = _replace(ctx, inner, made, change, weight)
        else:
            good = _swap(ctx, inner, made, change, weight)
        if not good:
            return False
    return bool(bound)


def _setting(ctx: Context, scope: Scope, made: _Making, setting: ast.Setting) -> bool:
    words = _SETTINGS.get(setting.name.text)
    if words is None:
        label, near = suggest(setting.name.text, _SETTINGS)
        ctx.error(
            scope, "E0408", f"a pass has no setting `{setting.name.text}`", setting.name.span, label or "not a setting",
            notes=["its setting: grad"], fix=replace(setting.name.span, near) if near else None,
        )  # fmt: skip
        return False
    word = setting.value.id if isinstance(setting.value, ast.Name) else ""
    if word not in words:
        label, near = suggest(word, words)
        ctx.error(
            scope, "E0402", f"`{setting.name.text}` is one of {', '.join(words)}", setting.value.span, label,
            fix=replace(setting.value.span, near) if near else None,
        )  # fmt: skip
        return False
    made.discard = word == "discard"
    return True


def _bound(ctx: Context, scope: Scope, change: ast.Replace | ast.Swap) -> list[tuple[Scope, schedules.Schedule]]:
    """The scope of a change for each element of its `for`, and when the element counts; none if reported."""
    from gkd_dsl.meaning.evaluate import elements, unpacked

    if change.over is None:
        return [(scope, ALWAYS)]
    binders, iterable = change.over
    over = elements(ctx, scope, ctx.evaluate(scope, iterable), iterable)
    if over == []:
        ctx.error(scope, "E0219", "this runs over nothing", iterable.span, "an empty list")
    found: list[tuple[Scope, schedules.Schedule]] = []
    for element, weight in over or ():
        bound = unpacked(ctx, scope, binders, element)
        if bound is None:
            return []
        found.append((scope.child(**bound), weight))
    return found


def _when(
    ctx: Context, scope: Scope, change: ast.Replace | ast.Swap, weight: schedules.Schedule
) -> schedules.Schedule | None:
    """When a change is made; None where it was reported."""
    if change.when is None:
        return weight
    value = ctx.evaluate(scope, change.when)
    held = conditions.as_condition(ctx, scope, value, change.when)
    if held is None or weight == ALWAYS:
        return held
    return schedules.settled(schedules.Logic("and", weight, held))


def _own(scope: Scope, base: Model, written: ast.Expr) -> Scope:
    """Inside a pass a bare path is one of the model that is passed: `hidden[i]` means `s.hidden[i]`."""
    return scope.child(**{
        name: TapPart(base, ((name, None),), (written.span,)) for name in TOP if scope.find(name) is None
    })  # fmt: skip


def _replace(ctx: Context, scope: Scope, made: _Making, change: ast.Replace, weight: schedules.Schedule) -> bool:
    """`replace layer[i] with t.layer[js] when not coin(p)`."""
    target = ctx.evaluate(_own(scope, made.base, change.target), change.target)
    source = ctx.evaluate(scope, change.source)
    when = _when(ctx, scope, change, weight)
    if isinstance(target, Unknown) or isinstance(source, Unknown) or when is None:
        return False
    for value, written in ((target, change.target), (source, change.source)):
        block = isinstance(value, TapPart) and value.parts[-1][0] == "layer" and len(value.parts) == 1
        if not block and not isinstance(value, Layers):
            ctx.error(
                scope, "E0247", f"`replace` exchanges blocks, and this is {kind(value)}", written.span,
                "write `layer[i]`",
            )  # fmt: skip
            return False
    places = _blocks(target)
    layers = _blocks(source)
    lender = source.model  # type: ignore[union-attr]
    if target.model.name != made.base.name or len(places) != 1:  # type: ignore[union-attr]
        ctx.error(
            scope, "E0247", f"`replace` takes one block of `{made.base.name}`", change.target.span,
            "write `layer[i]`, and `for (i, js) in ...` for several",
        )  # fmt: skip
        return False
    if not _fits(ctx, scope, made.base, lender, target, layers, change):
        return False
    if when == schedules.Constant(0.0):
        return True
    slot = made.slot("replace")
    made.changes.append(ReplaceBlock(places[0], lender.name, layers, when, slot))
    made.edges.append((f"model/{lender.name}", slot))
    made.replaced.setdefault(places[0], lender.name)
    return True


def _blocks(value: Value) -> tuple[int, ...]:
    if isinstance(value, Layers):
        return value.indices
    assert isinstance(value, TapPart)
    index = value.parts[0][1]
    count = value.model.info.size("N") or 0
    if index is None:
        return tuple(range(count))
    return (int(index[0]) % count,) if count else (int(index[0]),)


def _fits(
    ctx: Context, scope: Scope, base: Model, lender: Model, target: Value, layers: tuple[int, ...], change: ast.Replace
) -> bool:
    """Whether the blocks of one model can stand in another; what differs is reported."""
    if lender.passed is not None or lender.name == base.name:
        what = "a pass" if lender.passed is not None else "the same model"
        ctx.error(
            scope, "E0247", f"`replace` takes blocks of another model, and this is {what}", change.source.span,
            "blocks of a teacher: `t.layer[i]`",
        )  # fmt: skip
        return False
    ours, theirs = base.info, lender.info
    if ours.formal or theirs.formal:
        return True
    differ = ""
    if ours.family is None or ours.family != theirs.family:
        differ = f"`{base.name}` is of the family {ours.family}, `{lender.name}` of {theirs.family}"
    elif ours.left_to_right != theirs.left_to_right:
        differ = "one of them sees only what comes before, the other all"
    for size, word in _ALIKE.items():
        if not differ and ours.size(size) != theirs.size(size):
            differ = f"{word}: `{base.name}.{size}` is {ours.size(size)}, `{lender.name}.{size}` is {theirs.size(size)}"
    if not differ and rotary(ours) != rotary(theirs):
        differ = "their configs say otherwise by what positions are rotated (`rope_theta`, `rope_parameters`)"
    for layer in layers if not differ else ():
        if _attends(ours, _blocks(target)[0]) != _attends(theirs, layer):
            differ = f"block {layer} has another window of attention than the block that it replaces"
    if not differ:
        return True
    ctx.error(
        scope, "E0270", f"blocks of `{lender.name}` do not fit into `{base.name}`", change.source.span, differ,
        notes=[*paths.defined(base), *paths.defined(lender)],
    )  # fmt: skip
    return False


def _attends(info: ModelInfo, index: int) -> str:
    """How a block attends where blocks differ in that: its masks are made for the block in whose place it runs."""
    config = info.config
    window = config.get("sliding_window")
    types = config.get("layer_types")
    if isinstance(types, list) and index < len(types):
        return f"{types[index]} {window if 'sliding' in str(types[index]) else ''}".strip()
    if "use_sliding_window" not in config:
        return f"sliding_attention {window}" if window else ""
    slides = config["use_sliding_window"] and index >= (config.get("max_window_layers") or 0)
    return f"sliding_attention {window}" if slides else "full_attention"


def _stream(ctx: Context, scope: Scope, made: _Making, written: ast.Expr, word: str) -> ResolvedTap | None:
    """A tap of the residual stream of the model that is passed; None where something else was reported."""
    part = ctx.evaluate(_own(scope, made.base, written), written)
    if isinstance(part, Unknown):
        return None
    if not isinstance(part, TapPart) or part.model.forward != made.base.forward:
        ctx.error(
            scope, "E0247", f"`{word}` changes a tap of `{made.base.name}`, and this is {kind(part)}", written.span,
            "write `embed`, `hidden[k]` or `layer[i].out`",
        )  # fmt: skip
        return None
    found = paths.resolved(ctx, scope, part, written)
    if found is None:
        return None
    if found.path.kind != "hidden":
        ctx.error(
            scope, "E0247", f"`{word}` changes the residual stream, and `{found.path}` is not on it", written.span,
            "one of `embed`, `hidden[k]`, `layer[i].in`, `layer[i].out`",
        )  # fmt: skip
        return None
    return found


def _swap(ctx: Context, scope: Scope, made: _Making, change: ast.Swap, weight: schedules.Schedule) -> bool:
    """`swap hidden[i] from other.hidden[j] at positions`."""
    target = _stream(ctx, scope, made, change.target, "swap")
    value = ctx.evaluate(scope, change.source)
    at = paths.as_tensor(ctx, scope, ctx.evaluate(scope, change.at), change.at) if change.at is not None else None
    when = _when(ctx, scope, change, weight)
    if target is None or isinstance(value, Unknown) or isinstance(at, Unknown) or when is None:
        return False
    source = paths.as_tensor(ctx, scope, value, change.source)
    if isinstance(source, Unknown):
        return False
    if not isinstance(source, Tensor) or not _on_the_stream(ctx, source):
        ctx.error(
            scope, "E0247", f"`swap` takes the residual stream of a pass, and this is {kind(source)}",
            change.source.span, "write `other.hidden[k]`",
        )  # fmt: skip
        return False
    if not all(a.agrees(b) for a, b in zip(target.type.dims, source.type.dims, strict=True)):
        ctx.error(
            scope, "E0247", "`swap` exchanges tensors of one shape", change.target.span, target.type.long,
            labels=[paths.shape_label(change.source.span, source.type)],
        )  # fmt: skip
        return False
    if at is not None and not _positions(ctx, scope, at, change):
        return False
    if when == schedules.Constant(0.0):
        return True
    slot = made.slot("swap")
    made.takes(source, f"{slot}.source")
    if isinstance(at, Tensor):
        made.takes(at, f"{slot}.at")
    made.changes.append(SwapTap(target.path, slot, when))
    return True


def _on_the_stream(ctx: Context, tensor: Tensor) -> bool:
    node = ctx.builder.node(tensor.key)
    if isinstance(node, OpNode) and node.op == "detach":
        node = ctx.builder.node(ctx.builder.inputs(tensor.key)["x"])
    return isinstance(node, TapNode) and node.path.kind == "hidden"


def _positions(ctx: Context, scope: Scope, at: Value, change: ast.Swap) -> bool:
    """Whether `at` says which positions: Bool[B, L], or the source's positions as `random_spans` draws them."""
    assert change.at is not None
    found = f"this is {at.type}" if isinstance(at, Tensor) else f"this is {kind(at)}"
    if isinstance(at, Tensor) and at.type.dims == (BATCH, LENGTH) and at.type.dtype != "float":
        if not at.from_batch:
            found = "this one depends on a model"
        elif at.type.dtype == "bool" or not isinstance(ctx.builder.node(at.key), BatchNode):
            return True
        else:
            found = "this is a column of the batch"
    ctx.error(
        scope, "E0247", f"`at` says for each token of the batch whether it is swapped, and {found}", change.at.span,
        "write `random_spans(batch.attention_mask, share = 30%)` or a comparison",
    )  # fmt: skip
    return False


def _add(ctx: Context, scope: Scope, made: _Making, change: ast.AddTo) -> bool:
    """`add embed = epsilon * l2norm(g)`."""
    target = _stream(ctx, scope, made, change.target, "add")
    value = paths.as_tensor(ctx, scope, ctx.evaluate(scope, change.value), change.value)
    if target is None or isinstance(value, Unknown):
        return False
    if not isinstance(value, Tensor) or value.type.dtype != "float":
        what = str(value.type) if isinstance(value, Tensor) else kind(value)
        ctx.error(scope, "E0247", f"`add` adds a tensor, and this is {what}", change.value.span, target.type.long)
        return False
    ours, theirs = target.type.dims, value.type.dims
    if len(ours) != len(theirs) or not all(a.agrees(b) for a, b in zip(ours, theirs, strict=True)):
        ctx.error(
            scope, "E0247", "`add` adds a tensor of the tap's shape", change.value.span, value.type.long,
            labels=[paths.shape_label(change.target.span, target.type)],
        )  # fmt: skip
        return False
    slot = made.slot("add")
    made.takes(value, slot)
    made.changes.append(AddToTap(target.path, slot))
    return True


# --- taps of passes -----------------------------------------------------------------------------


def inside_replaced(ctx: Context, scope: Scope, model: Model, found: ResolvedTap, expr: ast.Expr) -> bool:
    """Report a tap inside a block whose place another model's block takes: that one has no such tap here."""
    assert model.passed is not None
    index = found.path.index if found.path.kind == "layer" else None
    if found.path.kind == "module":
        blocks = paths.block_prefix(model.info)
        rest = (found.path.name or "").partition(f"{blocks}.")[2] if blocks else ""
        index = int(rest.split(".")[0]) if rest.split(".")[0].isdigit() else None
    lenders = dict(model.passed.replaced)
    if index is None or index not in lenders:
        return False
    notes: list[Note | str] = ["what goes into the block and what comes out of it can be tapped: `.in`, `.out`"]
    ctx.error(
        scope, "E0271", f"`{model.passed.name}` has no tap inside block {index}, which may be one of "
        f"`{lenders[index]}`", expr.span, "inside a replaced block", notes=notes,
    )  # fmt: skip
    return True
