"""The peak of a stage: its instructions are walked through as they run, and what is alive is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.passes.liveness import size
from gkd_dsl.graph.plan import Apply, ForwardPlan, Free, Fused, Run, StagePlan, TapPlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.planning import blocks, operators, parameters
from gkd_dsl.planning.blocks import FULL, Shape
from gkd_dsl.planning.layout import Placed, Setup, Trained
from gkd_dsl.planning.ledger import Ledger
from gkd_dsl.tiles import BLOCK_BYTES, rows_of_tile, size_on

_EARLY = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs")
"""Taps at which a block has only made its query, key and value."""

_ALIASED = ("hidden", "final", "layer", "embed", "module")


@dataclass(frozen=True)
class Model:
    """A model of a stage with what it trains and where it lives."""

    node: ModelNode
    trained: Trained
    placed: Placed


def depth(forward: ForwardPlan, node: ModelNode) -> int:
    """How many whole blocks a forward runs."""
    blocks_ = node.info.size("N") or 0
    stop = forward.stop_after
    if stop is None or stop.kind not in ("embed", "hidden", "layer"):
        return blocks_
    index = stop.index or 0
    return min(blocks_, index + 1 if stop.kind == "layer" and stop.part not in _EARLY else index)


def started(forward: ForwardPlan) -> bool:
    """Whether a forward ends inside a block, before its attention is done."""
    return forward.stop_after is not None and forward.stop_after.part in _EARLY


class Micro:
    """One micro-batch of a stage: forward and backward over a ledger that holds weights and optimiser already."""

    def __init__(
        self, stage: StagePlan, models: Mapping[str, Model], setup: Setup, shape: Shape, ledger: Ledger
    ) -> None:
        self.stage, self.models, self.setup, self.shape, self.ledger = stage, models, setup, shape, ledger
        self._forwards = {forward.key: forward for forward in stage.forwards}
        self._alive: dict[str, tuple[str, int]] = {}
        self._sizes: dict[str, int] = {}
        self._graded: set[str] = set()
        self._saved: list[Apply | Fused | ForwardPlan] = []
        self._origin: dict[str, frozenset[str]] = {}
        gradients = [step.key for step in stage.program if isinstance(step, Apply) and step.op == "gradient"]
        self._last_gradient = gradients[-1] if gradients else None

    def forward(self) -> None:
        """All instructions."""
        for step in self.stage.program:
            if isinstance(step, Run):
                self._run(self._forwards[step.forward])
            elif isinstance(step, Free):
                for key in step.keys:
                    self._drop(key)
            elif isinstance(step, Fused):
                self._fuse(step)
            else:
                self._apply(step)
        self.ledger.mark("the end of the forward")

    def backward(self, grown: bool) -> None:
        """The backward, latest first; `grown`: gradients are there from an earlier micro-batch."""
        waiting: dict[str, int] = {}
        for entry in reversed(self._saved):
            if isinstance(entry, Fused):
                self.ledger.add("losses", -self._fused_bytes(entry))
            elif isinstance(entry, Apply):
                self._apply_backward(entry, waiting)
            else:
                self._run_backward(entry, waiting, grown)
        for key in list(self._alive):
            self._drop(key)

    def _run(self, forward: ForwardPlan) -> None:
        model = self.models[forward.model]
        info, shape = model.node.info, self.shape
        scored = _scored(forward)
        for tap in forward.taps:
            self._sizes[tap.key] = size(tap.type, shape.rows, shape.length)
        graded = forward.grad and model.placed.where != "cached"
        ran = depth(forward, model.node)
        new = [tap for tap in forward.taps if not (graded and _is_kept(tap.path))]
        inside = [tap for tap in new if tap.path.kind != "logits"]
        outside = [tap for tap in new if tap.path.kind == "logits"]
        if graded:
            self._graded |= {tap.key for tap in forward.taps if tap.path.kind != "weight"}
            self._origin |= {tap.key: frozenset({forward.key}) for tap in forward.taps}
            self._saved.append(forward)
            self.ledger.add("activations", self._kept(forward))
        if model.placed.where != "cached":
            passing = blocks.transient(info, shape, scores=bool(scored)) if ran else 0
            cast = 2 * parameters.parameters(info).largest if self._casts(model) else 0
            for tap in inside:
                self._take(tap)
            self.ledger.mark(f"the forward of {forward.model}", activations=passing, chunks=model.placed.work + cast)
        else:
            for tap in inside:
                self._take(tap)
        for tap in outside:
            self._take(tap)
        self.ledger.mark(f"the logits of {forward.model}")

    def _casts(self, model: Model) -> bool:
        """Whether autocast makes copies of its weights that go at once: those of a trained one are kept and counted."""
        there = model.placed.where not in ("gemini", "cached")
        return self.setup.half and there and not model.trained.count and not self._is_half(model)

    def _is_half(self, model: Model) -> bool:
        return not model.trained.count and self.setup.holds_half(model.node)

    def _take(self, tap: TapPlan) -> None:
        logits = tap.path.kind == "logits"
        element = self.shape.element if logits else FULL
        count = self._sizes[tap.key] * element if tap.path.kind != "weight" else 0
        part = "logits" if logits else "taps"
        self._alive[tap.key] = (part, count)
        self.ledger.add(part, count)

    def _drop(self, key: str) -> None:
        found = self._alive.pop(key, None)
        if found is not None:
            self.ledger.add(found[0], -found[1])

    def _kept(self, forward: ForwardPlan) -> int:
        """Bytes of activations that a forward keeps: those of the blocks at and above the first that is trained."""
        model = self.models[forward.model]
        info, shape = model.node.info, self.shape
        ran, scored = depth(forward, model.node), _scored(forward)
        first = max(0, model.trained.first - 1)
        layers = range(first, ran)
        begun = 4 * (info.size("H") or 1) * shape.tokens * FULL if started(forward) else 0
        total = begun + blocks.edge(info, shape) if ran == (info.size("N") or 0) or first == 0 else begun
        if self.setup.checkpoint and model.trained.count:
            stream = (info.size("H") or 1) * shape.tokens * FULL
            return total + len(layers) * stream + sum(blocks.scores_bytes(info, shape) for i in layers if i in scored)
        tapped = sum(i in scored for i in layers)
        plain = len(layers) - tapped
        total += plain * blocks.kept(info, shape) if plain else 0
        return total + (tapped * blocks.kept(info, shape, scores=True) if tapped else 0)

    def _apply(self, step: Apply) -> None:
        self._sizes[step.key] = size(step.type, self.shape.rows, self.shape.length)
        inputs = [key for _, key in step.inputs if key in self._sizes]
        largest = self._largest(step)
        if step.op == "gradient":
            self._gradient(step)
            return
        graded = step.op == "project" or (step.op != "detach" and any(key in self._graded for key in inputs))
        if step.op == "detach":
            # One tensor under two names; it stays until the last of them goes.
            source = step.inputs[0][1]
            self._alive[step.key] = self._alive.pop(source, ("taps", 0))
            return
        held = operators.held(step.op)
        self.ledger.mark(f"the operator {step.op}", losses=held.while_it_runs * largest)
        count = self._sizes[step.key] * (1 if getattr(step.type, "dtype", "") == "bool" else FULL)
        self._alive[step.key] = ("losses", count)
        self.ledger.add("losses", count)
        if graded:
            self._graded.add(step.key)
            self._origin[step.key] = frozenset().union(*(self._origin.get(key, frozenset()) for key in inputs))
            self._saved.append(step)
            self.ledger.add("losses", held.for_backward * largest)

    def _gradient(self, step: Apply) -> None:
        """A gradient taken inside the step; after the last one, forwards that are for gradients alone are let go."""
        count = self._sizes[step.key] * FULL
        self._alive[step.key] = ("losses", count)
        self.ledger.add("losses", count)
        self.ledger.mark("a gradient inside the step", losses=2 * count)
        if step.key != self._last_gradient:
            return
        for entry in list(self._saved):
            if isinstance(entry, ForwardPlan) and entry.discard:
                self.ledger.add("activations", -self._kept(entry))
                self._saved.remove(entry)
            elif isinstance(entry, Apply):
                origins = self._origin[entry.key]
                if origins and all(self._forwards[key].discard for key in origins):
                    self.ledger.add("losses", -operators.held(entry.op).for_backward * self._largest(entry))
                    self._saved.remove(entry)

    def _largest(self, step: Apply) -> int:
        """Bytes of the largest input of an operator, in fp32."""
        return FULL * max((self._sizes[key] for _, key in step.inputs if key in self._sizes), default=0)

    def _fuse(self, step: Fused) -> None:
        """The gradients of the head's weight and of its input are made in the forward, tile by tile."""
        for term in step.terms:
            self._sizes[term.key] = size(term.type, self.shape.rows, self.shape.length)
        self._saved.append(step)
        self.ledger.add("losses", self._fused_bytes(step))
        heads = [self.models[head.model].node.info for head in (step.student, *step.teachers)]
        device = "cpu" if self.shape.cpu else "cuda"
        words = heads[0].size("V") or 1
        at_once = rows_of_tile(self.shape.tokens, words, self.shape.element, device)
        logits = len(heads) * words * at_once * self.shape.element
        rows = sum(self.shape.tokens * (info.size("H") or 1) * self.shape.element for info in heads)
        cast = [self.models[head.model] for head in (step.student, *step.teachers)] if self.setup.half else []
        cast = [model for model in cast if model.placed.where != "gemini" and not self._is_half(model)]
        casts = sum(2 * (m.node.info.size("V") or 1) * (m.node.info.size("H") or 1) for m in cast)
        ops = [term.op for term in step.terms]
        work = operators.copies(ops) * min(size_on(BLOCK_BYTES, device), FULL * words * self.shape.tokens)
        trims = any(value == "trim" for term in step.terms for _, value in term.attrs)
        if not self.shape.cpu and not trims and operators.in_kernel(ops):
            work = 0
        self.ledger.mark("the fused losses", losses=logits + rows + casts + work)

    def _fused_bytes(self, step: Fused) -> int:
        """Bytes of the gradients of the head's weight and of what it is given."""
        info = self.models[step.student.model].node.info
        width, words = info.size("H") or 1, info.size("V") or 1
        wide = 2 if self.setup.backend == "gemini" else FULL
        return width * (wide * words + FULL * self.shape.tokens)

    def _apply_backward(self, step: Apply, waiting: dict[str, int]) -> None:
        inputs = [key for _, key in step.inputs if key in self._sizes]
        largest = self._largest(step)
        held = operators.held(step.op)
        self.ledger.mark(f"the backward of {step.op}", losses=held.in_backward * largest)
        self.ledger.add("losses", -held.for_backward * largest)
        self.ledger.add("losses", -waiting.pop(step.key, 0))
        for key in inputs:
            if key in self._graded and key not in waiting:
                waiting[key] = self._sizes[key] * FULL
                self.ledger.add("losses", waiting[key])

    def _run_backward(self, forward: ForwardPlan, waiting: dict[str, int], grown: bool) -> None:
        model = self.models[forward.model]
        info, shape = model.node.info, self.shape
        ran, scored, first = depth(forward, model.node), _scored(forward), max(0, model.trained.first - 1)
        total = self._kept(forward)
        stream = (info.size("H") or 1) * shape.tokens * FULL
        parts = _gradient_parts(model, ran)
        arriving = {tap.key: waiting.pop(tap.key, 0) for tap in forward.taps}
        logits = sum(arriving[tap.key] for tap in forward.taps if tap.path.kind == "logits")
        held = sum(arriving.values())
        wide = 2 if self.setup.backend == "gemini" else FULL
        # With gradients from before each new one is added and let go; in Gemini it takes its parameter's place.
        grows = not grown and self.setup.backend != "gemini"

        def gradients(count: int) -> None:
            self.ledger.mark(f"the backward of {forward.model}", activations=2 * stream, gradients=wide * count)
            if grows:
                self.ledger.add("gradients", wide * count)

        gradients(parts[-1])
        self.ledger.add("losses", -logits)
        held -= logits
        used = 0
        owned = {tapped: blocks.kept(info, shape, scores=tapped) for tapped in {bool(scored), False}}
        needed = {tapped: blocks.backward(info, shape, scores=tapped) for tapped in {bool(scored), False}}
        for index in range(ran - 1, first - 1, -1):
            own, extra = owned[index in scored], needed[index in scored]
            if self.setup.checkpoint and model.trained.count:
                extra += own
                own = stream + (blocks.scores_bytes(info, shape) if index in scored else 0)
            self.ledger.mark(
                f"the backward of {forward.model}", activations=extra, gradients=wide * parts[index + 1],
                chunks=model.placed.work,
            )  # fmt: skip
            if grows:
                self.ledger.add("gradients", wide * parts[index + 1])
            self.ledger.add("activations", -own)
            used += own
        gradients(parts[0])
        if parameters.tied(info) and model.trained.first == 0 and model.trained.count:
            words = (info.size("V") or 0) * (info.size("E") or info.size("H") or 0)
            self.ledger.mark(f"the backward of {forward.model}", gradients=wide * words, activations=stream)
        self.ledger.add("losses", -held)
        self.ledger.add("activations", used - total)


def _gradient_parts(model: Model, ran: int) -> list[int]:
    """Numbers of gradients that the embeddings, each block, and what is above them get."""
    info, trained_ = model.node.info, model.trained
    layers = info.size("N") or 0
    if not trained_.count:
        return [0] * (ran + 2)
    found = parameters.parameters(info)
    if not found.exact or not layers:
        return [0] * (ran + 1) + [trained_.count]
    block = parameters.trained(info, "layer.0").count
    first = max(0, trained_.first - 1)
    own = [block if index >= first else 0 for index in range(ran)]
    left = max(0, trained_.count - block * max(0, layers - first))
    bottom = parameters.part(info, "embed").count if trained_.first == 0 else 0
    if parameters.tied(info) and bottom:
        words = (info.size("V") or 0) * (info.size("E") or info.size("H") or 0)
        bottom -= words
    return [min(bottom, left), *own, max(0, left - bottom)]


def _scored(forward: ForwardPlan) -> frozenset[int]:
    return frozenset(
        tap.path.index
        for tap in forward.taps
        if tap.path.part in ("attn.scores", "attn.probs") and tap.path.index is not None
    )


def _is_kept(path: TapPath) -> bool:
    """Whether a tap of a forward in training is a tensor that its backward keeps anyway."""
    return path.kind in _ALIASED and path.part not in ("attn.scores",)
