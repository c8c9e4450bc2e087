"""One entry a method: the models that suit it, what its losses are for equal models, and what it is left out of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from harness import Models, methods

_PLAIN = Models()
ZERO, STILL, INNER = "zero", "still", "inner"
PROPERTIES = ("padding", "parts", "slope", "extreme", "order", "left")


@dataclass(frozen=True)
class Case:
    """How the harness uses a method.

    equal    every loss of the method for a student that is a copy of its teacher: ZERO (value and gradient), STILL
             (gradient alone), or in words why it is neither. Projections are the identity then.
    models   tiny models that suit it; `call` binds them, `args` are given besides
    raised   parameters that turn on the losses that are off by default, beside those found by themselves
             (default 0.0); a text of None leaves one alone
    other    a second value of a parameter where the rule of the harness finds none
    idle     parameters that change nothing, and why
    without  properties that cannot hold, and why
    apart    another call of it for one property: arguments, and why
    refused  families that the checker refuses, with the code
    warns    warnings that the method gives by design
    teaches  models that the method itself trains, beside the student
    counts   values of its counters to look at, where it has some
    alone    why it does not combine with others by its total
    """

    equal: Mapping[str, str]
    models: Models = _PLAIN
    call: str = "t -> s"
    args: str = ""
    raised: Mapping[str, str | None] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    warns: tuple[str, ...] = ()
    teaches: tuple[str, ...] = ()
    counts: tuple[Mapping[str, int], ...] = ({},)
    alone: str = ""


_EQUAL_WIDTH = Models((4, 16, 4), (2, 16, 4))
_LANGUAGE = Models((4, 16, 4), (2, 16, 4), "masked_lm")
_TWO = Models((4, 16, 4), (2, 16, 4), more=(("teacher", "u", (3, 16, 4)),))
_CHAIN = Models((4, 16, 4), (2, 16, 4), more=(("model", "u", (3, 16, 4)),))
_LABELS = "it compares with the labels"
_MIXED = "a layer is compared with a mean of several"
_SCALED = "the teacher's logits are scaled before the end"
_HEADS = "the heads of the two sides differ"
CASES: dict[str, Case] = {
    "alp_kd": Case(
        {"hard": _LABELS, "soft": ZERO} | dict.fromkeys(("attended", "attended_detached", "attended_pooled"), _MIXED),
        _EQUAL_WIDTH,
        apart={"slope": ("pooled_lam = 1.0", "the third term has a query without a gradient")},
    ),
    "alp_kd_buckets": Case({"hard": _LABELS, "soft": ZERO, "attended": ZERO}, _EQUAL_WIDTH),
    "alp_kd_projected": Case({"hard": _LABELS, "soft": ZERO, "attended": _MIXED}),
    "annealing_kd": Case({"annealed": _SCALED, "hard": _LABELS}),
    "ckd": Case(
        {"hard": _LABELS} | dict.fromkeys(("soft", "tokens", "layers", "token_angles", "layer_angles"), ZERO),
        args="alpha = 0.5",
        other={"alpha": "0.25"},
    ),
    "continuation_kd": Case({"hard": _LABELS, "hinge": _SCALED, "whole": _SCALED}, args="margin = 0.1"),
    "dgkd": Case(
        {"assistant_hard": _LABELS, "assistant_soft": ZERO, "hard": _LABELS, "soft": ZERO}, _CHAIN,
        call="[t, u] -> s", raised={"survival": "1.0"}, teaches=("u",),
    ),
    "diito": Case(
        {"mlm": _LABELS} | dict.fromkeys(("soft", "cos", "causal", "causal_detached", "causal_cos"), ZERO),
        _LANGUAGE, other={"layers": "1"},
        apart=dict.fromkeys(("parts", "order"), ("causal_weight = 0.0", "the source of a text is the next of its batch"))
        | {"slope": ("causal_cos_weight = 1.0", "one term has a source without a gradient")},
    ),
    "distilbert": Case({"soft": ZERO, "soft_all": ZERO, "mlm": _LABELS, "cos": ZERO}, _LANGUAGE),
    "glmd": Case({"soft": ZERO, "logits": ZERO}, _LANGUAGE),
    "glmd_task": Case({"soft": STILL}),
    "kd": Case({"hard": _LABELS, "soft": ZERO}),
    "lrc_bert": Case(
        {"hard": _LABELS} | dict.fromkeys(("contrast_alone", "contrast"), "it compares with other texts")
        | {"soft": "the student's embeddings are moved"},
        without={
            "parts": "a text is compared with the others of its micro-batch",
            "left": "texts are compared at one place, counted from the left",
        },
        apart={"slope": ("radius = 0.0", "what the embeddings are moved by has no gradient")},
    ),
    "mgskd": Case(
        dict.fromkeys(("token", "span", "drawn_span", "sample", "soft"), ZERO),
        args="heads = 8",
        other={"heads": "4"},
        apart={
            "parts": ("heads = 8, sample_weight = 0.0", "a text is compared with the others of its micro-batch"),
            "order": ("heads = 8", "spans are drawn by the place of a text in the batch"),
        },
    ),
    "minilm": Case({"attn": ZERO, "value": ZERO}),
    "minilmv2": Case({"q": ZERO, "k": ZERO, "v": ZERO}, args="heads = 8", other={"heads": "4"}),
    "mobilebert": Case({"emb": ZERO, "feature": ZERO, "attention": ZERO, "mlm": _LABELS, "soft": STILL}, _LANGUAGE),
    "mobilebert_task": Case({"hard": _LABELS}, Models(None), call="s", alone="it has no teacher"),
    "mobilebert_teacher": Case(
        {"mlm": _LABELS}, replace(_LANGUAGE, s=None), call="t", teaches=("t",), alone="it has no student",
    ),
    "mt_bert": Case(
        {"teach": _LABELS, "hard": _LABELS, "soft": "the teachers speak through layers of their own",
         "hidden": ZERO, "student_side": ZERO},
        _TWO, call="[t, u] -> s", teaches=("t", "u"), warns=("W0704",),
        apart={"slope": ("soft_weight = 0.0, student_side_weight = 1.0", "how much a teacher counts has no gradient")},
    ),
    "pd": Case({"soft": STILL, "hard": _LABELS}),
    "pd_pretrain": Case({"lm": _LABELS}, replace(_LANGUAGE, t=None), call="s", alone="it has no teacher"),
    "pkd": Case({"hard": _LABELS, "soft": ZERO, "patient": ZERO, "patient_last": ZERO}, _EQUAL_WIDTH),
    "rail_kd": Case(
        {"hard": _LABELS} | dict.fromkeys(("soft", "layers", "concat", "frozen"), ZERO)
        | dict.fromkeys(("anchor", "anchor_concat"), "it keeps the texts of a batch apart on the teacher's side"),
        args="u = 24", warns=("W0704",),
        apart=dict.fromkeys(
            ("parts", "order"),
            ("u = 24, concat_weight = 1.0, frozen_weight = 1.0, anchor_weight = 0.0",
             "an anchor compares neighbours in the micro-batch"),
        ),
    ),
    "rl_kd": Case(
        {"hard": _LABELS, "mean_of_all": ZERO, "soft": ZERO}, _TWO, call="[t, u] -> s",
        without=dict.fromkeys(("parts", "order"), "the teachers of a text are drawn by its place in a micro-batch"),
    ),
    "sid": Case(
        {"attn": ZERO, "cos": ZERO, "soft": STILL}, _EQUAL_WIDTH, raised={"threshold": None},
        counts=({"k": 2}, {"k": 3}),
    ),
    "takd": Case(
        {"assistant_hard": _LABELS, "assistant_soft": ZERO, "hard": _LABELS, "soft": ZERO}, _CHAIN,
        call="[t, u] -> s", teaches=("u",),
    ),
    "theseus": Case({"hard": _LABELS, "own": _LABELS}, _EQUAL_WIDTH),
    "tinybert": Case(
        {"emb": ZERO, "attn": ZERO, "hid": ZERO, "emb_separate": ZERO, "hid_separate": ZERO, "soft": STILL},
    ),
    "tmkd": Case({"hard": _LABELS, "soft": ZERO, "one_head": ZERO}, _TWO, call="[t, u] -> s"),
    "uncertainty": Case(
        {"hard": _LABELS, "soft": ZERO, "selected": ZERO, "authors": ZERO}, _TWO, call="[t, u] -> s",
        apart={
            "slope": ("soft_weight = 0.0, authors_weight = 1.0", "the weights of the teachers have no gradient"),
            "parts": ("authors_weight = 1.0", "a teacher is chosen by a rank in the micro-batch"),
        },
    ),
    "universal_kd": Case(
        {"hard": _LABELS, "soft": ZERO, "anchor": _LABELS, "anchor_pooled": _LABELS}
        | dict.fromkeys(("layers", "layers_joint", "layers_pooled"), _HEADS),
        apart={"slope": ("layer_weight = 0.0", "what a layer is compared with has no gradient")},
    ),
}  # fmt: skip

# Two methods that do not go together: the code with which the checker refuses them, and why.
REFUSED: dict[tuple[str, str], tuple[str, str]] = {}

# The test of the list says which method has no entry.
NAMES = [name for name in methods() if name in CASES]


def full_args(method: str) -> str:
    """Arguments with which every loss of the method is there: a weight that is 0.0 by default becomes 1.0."""
    case, found = CASES[method], {}
    for param in params_of(method):
        if param.type == "float" and float_or_none(param.default) == 0.0 and inside(1.0, param.within):
            found[param.name] = "1.0"
    found |= case.raised
    given = {part.partition("=")[0].strip() for part in case.args.split(",")}
    added = [f"{name} = {text}" for name, text in found.items() if text is not None and name not in given]
    return ", ".join([case.args, *added] if case.args else added)


@dataclass(frozen=True)
class Param:
    """A parameter of a method, as it is written."""

    name: str
    type: str
    default: str
    within: str


def params_of(method: str) -> list[Param]:
    found = []
    for formal in methods()[method][1].formals:
        if formal.type is not None:
            texts = [part.span.text if part is not None else "" for part in (formal.default, formal.within)]
            found.append(Param(formal.name.text, formal.type.name.text, *texts))
    return found


def float_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def inside(value: float, within: str) -> bool:
    """Whether a number is in a range as the method writes it."""
    if not within:
        return True
    closed = "..=" in within
    low, high = (float(end) for end in within.split("..=" if closed else "..<"))
    return low <= value <= high if closed else low <= value < high


def second_values(param) -> list[str]:
    """Texts that differ from the default and stay in the range."""
    default = float_or_none(param.default)
    if param.type == "bool":
        return ["false" if param.default == "true" else "true"]
    if default is None:
        return []
    if param.type == "int":
        found = [default + 1, default - 1, default + 2]
    else:
        found = [default / 2, default * 2, default + 1.0, default + 0.25, default - 0.25]
    kept = [value for value in found if value != default and inside(value, param.within)]
    return [str(int(value)) if param.type == "int" else repr(float(value)) for value in kept]
