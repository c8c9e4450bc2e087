"""Which method runs on which family of models: rows, and the page of the docs that shows them."""

from __future__ import annotations

import os
from pathlib import Path

from cases import CASES, NAMES
from harness import CAUSAL, FAMILIES, Models, errors, spec, use

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "families.md"
UPDATE = bool(os.environ.get("GKD_UPDATE_FAMILIES"))
_SHOWN = {"bert": "BERT", "roberta": "RoBERTa", "llama": "Llama", "gpt2": "GPT-2"}
_TASK = {"classification": "classifiers", "masked_lm": "masked language models", "causal_lm": "causal language models"}


def models_of(name: str, family: str) -> Models:
    """The models of a method's case in another family: classifiers stay so, language models become those it has."""
    return CASES[name].models.of(family)


def text_of(name: str, family: str) -> str:
    case = CASES[name]
    return spec(models_of(name, family), *use(name, case.call, case.args), "run m")


def answer(name: str, family: str) -> tuple[str, str]:
    """("yes", what of the family), or the code and the sentence with which the checker refuses."""
    found = errors(text_of(name, family))
    return found[0] if found else ("yes", _TASK[models_of(name, family).task])


def rows() -> list[tuple[str, str, tuple[str, str]]]:
    """(method, family, answer) for every method and family."""
    return [(name, family, answer(name, family)) for name in NAMES for family in FAMILIES]


def page() -> str:
    """The page: a table, and the sentences of the refusals."""
    answers = {(name, family): found for name, family, found in rows()}
    head = " | ".join(_SHOWN.values())
    lines = [
        "# Methods and model families",
        "",
        "Which method of the library runs on which family of models. Each cell is checked on tiny models of that",
        "family: where it says yes, a step of every stage was made and its losses and gradients were finite, and",
        "padding changed neither. Otherwise it is the code with which `gkd check` refuses the spec; the sentence is",
        "below. Language models are masked ones of BERT and RoBERTa, and causal ones of Llama and GPT-2.",
        "A term over the first token, the `[CLS]` of an encoder, takes the last one of Llama and GPT-2, whose first",
        "token sees nothing of the text behind it.",
        "",
        "<!-- Written by tests/methods/families.py: GKD_UPDATE_FAMILIES=1 pytest tests/methods -->",
        "",
        f"| method | models | {head} |",
        "|---|---|" + "---|" * len(FAMILIES),
    ]
    refusals: dict[tuple[str, str], list[str]] = {}
    for name in NAMES:
        cells = []
        for family in FAMILIES:
            code, said = answers[name, family]
            cells.append(code)
            if code != "yes":
                refusals.setdefault((name, f"{code}: {said}"), []).append(_SHOWN[family])
        kind = "classifiers" if CASES[name].models.task == "classification" else "language models"
        lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    if refusals:
        lines += ["", "## Refusals", ""]
        lines += [f"- {name} on {' and '.join(on)}. {said}" for (name, said), on in refusals.items()]
    return "\n".join(lines) + "\n"


__all__ = ["CAUSAL", "FAMILIES", "PAGE", "UPDATE", "answer", "models_of", "page", "rows", "text_of"]
