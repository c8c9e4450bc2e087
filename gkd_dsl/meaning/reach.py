"""Whether the gradient of a loss reaches a part of a model that a stage trains."""

from __future__ import annotations

from gkd_dsl.graph.nodes import ForwardNode, OpNode, ProjectNode, TapNode, TrainTarget
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.training import Training
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.taps import TapPath


def misses(ctx: Context, key: str, trained: Training) -> list[TapNode]:
    """The taps that the gradient of a loss reaches, where all of them lie before what the stage trains; else none.

    Where nothing certain can be said (a raw path, an intervention, a model of a method), none.
    """
    taps: list[TapNode] = []
    waiting, seen = [key], {key}
    while waiting:
        node = ctx.builder.node(waiting.pop())
        if isinstance(node, OpNode) and node.op in ("detach", "gradient"):
            continue
        if isinstance(node, ProjectNode) and TrainTarget("project", node.name) in trained.targets:
            return []
        if isinstance(node, TapNode):
            inputs = ctx.builder.inputs(node.key)
            forward = ctx.builder.node(inputs["forward"]) if "forward" in inputs else None
            if not isinstance(forward, ForwardNode) or not _plain(ctx, forward) or _may_train(ctx, node, trained):
                return []
            taps.append(node)
            continue
        for producer in ctx.builder.inputs(node.key).values():
            if producer not in seen:
                seen.add(producer)
                waiting.append(producer)
    return taps


def _plain(ctx: Context, forward: ForwardNode) -> bool:
    """Whether a forward takes a model and the batch only, so that no gradient enters it from elsewhere."""
    return all(producer.startswith(("model/", "batch/")) for producer in ctx.builder.inputs(forward.key).values())


def _may_train(ctx: Context, tap: TapNode, trained: Training) -> bool:
    info = ctx.models[tap.model].info if tap.model in ctx.models else None
    depth = depth_of_tap(info, tap.path) if info is not None else None
    for target in trained.targets:
        if target.kind != "model" or target.name != tap.model:
            continue
        if info is None or depth is None or _depth_of_part(info, target.part) <= depth:
            return True
    return False


def _depth_of_part(info: ModelInfo, part: str | None) -> int:
    """0 for the embeddings (or all), i + 1 for block i, one more for what is behind them, then a head of its own."""
    if part is not None and part.startswith("layer."):
        return int(part.removeprefix("layer.")) + 1
    if part == "rest":
        return (info.size("N") or 0) + 1
    # The head of a language model may share its weight with the embeddings.
    if part == "head" and info.task == "classification":
        return (info.size("N") or 0) + 2
    # Adapters are in the blocks alone.
    return 0 if info.build.lora is None else 1


def depth_of_tap(info: ModelInfo, path: TapPath) -> int | None:
    """The deepest part that a tap comes from; None where it is not known."""
    count = info.size("N")
    if count is None or path.kind in ("weight", "module"):
        return None
    if path.kind == "embed":
        return 0
    if path.kind == "hidden":
        return path.index
    if path.kind == "layer":
        return None if path.index is None else path.index + 1
    return count + (2 if path.kind == "logits" else 1)
