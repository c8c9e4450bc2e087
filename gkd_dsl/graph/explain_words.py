"""Parts of a plan in words."""

from __future__ import annotations

import networkx as nx

from gkd_dsl.graph import access
from gkd_dsl.graph.families import indices
from gkd_dsl.graph.nodes import (
    ALWAYS,
    AddToTap,
    AttrValue,
    BatchNode,
    OpNode,
    OptimSpec,
    ReplaceBlock,
    SourceSpec,
    SwapTap,
    TapNode,
)
from gkd_dsl.graph.plan import Counted, ForwardPlan
from gkd_dsl.schedules import AtCount, Schedule

_USUAL: dict[str, AttrValue] = {
    "delimiter": "auto",
    "encoding": "utf-8",
    "quoting": True,
    "add_eos": True,
    "mask_probability": 0.15,
    "seed": 0,
    "shuffle": True,
    "task": "auto",
    "workers": None,
}


def number(value: float) -> str:
    """Up to six digits, without the noise of binary fractions: `0.3`, `1e-05`."""
    return f"{value:.6g}"


def condition_words(when: Schedule) -> str:
    """When a counter advances; of one that has another condition at each of its values, the first and the last."""
    if not isinstance(when, AtCount) or len(when.cases) <= 2:
        return str(when)
    first, last = when.start, when.start + len(when.cases) - 1
    return f"{when.cases[0]} at {first}, ..., {when.cases[-1]} at {last}"


def through(ops: list[str]) -> str:
    """The operators between a tap and a loss: `W`, `self_relation`, `pool, l2norm`."""
    return ", ".join(ops)


def counted_words(graph: nx.MultiDiGraph, entry: Counted) -> tuple[str, str]:
    """Which positions of a loss count, and what its sum is divided by."""
    per_length = sum(dim.name == "L" for dim in entry.dims)
    others = [dim for dim in entry.dims if not dim.per_batch]
    if entry.valid is None:
        counts = "every text" if per_length == 0 else "every position, padding too"
    else:
        counts = condition(graph, entry.valid)
        if per_length == 0:
            counts = f"texts where {counts}"
        if per_length > 1:
            counts = f"pairs of {counts}" + (", the key not after the query" if entry.causal else "")
    for slot, key in (("token weight", entry.token_weight), ("sample weight", entry.sample_weight)):
        if key is not None:
            counts += f"; values times the {slot} {tensor(graph, key)}"
    times = "".join(f" x {dim.short} ({dim.name})" if dim.name else f" x {dim.short}" for dim in others)
    return counts, f"their number{times} over all micro-batches and ranks"


def condition(graph: nx.MultiDiGraph, key: str) -> str:
    """A mask in words: `valid tokens (attention_mask), and labels != -100, shifted to the next token`."""
    node = access.node(graph, key)
    if isinstance(node, BatchNode):
        return f"{node.column} holds"
    if not isinstance(node, OpNode):
        return key
    slots = access.inputs(graph, key)
    if node.op == "valid_tokens":
        return f"valid tokens ({tensor(graph, slots['x'])})"
    if node.op == "and":
        left, right = (_split_shift(graph, slots[slot]) for slot in ("a", "b"))
        if left[1] == right[1]:
            return f"{left[0]}, and {right[0]}" + (", shifted to the next token" if left[1] else "")
        return f"{condition(graph, slots['a'])}, and {condition(graph, slots['b'])}"
    if node.op == "or":
        return f"{condition(graph, slots['a'])}, or {condition(graph, slots['b'])}"
    if node.op == "not":
        return f"not ({condition(graph, slots['x'])})"
    if node.op in ("equal", "not_equal"):
        text, shifted = _comparison(graph, node, slots)
        return text + (", shifted to the next token" if shifted else "")
    if node.op == "next_token":
        return f"{condition(graph, slots['x'])}, shifted to the next token"
    return tensor(graph, key)


def _split_shift(graph: nx.MultiDiGraph, key: str) -> tuple[str, bool]:
    """A mask in words without its shift, and whether it is shifted."""
    node = access.node(graph, key)
    if isinstance(node, OpNode) and node.op == "next_token":
        return condition(graph, access.inputs(graph, key)["x"]), True
    if isinstance(node, OpNode) and node.op in ("equal", "not_equal"):
        return _comparison(graph, node, access.inputs(graph, key))
    return condition(graph, key), False


def _comparison(graph: nx.MultiDiGraph, node: OpNode, slots: dict[str, str]) -> tuple[str, bool]:
    sign = "!=" if node.op == "not_equal" else "=="
    left = slots["a"]
    found = access.node(graph, left)
    shifted = isinstance(found, OpNode) and found.op == "next_token"
    if shifted:
        left = access.inputs(graph, left)["x"]
    right = tensor(graph, slots["b"]) if "b" in slots else _plain(node.attr("b"))
    return f"{tensor(graph, left)} {sign} {right}", shifted


def tensor(graph: nx.MultiDiGraph, key: str) -> str:
    """A tensor as one would write it: `attention_mask`, `s.logits`, `entropy(s.logits)`."""
    node = access.node(graph, key)
    if isinstance(node, BatchNode):
        return node.column
    if isinstance(node, TapNode):
        return tap_words(node)
    if isinstance(node, OpNode):
        slots = access.inputs(graph, key)
        if node.op == "gradient":
            return f"gradient(..., at = {tensor(graph, slots['at'])})"
        found = [tensor(graph, source) for slot, source in slots.items() if slot not in ("valid", "block")]
        return f"{node.op}({', '.join(found)})"
    return key


def tap_words(tap: TapNode) -> str:
    """A tap as one would write it, by the pass that it is of: `s.hidden[3]`, `mixed.logits`."""
    return f"{pass_words(tap.key.removesuffix(f'/{tap.path.key}'), tap.model)}.{tap.path}"


def pass_words(home: str, model: str) -> str:
    """The name of a forward, by what its key begins with: that of its model, or of the pass."""
    return model if home == model else home.replace("/", ".")


def change_words(graph: nx.MultiDiGraph, forward: ForwardPlan) -> tuple[str, ...]:
    """What a pass does beside the plain forward of its model."""
    found = []
    if forward.shift:
        found.append("over the texts of other samples of the micro-batch")
    values = dict(forward.values)
    for change in forward.changes:
        when = "" if isinstance(change, AddToTap) or change.when == ALWAYS else f" when {change.when}"
        if isinstance(change, ReplaceBlock):
            blocks = f"block {change.layers[0]}" if len(change.layers) == 1 else f"blocks {indices(change.layers)}"
            found.append(f"{blocks} of {change.model} in the place of block {change.index}{when}")
        elif isinstance(change, SwapTap):
            at = values.get(f"{change.slot}.at")
            where = f" at {tensor(graph, at)}" if at is not None else ""
            found.append(f"{change.path} from {tensor(graph, values[f'{change.slot}.source'])}{where}{when}")
        else:
            found.append(f"{tensor(graph, values[change.slot])} added to {change.path}")
    if forward.discard:
        found.append("its gradient is for gradient(...) alone")
    return tuple(found)


def forward_words(forward: ForwardPlan, layers: int | None) -> str:
    """How far a forward runs: `up to layer 5 of 0..11`."""
    stop = forward.stop_after
    total = f" of 0..{layers - 1}" if layers else ""
    if stop is None:
        return "runs whole"
    if stop.kind == "hidden":
        return "the embeddings only" if not stop.index else f"up to layer {stop.index - 1}{total}"
    if stop.kind == "layer":
        return f"up to {stop.part} in layer {stop.index}{total}"
    return f"up to {stop}"


def optim_words(optim: OptimSpec) -> str:
    """An optimiser on one line."""
    text = f"{optim.name}, lr {number(optim.lr)}, warmup {optim.warmup}, decay {optim.decay}"
    if optim.name == "adamw":
        text += f", weight decay {number(optim.weight_decay)}"
    elif optim.momentum:
        text += f", momentum {number(optim.momentum)}"
    return text + (f", gradients clipped at {number(optim.clip)}" if optim.clip is not None else "")


def source_words(source: SourceSpec | None) -> str:
    """A data source as one would write it, without what is left at its usual value."""
    if source is None:
        return "not known yet: a parameter of the data has no value"
    shown = [
        f"{name} = {_plain(value)}"
        for name, value in source.args
        if value not in (None, "", ()) and not (name in _USUAL and _USUAL[name] == value)
    ]
    return f"{source.name} = {source.kind}({', '.join(shown)})"


def quoted(text: str) -> str:
    """A text as it is written in a spec."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


def _plain(value: AttrValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return str(value)
