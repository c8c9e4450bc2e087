"""The README.md of an exported student: where it comes from, in the form that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


@dataclass(frozen=True)
class Base:
    """The saved model that an adapter is put on, and what its `from_pretrained` has to be told."""

    place: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    card: Mapping[str, Any],
    spec_text: str,
    architecture: str,
    parameters: int,
    pooling: str | None,
    base: Base | None = None,
) -> str:
    """The text of a model card.

    `card` may hold: `name`; `spec` (the file's name); `teachers` and `student` (locations); `data` (sources);
    `vocabulary` (what it keeps of it, in words); `adapter` (how it was trained, in words);
    `metrics` (name -> number, or -> {"before": number, "after": number});
    `version`; `steps`; `date`.
    What is missing is left out. `architecture` is the transformers class. With `base` the folder holds an adapter
    alone, of so many `parameters`.
    """
    name = str(card.get("name") or "Distilled student")
    teachers = _listed(card.get("teachers"))
    student = str(card.get("student") or "")
    spec = PurePath(str(card.get("spec") or "spec.gkd")).name
    library = "peft" if base is not None else "sentence-transformers" if pooling else "transformers"
    head = {"library_name": library, "tags": ["knowledge-distillation", *(["lora"] if card.get("adapter") else [])]}
    task = "sentence-similarity" if pooling else _pipeline(architecture)
    if task:
        head["pipeline_tag"] = task
    hub = [place for place in (student,) if _is_hub_id(place)]
    if hub:
        head["base_model"] = hub
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    what = f"A `{architecture}` of {parameters:,} parameters"
    if base is not None:
        what = f"An adapter of {parameters:,} parameters for the `{architecture}` at `{base.place}`"
    lines += [f"# {name}", "", f"{what}, distilled with gkd-dsl.", ""]
    facts = [("Specification", f"`{spec}`, below"), ("Teacher" if len(teachers) < 2 else "Teachers", _code(teachers))]
    facts += [("Student", _code([student] if student else [])), ("Data", _code(_listed(card.get("data"))))]
    for key, title in (
        ("vocabulary", "Vocabulary"),
        ("adapter", "Adapter"),
        ("steps", "Optimiser steps"),
        ("date", "Date"),
        ("version", "gkd-dsl"),
    ):
        if card.get(key) is not None:
            facts.append((title, str(card[key])))
    lines += ["| | |", "|---|---|", *(f"| {title} | {text} |" for title, text in facts if text), ""]
    lines += _metrics(card.get("metrics"))
    lines += ["## Use", "", "```python", *_usage(architecture, pooling, base), "```", ""]
    fence = "`" * max(3, _longest_run(spec_text) + 1)
    lines += ["## Specification", "", fence, spec_text.rstrip("\n"), fence, ""]
    return "\n".join(lines)


def _metrics(metrics: object) -> list[str]:
    if not isinstance(metrics, Mapping) or not metrics:
        return []
    before = any(isinstance(value, Mapping) for value in metrics.values())
    lines = ["## Held-out figures", ""]
    lines += ["| metric | before | after |", "|---|---|---|"] if before else ["| metric | |", "|---|---|"]
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            lines.append(f"| {name} | {_number(value.get('before'))} | {_number(value.get('after'))} |")
        else:
            lines.append(f"| {name} | {'| ' if before else ''}{_number(value)} |")
    return [*lines, ""]


def _usage(architecture: str, pooling: str | None, base: Base | None = None) -> list[str]:
    if pooling:
        return [
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("path/to/this/folder")',
        ]
    auto = "AutoModel"
    for ending, name in (
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
    ):
        if architecture.endswith(ending):
            auto = name
    if base is not None:
        told = "".join(f", {name}={value!r}" for name, value in base.arguments.items())
        return [
            "from peft import PeftModel",
            f"from transformers import AutoTokenizer, {auto}",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            f"base = {auto}.from_pretrained({json.dumps(base.place)}{told})",
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    return [
        f"from transformers import AutoTokenizer, {auto}",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        f'model = {auto}.from_pretrained("path/to/this/folder")',
    ]


def _pipeline(architecture: str) -> str | None:
    return next((task for ending, task in _PIPELINES.items() if architecture.endswith(ending)), None)


def _is_hub_id(place: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", place) is not None


def _listed(value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, Sequence) else [str(value)]


def _code(values: Sequence[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value)


def _longest_run(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
