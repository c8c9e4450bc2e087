"""Tensors from inside a forward: hooks put on for one pass and taken off after it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gkd_dsl.models.errors import TapError, near_misses
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import Hook, canonical, hook, unavailable
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.adapters import effective
from gkd_dsl.runtime.models.attention import Recorder, recomputing, tapped
from gkd_dsl.runtime.models.interventions import Edits, applied
from gkd_dsl.runtime.ops.common import end_token

_Placed = tuple[list[tuple[nn.Module, str, int, list[TapPath]]], dict[nn.Module, dict[str, list[TapPath]]]]

_LOGITS = TapPath("logits")
_FINAL = TapPath("final")


class _Stop(BaseException):
    """Ends a forward after its last needed tap. Not an Exception, so no model code takes it for a failure."""


class _State:
    """What the hooks of one attachment share."""

    def __init__(self, stop: TapPath | None) -> None:
        self.values: dict[TapPath, Tensor] = {}
        self.stop = stop
        self.depth = 0
        self.inside_checkpoint = 0
        self.stopping = False

    def begin(self) -> None:
        if self.depth == 0:
            self.values.clear()
            self.stopping = False
        self.depth += 1

    def end(self) -> None:
        self.depth -= 1

    def record(self, paths: Sequence[TapPath], value: Tensor) -> None:
        """Keep a value; a recomputation (outside a forward) and what comes after the last needed tap do not count."""
        if self.depth == 0 or self.stopping:
            return
        for path in paths:
            if path in self.values:
                raise TapError(f"the module of `{path}` is called more than once in a forward: it has no single value")
            self.values[path] = value
        if self.stop in paths:
            if not self.inside_checkpoint:
                raise _Stop
            # a checkpointed block must run to its end to be recomputed
            self.stopping = True


class Capture(Mapping[TapPath, Tensor]):
    """The taps of the latest forward, by path. Holds references, makes no copies."""

    def __init__(self, tapper: Tapper, paths: Sequence[TapPath], state: _State) -> None:
        self._tapper = tapper
        self._paths = tuple(paths)
        self._state = state
        self._mask: Tensor | None = None

    def __getitem__(self, path: TapPath) -> Tensor:
        if path not in self._paths:
            raise KeyError(path)
        return self._tapper._finished(path, self._state.values, self._mask)

    def __iter__(self) -> Iterator[TapPath]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Tapper:
    """Takes taps from a model without changing it: its class, config and state are as before afterwards."""

    def __init__(self, model: PreTrainedModel, info: ModelInfo) -> None:
        self.model = model
        self.info = info
        self.base: nn.Module = model.base_model
        self._modules = dict(model.named_modules())
        self._configs = configs_of(model)
        self._base_inputs = set(inspect.signature(self.base.forward).parameters)
        self._model_inputs = set(inspect.signature(model.forward).parameters)
        self._inside = set(self.base.modules())
        self._blocks = [module for module in self._modules.values() if isinstance(module, GradientCheckpointingLayer)]
        self._places: dict[TapPath, tuple[nn.Module, Hook]] = {}
        self._plans: dict[tuple[tuple[TapPath, ...], TapPath | None], _Placed] = {}

    @contextmanager
    def attach(self, paths: Sequence[TapPath]) -> Iterator[Capture]:
        """Within, each forward of the model (or of its base model) fills the capture with these taps.

        Raises TapError for a tap that the model lacks.
        """
        with self._attached(paths, None) as state:
            capture = Capture(self, paths, state)

            def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if state.depth == 0:
                    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
                    capture._mask = given.get("attention_mask")
                state.begin()

            def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                state.end()
                if module is self.model and hasattr(output, "logits"):
                    state.values[_LOGITS] = output.logits

            roots = list(dict.fromkeys((self.model, self.base)))
            handles: list[Any] = []
            try:
                for root in roots:
                    handles.append(root.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
                    handles.append(root.register_forward_hook(end, always_call=True))
                yield capture
            finally:
                for handle in handles:
                    handle.remove()

    def run(
        self,
        inputs: Mapping[str, Tensor],
        paths: Sequence[TapPath],
        stop_after: TapPath | None = None,
        changes: Edits | None = None,
    ) -> dict[TapPath, Tensor]:
        """One forward, and these taps of it; with `stop_after` nothing beyond that tap is computed.

        `inputs` holds `input_ids` `[B, L]` and `attention_mask` `[B, L]` (right or left padding), and
        `token_type_ids` for models that tell token types apart. The head is run only for `logits` or a tap in it.
        Inside a block under gradient checkpointing, the forward stops at the end of that block. Taps at or after a
        place of `changes` give the changed values.

        Raises TapError for a tap that the model lacks, or that its forward does not reach.
        """
        found = {path: readable(self._weight(path)) for path in paths if path.kind == "weight"}
        wanted = [path for path in paths if path.kind != "weight"]
        if not wanted:
            return found
        whole = self._needs_head(wanted)
        module = self.model if whole else self.base
        arguments = self._arguments(inputs, self._model_inputs if whole else self._base_inputs)
        stop = canonical(self.info, stop_after) if stop_after is not None else None
        output: Any = None
        with self._changed(changes), self._attached(wanted, _at_hook(self.info, stop)) as state:
            state.begin()
            try:
                output = module(**arguments)
            except _Stop:
                pass
            finally:
                state.end()
            if output is not None and any(path.kind == "logits" for path in wanted):
                state.values[_LOGITS] = output.logits
            mask = inputs.get("attention_mask")
            found |= {path: plain(self._finished(path, state.values, mask)) for path in wanted}
            state.values.clear()
        return {path: found[path] for path in paths}

    def blocks(self, layers: Sequence[int]) -> list[nn.Module]:
        """The modules of blocks, by their indices."""
        return [self.place(canonical(self.info, TapPath("layer", index, "out")))[0] for index in layers]

    def _changed(self, changes: Edits | None) -> AbstractContextManager[None]:
        return applied(changes, self.place, self._configs) if changes else nullcontext()

    def place(self, path: TapPath) -> tuple[nn.Module, Hook]:
        """The module and the hook of a canonical tap.

        Raises TapError where there is none.
        """
        if path not in self._places:
            spec = hook(self.info, path)
            prefix = "" if self.base is self.model else f"{self.model.base_model_prefix}."
            self._places[path] = (self._module(spec.module, prefix, path), spec)
        return self._places[path]

    def _module(self, name: str, prefix: str, path: TapPath) -> nn.Module:
        """A module by its name in the whole model or, failing that, in the base model."""
        order = (name, prefix + name) if path.kind == "module" else (prefix + name if name else prefix[:-1],)
        for candidate in order:
            if candidate in self._modules:
                return self._modules[candidate]
        near = near_misses(name, [known for known in self._modules if known])
        hint = f"did you mean {near[0]}?" if near else f"the modules at the top are {', '.join(self._top())}"
        raise TapError(f'there is no module "{name}" in {type(self.model).__name__}', hint=hint, near=near)

    def _top(self) -> list[str]:
        return [name for name, _ in self.model.named_children()]

    def _weight(self, path: TapPath) -> Tensor:
        name = path.name or ""
        if name in ("id_map", "kept_ids"):
            found = getattr(self.model.get_input_embeddings(), name, None)
            if found is not None:
                return found
        for root in (self.model, self.base):
            try:
                return effective(root, name, root.get_parameter(name))
            except AttributeError:
                continue
        near = near_misses(name, [known for known, _ in self.model.named_parameters()])
        hint = f"did you mean {near[0]}?" if near else ""
        raise TapError(f'there is no parameter "{name}" in {type(self.model).__name__}', hint=hint, near=near)

    def _needs_head(self, paths: Sequence[TapPath]) -> bool:
        if self.base is self.model or any(path.kind == "logits" for path in paths):
            return True
        return any(path.kind == "module" and self.place(path)[0] not in self._inside for path in paths)

    def _arguments(self, inputs: Mapping[str, Tensor], accepted: set[str]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name in ("input_ids", "attention_mask", "position_ids", "inputs_embeds"):
            if inputs.get(name) is not None and name in accepted:
                arguments[name] = inputs[name]
        mask = inputs.get("attention_mask")
        if self.info.family == "gpt2" and mask is not None and "position_ids" not in arguments:
            # Its positions are learned and counted from the first column, where a text padded on the left has none.
            places = torch.arange(mask.shape[1], device=mask.device)
            arguments["position_ids"] = (places - mask.int().argmax(1, keepdim=True)).clamp_min(0)
        # RoBERTa has one token type and GPT-2 none: what another model's tokenizer says means nothing to them
        types = getattr(self.model.config, "type_vocab_size", 0) or 0
        if types > 1 and inputs.get("token_type_ids") is not None and "token_type_ids" in accepted:
            arguments["token_type_ids"] = inputs["token_type_ids"]
        if "use_cache" in accepted:
            arguments["use_cache"] = False
        return arguments | {"return_dict": True}

    def _finished(self, path: TapPath, values: Mapping[TapPath, Tensor], mask: Tensor | None) -> Tensor:
        """A tap from what its hook recorded: heads split, the token that stands for a text picked."""
        if path.kind == "weight":
            return self._weight(path)
        source = canonical(self.info, _FINAL if path.kind == "cls" else path)
        if source not in values:
            raise TapError(f"the forward of {type(self.model).__name__} ends before `{path}`, or does not reach it")
        value = values[source]
        if path.kind == "cls":
            return end_token(value, mask, self.info.left_to_right)
        if path.kind == "logits":
            return value
        _, spec = self.place(source)
        return _transformed(value, spec)

    def _placed(self, paths: tuple[TapPath, ...], stop: TapPath | None) -> _Placed:
        """Which module gives which taps; found once for each set of taps."""
        if (paths, stop) in self._plans:
            return self._plans[paths, stop]
        needed = dict.fromkeys(canonical(self.info, _FINAL if path.kind == "cls" else path) for path in paths)
        if stop is not None:
            needed[stop] = None
        by_place: dict[tuple[nn.Module, str, int], list[TapPath]] = defaultdict(list)
        for path in needed:
            if why := unavailable(self.info, path):
                raise TapError(f"no tap `{path}`: {why}", kind="unavailable", hint=why)
            if path.kind not in ("logits", "weight"):
                module, spec = self.place(path)
                by_place[module, spec.side, spec.index].append(path)
        scored: dict[nn.Module, dict[str, list[TapPath]]] = defaultdict(dict)
        for (module, side, _), there in by_place.items():
            if side in ("scores", "probs"):
                scored[module][side] = there
        plan = ([(*place, there) for place, there in by_place.items()], dict(scored))
        self._plans[paths, stop] = plan
        return plan

    @contextmanager
    def _attached(self, paths: Sequence[TapPath], stop: TapPath | None) -> Iterator[_State]:
        state = _State(stop)
        by_place, scored = self._placed(tuple(paths), stop)
        handles: list[Any] = []
        with ExitStack() as stack:
            stack.callback(lambda: [handle.remove() for handle in handles])
            for module, side, index, there in by_place:
                if side == "output":
                    handles.append(module.register_forward_hook(partial(_after, state, there, index)))
                elif side == "input":
                    before = partial(_before, state, there, index)
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            recorders: dict[nn.Module, Recorder] = {
                module: partial(_scored, state, wanted) for module, wanted in scored.items()
            }
            self._watch_checkpoints(stack, state, {module for module, *_ in by_place}, set(scored))
            if scored:
                stack.enter_context(tapped(recorders, self._configs))
            yield state

    def _watch_checkpoints(
        self, stack: ExitStack, state: _State, tapped_modules: set[nn.Module], scored: set[nn.Module]
    ) -> None:
        """Let blocks under gradient checkpointing stop at their end, and recompute scores as they were computed."""
        for block in self._blocks:
            if not (block.gradient_checkpointing and block.training):
                continue
            inside = set(block.modules())
            if not (tapped_modules & inside):
                continue
            original = block._gradient_checkpointing_func
            _refuse_reentrant(original)
            block._gradient_checkpointing_func = _checkpointed(original, state, scored & inside, self._configs)
            stack.callback(setattr, block, "_gradient_checkpointing_func", original)


def plain(value: Tensor) -> Tensor:
    """A tensor of a class that a backend gives parameters, as a plain one, with its gradient."""
    if type(value) in (Tensor, nn.Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def readable(weight: Tensor) -> Tensor:
    """A weight that any code can read: one of a backend's class is there only while an operation of torch reads it."""
    return weight if type(weight) in (Tensor, nn.Parameter) else plain(weight.clone())


def configs_of(model: nn.Module) -> list[Any]:
    """The config objects that the attention modules read, each once."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _at_hook(info: ModelInfo, stop: TapPath | None) -> TapPath | None:
    """The path at whose hook a forward stops; logits and the pooler need all of it."""
    if stop is None or stop.kind in ("logits", "pooled", "weight"):
        return None
    return canonical(info, _FINAL) if stop.kind == "cls" else stop


def _element(value: Any, index: int, paths: Sequence[TapPath]) -> Tensor:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        value = value[index]
    if not isinstance(value, Tensor):
        raise TapError(f"the module of `{paths[0]}` deals in a {type(value).__name__}, not a tensor")
    return value


def _after(state: _State, paths: Sequence[TapPath], index: int, module: nn.Module, args: Any, output: Any) -> None:
    state.record(paths, _element(output, index, paths))


def _before(
    state: _State,
    paths: Sequence[TapPath],
    index: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = args[index] if len(args) > index else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    state.record(paths, _element(given, index, paths))


def _scored(state: _State, wanted: Mapping[str, list[TapPath]], what: str, value: Tensor) -> None:
    if what in wanted:
        state.record(wanted[what], value)


def _checkpointed(original: Any, state: _State, scored: set[nn.Module], configs: Sequence[Any]) -> Any:
    """A checkpoint function that knows a block's first run from its recomputation."""

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        ran = False

        def block(*inner: Any, **more: Any) -> Any:
            nonlocal ran
            if ran:
                with recomputing(scored, configs if scored else ()):
                    return function(*inner, **more)
            ran = True
            state.inside_checkpoint += 1
            try:
                return function(*inner, **more)
            finally:
                state.inside_checkpoint -= 1

        result = original(block, *args, **kwargs)
        if state.stopping:
            raise _Stop
        return result

    return checkpoint


def _refuse_reentrant(function: Any) -> None:
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise TapError(
            "taps inside blocks get no gradient under reentrant checkpointing",
            kind="unavailable",
            hint='enable it with gradient_checkpointing_kwargs={"use_reentrant": False}',
        )


def _transformed(value: Tensor, spec: Hook) -> Tensor:
    if spec.transform == "none":
        return value
    if spec.transform == "swap":
        return value.transpose(1, 2)
    if spec.transform.startswith("fused."):
        value = value.chunk(3, dim=-1)[int(spec.transform[-1])]
    return value.unflatten(-1, (spec.heads or 1, -1)).transpose(1, 2)
