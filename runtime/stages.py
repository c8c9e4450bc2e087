"""All stages of a spec: models made, trained and handed on; state saved and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.models.describe import describe
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime import checkpoint, rng
from gkd_dsl.runtime.backends.base import Backend, Settings
from gkd_dsl.runtime.backends.make import make_backend
from gkd_dsl.runtime.checkpoint import Position, State
from gkd_dsl.runtime.errors import CANNOT_RUN, CHECKPOINT, RunError, Stopped, in_memory
from gkd_dsl.runtime.evaluate import Evaluator
from gkd_dsl.runtime.extensions import load_extensions
from gkd_dsl.runtime.fingerprint import fingerprint
from gkd_dsl.runtime.interrupt import StopRequest
from gkd_dsl.runtime.logs import RunLog, evaluations
from gkd_dsl.runtime.loop import Loader, StageLoop, length_of
from gkd_dsl.runtime.models import adapters
from gkd_dsl.runtime.models.halved import halve, saved_in, untrained
from gkd_dsl.runtime.models.load import load, load_tokenizer
from gkd_dsl.runtime.policy import Policy, make_policies
from gkd_dsl.runtime.records import EvaluateRecord, Listener, StageRecord, StepRecord
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.step import Batch, StepModule, make_projections
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.make import Made, Place, Placement, make_teachers, placements, source_of
from gkd_dsl.schedules import Clock

_PLAN = "plan.json"
Loaders = Callable[[StagePlan], Loader]


@dataclass
class RunResult:
    """What a run leaves in memory: the models and projections by name, the loaders and last metrics by stage."""

    models: dict[str, PreTrainedModel]
    projections: dict[str, nn.Module]
    loaders: dict[str, Loader]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


class Run:
    """A spec being run.

    Models are made when a stage first needs them: a student cut out of a teacher that an earlier stage trains starts
    from what was trained. `loaders` and `models` replace what would be made from the plan; `root` is the folder that
    relative paths of data start from. Without a folder nothing is saved.
    """

    def __init__(
        self,
        plan: SpecPlan,
        *,
        folder: RunFolder | None = None,
        root: Path | None = None,
        listeners: Sequence[Listener] = (),
        backend: Backend | None = None,
        loaders: Loaders | None = None,
        models: Mapping[str, PreTrainedModel] | None = None,
    ) -> None:
        self.plan, self.folder, self.root = plan, folder, root if root is not None else Path.cwd()
        load_extensions(plan, self.root)
        self.backend: Backend = backend if backend is not None else make_backend(plan)
        self.processes = self.backend.processes
        self.models: dict[str, PreTrainedModel] = {
            name: self.backend.place(model) for name, model in (models or {}).items()
        }
        self.projections: dict[str, nn.Module] = {}
        self.policies: dict[str, Policy] = {}
        self.loaders: dict[str, Loader] = {}
        self._given, self._listeners = loaders, tuple(listeners)
        self._infos, self._seeds = _models(plan)
        self._placements = placements(plan.runtime)
        if getattr(self.backend, "kind", "local") != "gemini":
            # One process reads a run back; what was in chunks then comes from host memory.
            in_host = {n: replace(how, place="offload") for n, how in self._placements.items() if how.place == "gemini"}
            self._placements |= in_host
        settings = getattr(self.backend, "settings", None)
        half = untrained(plan, settings.precision) if settings is not None else {}
        # What goes into Gemini's chunks is cast by them.
        self._half = {n: dtype for n, dtype in half.items() if self._placed_as(n) != "gemini"}
        self._streamed: dict[str, TeacherSource] = {}
        self._fingerprint = fingerprint(plan)
        self._changed: set[str] = set()
        self._best: dict[str, dict[str, Tensor]] = {}
        self._metrics = _Latest()

    def run(self, *, resume: bool = False) -> RunResult:
        """Run all stages, or go on from the last checkpoint of the folder.

        Raises Stopped when asked to stop (the state is saved then), and RunError: another spec's checkpoint, a loss
        that is not finite, too little memory, a folder that cannot be written.
        """
        state = self._resumed() if resume else None
        with ExitStack() as stack:
            listeners = [*self._listeners, self._metrics]
            if self.folder is not None and self.processes.main:
                if not resume:
                    self.folder.write_json(_PLAN, self._fingerprint)
                begun = Position("", -1) if resume else None
                listeners.insert(0, RunLog(self.folder, state.position if state is not None else begun))
            for listener in listeners:
                stack.callback(listener.close)
            stop = stack.enter_context(StopRequest())
            self.processes.wait()
            if state is not None and self.folder is not None:
                for record in evaluations(self.folder):
                    self._metrics.on_evaluate(record)
                with self.enough("take up the saved state"):
                    self._restore(state)
            for stage in self.plan.stages:
                order = stage.stage.order
                if state is not None and order < state.position.order:
                    continue
                if state is not None and order == state.position.order:
                    if not state.position.finished:
                        self._stage(stage, listeners, stop, state)
                        self._release(stage)
                    continue
                self._stage(stage, listeners, stop, None)
                self._release(stage)
        return RunResult(self.models, self.projections, self.loaders, self._metrics.found)

    def loader(self, plan: StagePlan) -> Loader:
        """The batches of a stage."""
        if plan.name not in self.loaders:
            # What the first process has read and tokenised, the others find in the cache.
            with self.processes.main_first():
                self.loaders[plan.name] = self._given(plan) if self._given is not None else _loader(plan, self.root)
        return self.loaders[plan.name]

    def model(self, name: str) -> PreTrainedModel:
        """A model of the spec, made when first asked for."""
        if name not in self.models:
            info = self._infos[name]
            base = info.build.base
            if base is not None and base not in self._infos:
                # The plan leaves out a model that no stage runs.
                self._infos[base] = info.build.origin or describe(info.path or info.location)
                self._seeds[base] = self._seeds[name]
            if base is not None:
                self.model(base)
            kept = info.build.kept
            if kept is not None and kept.like is not None and kept.like_info is not None:
                self._infos.setdefault(kept.like, kept.like_info)
                self._seeds.setdefault(kept.like, self._seeds[name])
                self.model(kept.like)
            if name in self.models:
                return self.models[name]
            with self.enough(f"load `{name}`"):
                made = self._loaded(name)
            elsewhere = self._placed_as(name) in ("offload", "disk", "gemini")
            with self.enough(f"bring `{name}` to its device"):
                self.models[name] = made if elsewhere else self.backend.place(made)
            if base is not None or kept is not None:
                self._changed.add(name)
        return self.models[name]

    def _loaded(self, name: str) -> PreTrainedModel:
        """A model as a run holds it: what no stage trains in half precision, once others have what they copy of it."""
        info, half = self._infos[name], self._half.get(name)
        copies = [other for other, found in self._infos.items() if name in _starts(found)] if half is not None else []
        first = None if half is None or (copies and not saved_in(info, half)) else half
        trained = any(
            (target.kind, target.name) == ("model", name) for stage in self.plan.stages for target in stage.stage.trains
        )
        made = load(
            info, models=self.models, seed=self._seeds[name], root=self.root, half=first, trained=trained
        )  # fmt: skip
        if half is not None and first is None:
            self.models[name] = made
            for other in copies:
                self.model(other)
            halve(made, half)
        return made

    def whole(self, name: str) -> PreTrainedModel:
        """A model with the weights that it was saved with, or was trained to have."""
        if name in self._half:
            return load(self._infos[name], models=self.models, seed=self._seeds[name], root=self.root)
        return self.model(name)

    def _placed_as(self, name: str) -> str:
        return self._placements.get(name, Placement()).place

    def enough(self, doing: str, stage: StagePlan | None = None, more: str = "") -> AbstractContextManager[None]:
        """Where memory runs out, a RunError says so: what was done, what was alive, the plan, and what to change."""

        def words(error: BaseException) -> tuple[str, str]:
            from gkd_dsl.runtime.memory import of_models, run_words

            held: dict[str, int] = getattr(self.backend, "alive", dict)()
            live = {**of_models(self.models), **{part: count for part, count in held.items() if part != "weights"}}
            settings = getattr(self.backend, "settings", None) or Settings.of(self.plan.runtime)
            message, hint = run_words(
                doing, self.plan, stage, live, self.backend.device, settings, processes=self.processes.count,
                error=error,
            )  # fmt: skip
            return message, f"{more}; {hint}" if more else hint

        return in_memory(words)

    def seed(self, model: str) -> int:
        """The seed of a model's new weights."""
        return self._seeds.get(model, 0)

    def _at(self, plan: StagePlan) -> Place:
        return Place(
            self.model,
            student_of(plan),
            self._seeds,
            self.backend.device,
            self.root,
            self.folder.path if self.folder is not None else None,
            alone=self.processes.count == 1,
            streamed=self._streamed,
            half=self._half,
            chunks=dict(self.plan.runtime),
        )

    def alone(self, plan: StagePlan, name: str) -> TeacherSource:
        """A model of a stage that no stage trains, run by itself: in memory, or streamed where it is placed so."""
        node = next(node for node in plan.models if node.name == name)
        return source_of(node, self._placements.get(name, Placement()), self._at(plan), {})

    def placed(self, plan: StagePlan) -> Made:
        """A stage whose models have their places; those whose outputs are stored are not made. Raises RunError."""
        with self.enough(f"load the models of stage `{plan.name}`", plan):
            made = make_teachers(plan, self._placements, self.loader(plan), self._at(plan))
        for name, placement in self._placements.items():
            # A student that starts from its weights has them by now.
            if placement.place in ("cached", "disk", "gemini"):
                self.models.pop(name, None)
                self._changed.discard(name)
        return made

    def _stage(self, plan: StagePlan, listeners: Sequence[Listener], stop: StopRequest, state: State | None) -> None:
        loader = self.loader(plan)
        length = length_of(plan.stage, loader)
        if plan.stage.evaluate and next(iter(loader.held_out()), None) is None:
            raise RunError(
                CANNOT_RUN,
                f"stage `{plan.name}` evaluates, and its source holds nothing out",
                "add `held_out = 10%` to the source",
            )
        made = self.placed(plan)
        plan, loader, models = made.plan, made.loader, made.models
        self.make_projections(plan)
        self.make_policies(plan)
        blocks = {node.name: self.projections[node.name] for node in plan.projections}
        step = StepModule(plan, models, blocks, made.teachers, policies=self.policies)
        self._changed |= set(step.trained)
        with self.enough(f"begin stage `{plan.name}`", plan):
            self.backend.begin(step, plan.stage.optim)
        position = state.position if state is not None else Position(plan.name, plan.stage.order)
        try:
            if state is not None:
                self.backend.load_optimizer_state(state.optimizer)
            else:
                for policy in self.policies.values():
                    policy.forget()
                if self.folder is not None and self.processes.main:
                    self.folder.checkpoints.drop_best()
            record = StageRecord(
                plan.name,
                plan.stage.order,
                len(self.plan.stages),
                position.step,
                length.total_steps,
                tuple(loss.name for loss in plan.losses),
                tuple(item.metric.name for item in plan.metrics),
                sum(parameter.numel() for _, parameter in step.trainable()),
                {counter.name: counter.stop for counter in plan.counters},
            )
            for listener in listeners:
                listener.on_stage(record)
            evaluator = Evaluator(plan, models, step.projections, self.policies, made.sources)

            def evaluate(
                names: Sequence[str], batches: Iterable[Batch], backend: Backend, clock: Clock
            ) -> dict[str, float]:
                with self.enough(f"evaluate in stage `{plan.name}`", plan):
                    return evaluator(names, batches, backend, clock)

            def save(position: Position, best: bool) -> None:
                with self.enough(f"save the state of stage `{plan.name}`", plan):
                    self._save(position, best)

            loop = StageLoop(
                plan,
                loader,
                self.backend,
                position,
                length,
                evaluator=evaluate,
                listeners=listeners,
                save=save,
                restore_best=self._restore_best,
                stopping=lambda: self.processes.any(stop.asked),
            )
            # The last thing before the first step, so that nothing above draws from these generators.
            if state is not None:
                rng.set_states(state.rng, self.processes.rank, plan.stage.seed + position.step)
            else:
                rng.seed_all(plan.stage.seed, self.processes.rank)
            with self.enough(f"go on with stage `{plan.name}`", plan):
                ended = loop.run()
            last = all(stage.stage.order <= plan.stage.order for stage in self.plan.stages)
            if not ended or (not last and self.processes.any(stop.asked)):
                folder = self.folder.path if self.folder is not None else None
                raise Stopped(plan.name, position.step, length.total_steps, folder)
        finally:
            self.backend.end()

    def _release(self, done: StagePlan) -> None:
        """Let go of the models that no stage trains and that neither this stage nor a later one reads."""
        later = [stage for stage in self.plan.stages if stage.stage.order > done.stage.order]
        if not later:
            return
        kept = {node.name for stage in later for node in stage.models} | self._changed
        kept |= {base for name in kept if (base := self._infos[name].build.base) and name not in self.models}
        for name in (self.models.keys() | self._streamed.keys()) - kept:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Let go of a model; it is made again when it is asked for."""
        self.models.pop(name, None)
        self._streamed.pop(name, None)

    def make_projections(self, plan: StagePlan) -> None:
        """Make the projections of a stage that no earlier one made."""
        new = [node for node in plan.projections if node.name not in self.projections]
        made = make_projections(new, plan.stage.seed)
        device = self.backend.device
        self.projections |= {name: block.to(device) for name, block in made.items()}

    def make_policies(self, plan: StagePlan) -> None:
        """Make the policies of a stage that no earlier one made."""
        new = [item for item in plan.policies if item.node.name not in self.policies]
        self.policies |= make_policies(new, self.backend.device, plan.stage.seed)

    def _tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        models = {
            name: adapters.saved(self.models[name], self._infos[name], self.backend.tensors(self.models[name]))
            for name in sorted(self._changed)
        }
        blocks = {
            f"{name}/{part}": value
            for name, block in self.projections.items()
            for part, value in self.backend.tensors(block).items()
        }
        return models, blocks

    def _save(self, position: Position, best: bool) -> None:
        models, blocks = self._tensors()
        if self.folder is None:
            if best:
                self._best = {
                    name: {part: value.clone() for part, value in tensors.items()}
                    for name, tensors in {**models, "": blocks}.items()
                }
            return
        policies = {
            f"{name}/{what}": value
            for name, policy in self.policies.items()
            for what, value in policy.tensors().items()
        }
        generators = rng.together(self.processes.gathered(rng.get_state()))
        state = State(position, models, blocks, self.backend.optimizer_state(), generators, self._fingerprint, policies)
        if self.processes.main:
            self.folder.checkpoints.save(state, best=best)
        self.processes.wait()

    def _restore_best(self, position: Position) -> None:
        """Put the weights of the best evaluation of the stage back."""
        if self.folder is None:
            models, blocks = {name: t for name, t in self._best.items() if name}, self._best[""]
        else:
            path = self.folder.checkpoints.pointed("best")
            if path is None:
                raise RunError(CHECKPOINT, f"the best checkpoint of stage `{position.stage}` is gone")
            state = checkpoint.read(path)
            models, blocks = state.models, state.projections
        self._load(models, blocks)

    def restore(self, name: str = "last") -> Position:
        """Make the models as the checkpoint `last` or `best` has them, and say where that was. Raises RunError."""
        state = self._saved(name)
        self._restore(state)
        return state.position

    def _resumed(self) -> State | None:
        """The state to go on from; None where the run was ended before its first checkpoint, and begins anew."""
        if self.folder is None:
            raise RunError(CHECKPOINT, "there is no run folder to go on from")
        if self.folder.checkpoints.pointed("last") is not None:
            return self._saved()
        begun = self.folder.path / _PLAN
        try:
            spec = dict(json.loads(begun.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(CHECKPOINT, f"{self.folder.path} holds no run to go on from", "start a new run") from error
        checkpoint.refuse_other_spec(spec, self._fingerprint, begun)
        return None

    def _saved(self, name: str = "last") -> State:
        if self.folder is None:
            raise RunError(CHECKPOINT, "there is no run folder to go on from")
        path = self.folder.checkpoints.pointed(name)
        if path is None:
            raise RunError(CHECKPOINT, f"{self.folder.path} holds no checkpoint `{name}`")
        state = checkpoint.read(path)
        checkpoint.refuse_other_spec(state.spec, self._fingerprint, path)
        return state

    def _restore(self, state: State) -> None:
        for plan in self.plan.stages:
            if plan.stage.order <= state.position.order:
                self.make_projections(plan)
                self.make_policies(plan)
        for name in state.models:
            self.model(name)
        self._changed |= set(state.models)
        self._load(state.models, state.projections)
        for name, policy in self.policies.items():
            prefix = f"{name}/"
            policy.load({key.removeprefix(prefix): v for key, v in state.policies.items() if key.startswith(prefix)})

    def _load(self, models: Mapping[str, Mapping[str, Tensor]], blocks: Mapping[str, Tensor]) -> None:
        for name, tensors in models.items():
            model = self.models[name]
            self.backend.load(model, adapters.completed(model, tensors), f"model `{name}`")
        for name, block in self.projections.items():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): value for key, value in blocks.items() if key.rpartition("/")[0] == name}
            self.backend.load(block, own, f"projection `{name}`")


class _Latest:
    """Keeps the metrics of each stage: those of its best step where one is chosen, else the last."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._best: set[str] = set()

    def on_stage(self, record: StageRecord) -> None:
        """Nothing to keep."""

    def on_step(self, record: StepRecord) -> None:
        """Nothing to keep."""

    def on_evaluate(self, record: EvaluateRecord) -> None:
        """Keep the metrics."""
        if record.best:
            self._best.add(record.stage)
            self.found[record.stage] = dict(record.metrics)
        elif record.stage not in self._best:
            self.found.setdefault(record.stage, {}).update(record.metrics)

    def close(self) -> None:
        """Nothing to let go of."""


def _models(plan: SpecPlan) -> tuple[dict[str, ModelInfo], dict[str, int]]:
    """What is known of each model, and the seed of the first stage that uses it."""
    infos: dict[str, ModelInfo] = {}
    seeds: dict[str, int] = {}
    for stage in plan.stages:
        for node in stage.models:
            infos.setdefault(node.name, node.info)
            seeds.setdefault(node.name, stage.stage.seed)
    return infos, seeds


def _starts(info: ModelInfo) -> set[str | None]:
    """The models that a model is made from."""
    return {info.build.base, info.build.kept.like if info.build.kept is not None else None}


def student_of(plan: StagePlan) -> ModelNode:
    """The model whose tokenizer reads the stage's source: the first that the stage trains."""
    trained = [target.name for target in plan.stage.trains if target.kind == "model"]
    names = [node.name for node in plan.models]
    chosen: Iterable[str] = [name for name in trained if name in names] or names
    return next(node for node in plan.models if node.name == next(iter(chosen)))


def _loader(plan: StagePlan, root: Path) -> Loader:
    from gkd_dsl.runtime.data.loader import make_loader

    if plan.stage.source is None:
        raise RunError(CANNOT_RUN, f"stage `{plan.name}` has no source")
    node = student_of(plan)
    return make_loader(
        plan.stage,
        plan.stage.source,
        load_tokenizer(node.info),
        task=node.info.task,
        columns=plan.columns,
        seed=plan.stage.seed,
        root=root,
        classes=node.info.size("C"),
    )
