"""What all of the checker shares: findings, the graph in the making, options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gkd_dsl.diagnostics import Diagnostic, Diagnostics, Edit, Fix, Label, Note
from gkd_dsl.diagnostics.suggest import did_you_mean
from gkd_dsl.graph.build import GraphBuilder
from gkd_dsl.graph.nodes import StageNode
from gkd_dsl.meaning import values
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import UNKNOWN, Instance, Model, Policy, Tensor, Value
from gkd_dsl.ops.typing import Mismatch, Typed
from gkd_dsl.sources import SourceKind
from gkd_dsl.syntax import ast
from gkd_dsl.text import Location, Source, Span
from gkd_dsl.types import BATCH, LENGTH, TensorType


@dataclass(frozen=True)
class ResolvedParam:
    """A parameter's value and where it comes from ("default", "--set", "use at spec.gkd:7:1")."""

    name: str
    value: object
    origin: str
    span: Span | None


MOST = 20_000
"""Elements of comprehensions and calls of loss functions in one spec."""


@dataclass
class Context:
    """One check: its options, what it found, the graph it builds."""

    root: Path
    overrides: Mapping[str, str] = field(default_factory=dict)
    offline: bool = True
    trust: bool = False
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    later: Diagnostics = field(default_factory=Diagnostics)
    builder: GraphBuilder = field(default_factory=GraphBuilder)
    models: dict[str, Model] = field(default_factory=dict)
    params: dict[str, ResolvedParam] = field(default_factory=dict)
    unset_params: dict[str, Span] = field(default_factory=dict)
    stages: list[StageNode] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    source_kinds: dict[str, SourceKind] = field(default_factory=dict)
    files: dict[Path, Scope] = field(default_factory=dict)
    loading: list[tuple[Path, Span | None]] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    detaching: bool = False
    model_unknown: bool = False
    methods_only: bool = False
    monitoring: str | None = None
    """The name of the counter whose condition is being read, where `mean(x, last = ...)` is known."""
    coins: dict[tuple[object, ...], str] = field(default_factory=dict)
    """The names of coins, by where each is written and for which element."""
    deferred: list[Callable[[], None]] = field(default_factory=list)
    """Checks that wait until every declaration has its value."""
    using: list[ast.MethodDecl] = field(default_factory=list)
    """The methods that are being used, outermost first."""
    calling: list[ast.LossDecl] = field(default_factory=list)
    """The loss functions that are being called, outermost first."""
    circular: list[ast.LossDecl] = field(default_factory=list)
    """Loss functions that were reported to call themselves."""
    shared: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Operators that many losses need once: the valid tokens, and a tap without its gradient."""
    typed: dict[tuple[object, ...], Typed | Mismatch] = field(default_factory=dict)
    """What was found of each call, by operator, shapes and values: layers differ in nothing else."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """The declared policies, by the key of their node."""
    rewards: dict[str, str | None] = field(default_factory=dict)
    """The key of each policy's reward once it was read; None where something was reported."""
    elements: int = 0
    """Elements of comprehensions so far; a spec that asks for too many is refused."""
    depth: int = 0
    """How many families and loss functions are being made, one inside the other."""
    pending: set[str] = field(default_factory=set)
    root_scope: Scope = field(default_factory=lambda: Scope(Source("", "")))
    evaluator: Callable[[Context, Scope, ast.Expr], Value] | None = None

    def evaluate(self, scope: Scope, expr: ast.Expr) -> Value:
        """The value of an expression; what is wrong with it is reported and gives `UNKNOWN`."""
        assert self.evaluator is not None
        return self.evaluator(self, scope, expr)

    def batch_columns(self, scope: Scope | None = None) -> dict[str, TensorType]:
        """The columns that a batch may have, as the models of a scope read it.

        Labels are classes for a classifier, tokens for a language model. Where there are both, `labels` is for the
        first by role, and `token_labels` for the language models. They are numbers where all labelled sources of the
        spec are for regression.
        """
        tokens = TensorType("int", (BATCH, LENGTH))
        columns = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
        order = {"student": 0, "model": 1, "teacher": 2}
        heads = sorted((m for m in self._models(scope) if m.info.task != "encoder"), key=lambda m: order[m.role])
        if heads:
            columns["labels"] = self._row_labels() if heads[0].info.task == "classification" else tokens
        if any(m.info.task in ("masked_lm", "causal_lm") for m in heads):
            columns["token_labels"] = tokens
        return columns

    def label_types(self, scope: Scope) -> set[TensorType]:
        """What `batch.labels` may be to the models of a scope."""
        found = {m.info.task for m in self._models(scope)} - {"encoder"}
        tokens = TensorType("int", (BATCH, LENGTH))
        return {self._row_labels() if task == "classification" else tokens for task in found}

    def _row_labels(self) -> TensorType:
        """What the label of a row is: a class, or a number to predict."""
        tasks = set()
        for definition in self.root_scope.names.values():
            if isinstance(definition.decl, ast.DataDecl) and definition.span is not None:
                # To look at a source is not to use it.
                used = definition.used
                value = self.evaluate(self.root_scope, ast.Name(definition.span, definition.name))
                definition.used = used
                if isinstance(value, values.Source) and value.spec.arg("label") is not None:
                    tasks.add(value.spec.arg("task"))
        return TensorType("float" if tasks == {"regression"} else "int", (BATCH,))

    def _models(self, scope: Scope | None) -> list[Model]:
        """The models that a scope sees: in a method those it was given, else all of the spec."""
        from gkd_dsl.meaning.values import Items, Model

        seen: list[Model] = []
        for definition in scope.visible() if scope is not None else ():
            held = definition.value.items if isinstance(definition.value, Items) else (definition.value,)
            seen += [value for value in held if isinstance(value, Model)]
        return seen or list(self.models.values())

    def location(self, scope: Scope, span: Span) -> Location:
        """A place with the `use` statements that lead to it."""
        return Location(span, scope.uses)

    def error(
        self,
        scope: Scope,
        code: str,
        message: str,
        span: Span | None,
        text: str = "",
        *,
        labels: Iterable[Label] = (),
        notes: Iterable[Note | str] = (),
        fix: Fix | None = None,
        severity: str = "error",
        into: Diagnostics | None = None,
    ) -> Value:
        """Report a finding and give `UNKNOWN`.

        Inside a used method the finding is shown at the outermost `use`, which the user can change,
        with the place in the method as a further label; the fix then has nowhere to go.
        """
        target = self.diagnostics if into is None else into
        extra = list(labels)
        if scope.uses and span is not None:
            extra = [Label(span, text or "here", primary=False), *extra]
            extra += [Label(use, "used here", primary=False) for use in dict.fromkeys(scope.uses[1:])]
            target.error(
                code,
                message,
                scope.uses[0],
                "in this use",
                labels=extra,
                notes=notes,
                severity=severity,  # type: ignore[arg-type]
            )
        else:
            target.error(
                code,
                message,
                span,
                text,
                labels=extra,
                notes=notes,
                fix=fix,
                severity=severity,  # type: ignore[arg-type]
            )
        return UNKNOWN

    def warning(self, scope: Scope, code: str, message: str, span: Span, text: str = "", **rest: object) -> None:
        """As `error`, for what may be meant."""
        self.error(scope, code, message, span, text, severity="warning", **rest)  # type: ignore[arg-type]

    def not_yet(self, scope: Scope, what: str, span: Span) -> Value:
        """Note something that checks but does not run in this version; `run` refuses it."""
        self.error(
            scope,
            "E0601",
            f"{what} does not run in this version",
            span,
            "checked, but refused by `gkd run`",
            severity="warning",
            into=self.later,
        )
        return UNKNOWN


def suggest(name: str, candidates: Iterable[str]) -> tuple[str, str | None]:
    """The label "did you mean `x`?" (or "") and the nearest candidate."""
    near = did_you_mean(name, list(candidates))
    if not near:
        return "", None
    return f"did you mean `{near[0]}`?", near[0]


def replace(span: Span, text: str, title: str | None = None) -> Fix:
    """The fix that writes `text` in place of a span."""
    return Fix(title or f"write `{text}`", (Edit(span, text),))


__all__ = ["Context", "Diagnostic", "ResolvedParam", "replace", "suggest"]
