"""The graph as JSON, and back, without loss.

A value of a class is an object with its fields and `is`, its name in a table; a tuple is a list; a mapping is
`{"is": "map", "items": [[key, value], ...]}`.
No name in a text is ever imported. Texts that nodes were written in are kept
once, under `sources`, with their characters, so that lines and columns can be told from offsets after reading.
Configs and vocabularies are as the check saw them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.graph import nodes
from gkd_dsl.graph.access import natural
from gkd_dsl.models.info import Build, Kept, Lora, ModelInfo, Quantised, Vocabulary
from gkd_dsl.models.taps import TapPath
from gkd_dsl.text import Location, Source, Span
from gkd_dsl.types import Dim, LossType, TensorType

VERSION = 1

_NODES: dict[str, type] = {
    "model": nodes.ModelNode,
    "batch": nodes.BatchNode,
    "forward": nodes.ForwardNode,
    "tap": nodes.TapNode,
    "project": nodes.ProjectNode,
    "op": nodes.OpNode,
    "loss": nodes.LossNode,
    "metric": nodes.MetricNode,
    "counter": nodes.CounterNode,
    "policy": nodes.PolicyNode,
    "stage": nodes.StageNode,
}
_VALUES: dict[str, type] = {
    "ModelInfo": ModelInfo,
    "Build": Build,
    "Kept": Kept,
    "Lora": Lora,
    "Quantised": Quantised,
    "Vocabulary": Vocabulary,
    "TapPath": TapPath,
    "ReplaceBlock": nodes.ReplaceBlock,
    "SwapTap": nodes.SwapTap,
    "AddToTap": nodes.AddToTap,
    "Dim": Dim,
    "Tensor": TensorType,
    "Loss": LossType,
    "Duration": schedules.Span,
    "Constant": schedules.Constant,
    "Ramp": schedules.Ramp,
    "Cosine": schedules.Cosine,
    "StepAt": schedules.StepAt,
    "Arithmetic": schedules.Arithmetic,
    "InDrawnMap": schedules.InDrawnMap,
    "Stairs": schedules.Stairs,
    "Coin": schedules.Coin,
    "Draw": schedules.Draw,
    "Comparison": schedules.Comparison,
    "Logic": schedules.Logic,
    "Not": schedules.Not,
    "CounterValue": schedules.CounterValue,
    "AtCount": schedules.AtCount,
    "StageProgress": schedules.StageProgress,
    "Recent": schedules.Recent,
    "Optim": nodes.OptimSpec,
    "Train": nodes.TrainTarget,
    "Evaluate": nodes.EvaluateSpec,
    "Source": nodes.SourceSpec,
    "Location": Location,
    "Place": Span,
}
_CLASSES = {**_NODES, **_VALUES}
_NAMES = {class_: name for name, class_ in _CLASSES.items()}
_PLACES = ("locations", "location")


def to_json(graph: nx.MultiDiGraph) -> str:
    """The graph as text: nodes in the natural order of their keys, then edges. Raises TypeError for a foreign value."""
    writer = _Writer()
    found = [writer.value(graph.nodes[key]["node"]) for key in sorted(graph, key=natural)]
    document = {"gkd_graph": VERSION, "sources": writer.sources, "nodes": found, "edges": _edges(graph)}
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> nx.MultiDiGraph:
    """The graph of a text. Raises ValueError, with what is wrong, for any other text than `to_json` gives."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(document, dict) or "gkd_graph" not in document:
        raise ValueError("not a graph: there is no `gkd_graph`")
    if document["gkd_graph"] != VERSION:
        raise ValueError(f"version {document['gkd_graph']!r} of a graph; this program reads version {VERSION}")
    for part in ("sources", "nodes", "edges"):
        if not isinstance(document.get(part), list):
            raise ValueError(f"a graph has a list of {part}")
    reader = _Reader(document["sources"])
    graph = nx.MultiDiGraph()
    for entry in document["nodes"]:
        try:
            node = reader.value(entry)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a node: {_short(entry)}: {error}") from None
        if not isinstance(node, nodes.GraphNode):
            raise ValueError(f"not a node: {_short(entry)}")
        if node.key in graph:
            raise ValueError(f"two nodes have the key {node.key!r}")
        graph.add_node(node.key, node=node)
    for entry in document["edges"]:
        if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry)):
            raise ValueError(f"not an edge [producer, consumer, slot]: {_short(entry)}")
        for key in entry[:2]:
            if key not in graph:
                raise ValueError(f"an edge {entry[0]} -> {entry[1]} of a node that is not there: {key!r}")
        graph.add_edge(entry[0], entry[1], slot=entry[2])
    _count_edges(graph)
    return graph


def fingerprint(graph: nx.MultiDiGraph) -> str:
    """sha256 of all that a graph computes: its nodes and edges without places and texts of the spec."""
    writer = _Writer(places=False)
    found = [writer.value(graph.nodes[key]["node"]) for key in sorted(graph, key=natural)]
    document = {"gkd_graph": VERSION, "nodes": found, "edges": _edges(graph)}
    text = json.dumps(document, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _edges(graph: nx.MultiDiGraph) -> list[list[str]]:
    found = [[source, target, slot] for source, target, slot in graph.edges(data="slot")]
    return sorted(found, key=lambda edge: (natural(edge[1]), natural(edge[2]), natural(edge[0])))


def _count_edges(graph: nx.MultiDiGraph) -> None:
    """Raise ValueError where a node has other inputs than its kind needs."""
    for key, data in graph.nodes(data=True):
        node, slots = data["node"], [slot for _, _, slot in graph.in_edges(key, data="slot")]
        if len(set(slots)) != len(slots):
            raise ValueError(f"{key}: a slot is filled twice: {sorted(slots)}")
        match node:
            case nodes.ModelNode() | nodes.BatchNode() | nodes.ProjectNode() | nodes.PolicyNode():
                needed: set[str] | None = set()
            case nodes.TapNode():
                needed = {"forward"}
            case nodes.LossNode(coefficients=coefficients):
                needed = {str(number) for number in range(len(coefficients))}
            case nodes.StageNode(weights=weights):
                needed = {str(number) for number in range(len(weights))}
                slots = [slot for slot in slots if not slot.startswith(("metric.", "counter.", "policy.", "reward."))]
            case nodes.ForwardNode(changes=changes):
                needed = {"model", *(slot for change in changes for slot in nodes.change_slots(change))}
                slots = [slot for slot in slots if slot == "model" or ("." in slot and not slot.endswith(".at"))]
            case _:
                needed = None
        if needed is not None and set(slots) != needed:
            raise ValueError(f"{key}: its inputs are {sorted(slots)}, and should be {sorted(needed)}")


class _Writer:
    """Values to JSON; `sources` are the texts met on the way."""

    def __init__(self, *, places: bool = True) -> None:
        self.places = places
        self.sources: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}

    def value(self, value: object) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"is": "float", "value": repr(value)}
        if isinstance(value, tuple):
            return [self.value(item) for item in value]
        if isinstance(value, list):
            return {"is": "list", "items": [self.value(item) for item in value]}
        if isinstance(value, Mapping):
            pairs = [[self.value(key), self.value(item)] for key, item in value.items()]
            return {"is": "map", "items": pairs if self.places else sorted(pairs, key=json.dumps)}
        if isinstance(value, Source):
            return self._source(value)
        name = _NAMES.get(type(value))
        if name is None:
            raise TypeError(f"a graph holds no {type(value).__name__}")
        found: dict[str, Any] = {"is": name}
        for field in fields(value):  # type: ignore[arg-type]
            if not self.places and (field.name in _PLACES or (name == "loss" and field.name == "text")):
                continue
            if not self.places and name == "Dim" and field.name == "origin":
                continue
            found[field.name] = self.value(getattr(value, field.name))
        return found

    def _source(self, source: Source) -> int:
        # A text is known by itself: two with one name can differ.
        number = self._numbers.get(id(source))
        if number is None:
            number = self._numbers[id(source)] = len(self.sources)
            path = None if source.path is None else str(source.path)
            self.sources.append({"name": source.name, "path": path, "text": source.text})
        return number


class _Reader:
    """Values from JSON."""

    def __init__(self, sources: list[Any]) -> None:
        self.sources = []
        for entry in sources:
            if not isinstance(entry, dict) or not {"name", "path", "text"} <= set(entry):
                raise ValueError(f"not a source: {_short(entry)}")
            path = None if entry["path"] is None else Path(entry["path"])
            self.sources.append(Source(entry["name"], entry["text"], path))

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self.value(item) for item in value)
        if not isinstance(value, dict):
            return value
        kind = value.get("is")
        if kind == "map":
            return {self.value(key): self.value(item) for key, item in value["items"]}
        if kind == "list":
            return [self.value(item) for item in value["items"]]
        if kind == "float":
            return float(value["value"])
        class_ = _CLASSES.get(kind) if isinstance(kind, str) else None
        if class_ is None:
            raise ValueError(f"a graph holds no {kind!r}")
        given = {name: item for name, item in value.items() if name != "is"}
        known = {field.name for field in fields(class_)}
        if set(given) != known:
            raise ValueError(f"{kind}: its fields are {sorted(given)}, and should be {sorted(known)}")
        if class_ is Span:
            number = given.pop("source")
            if not isinstance(number, int) or not 0 <= number < len(self.sources):
                raise ValueError(f"there is no source {number!r}")
            return Span(self.sources[number], **given)
        return class_(**{name: self.value(item) for name, item in given.items()})


def _short(entry: object) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
