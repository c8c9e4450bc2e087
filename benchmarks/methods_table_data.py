"""Data of the methods table: labelled sentences, split once, and how well a model does on the held-out part."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE = 5
"""One row of so many is held out."""
PACKAGES = (("asyncio", "email"), ("tkinter", "unittest"))
"""Without a file of sentences: those of docstrings, labelled by the packages of Python that they come from."""


def read(path: Path | None) -> tuple[list[tuple[str, int]], str]:
    """The rows as (text, label), and what they are.

    The file is tab-separated: id, rating, text; a rating above 0 is label 1, one of 0 is left out. Raises SystemExit.
    """
    if path is None:
        return docstrings(), "docstrings of the standard library, " + " or ".join("+".join(p) for p in PACKAGES)
    if not path.is_file():
        raise SystemExit(
            f"there is no file {path}: --data takes tab-separated lines of id, rating and sentence, a rating above 0 "
            "for a good review and below 0 for a bad one (for example the movie reviews of Pang and Lee, 2005)"
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        try:
            rating, text = float(cells[1]), cells[2].strip()
        except (IndexError, ValueError):
            raise SystemExit(f"line {number} of {path} is not id, rating and sentence with tabs between") from None
        if rating and text:
            found.append((text, int(rating > 0)))
    if len({label for _, label in found}) < 2:
        raise SystemExit(f"{path} has no two labels: ratings above and below 0")
    return found, path.name


def docstrings() -> list[tuple[str, int]]:
    """Lines of docstrings of two groups of packages, the same number of each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    groups: list[list[str]] = []
    for packages in PACKAGES:
        texts: dict[str, None] = {}
        for file in sorted(path for package in packages for path in (root / package).rglob("*.py")):
            if {"test", "tests", "idle_test"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 20 <= len(paragraph) <= 200 and paragraph[0].isalpha():
                        texts[paragraph.replace("\t", " ")] = None
        groups.append(list(texts))
    if not all(groups):
        raise SystemExit("this Python comes without the sources of its library: give a file with --data")
    size = min(len(group) for group in groups)
    return [(text, label) for label, group in enumerate(groups) for text in random.Random(0).sample(group, size)]


def write(rows: Sequence[tuple[str, int]], folder: Path, limit: int | None = None) -> str:
    """`train.tsv` and `held_out.tsv`, always the same for the same rows; gives their digest.

    With a limit, so many rows are drawn for training and a fifth of it are held out.
    """
    rows = list(rows)
    random.Random(0).shuffle(rows)
    cut = len(rows) // SHARE
    held, train = rows[:cut], rows[cut:]
    if limit is not None:
        held, train = held[: max(200, limit // 2)], train[:limit]
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name, part in (("train", train), ("held_out", held)):
        text = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in part)
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def held_out(folder: Path) -> tuple[list[str], list[int]]:
    """The held-out texts and labels."""
    lines = (folder / "held_out.tsv").read_text(encoding="utf-8").splitlines()[1:]
    cells = [line.rsplit("\t", 1) for line in lines]
    return [text for text, _ in cells], [int(label) for _, label in cells]


@torch.no_grad()
def predictions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[int]:
    """The class of each text. Raises ValueError where a logit is not finite."""
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = [0] * len(texts)
    for start in range(0, len(order), 64):
        places = order[start : start + 64]
        batch = tokenizer(
            [texts[place] for place in places],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        if not torch.isfinite(logits).all():
            raise ValueError("a logit of the trained student is not finite")
        for place, label in zip(places, logits.argmax(-1).tolist(), strict=True):
            found[place] = label
    return found


def share(one: Sequence[int], other: Sequence[int]) -> float:
    """How many are equal, of all."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def beats_chance(correct: float, labels: Sequence[int]) -> bool:
    """Whether an accuracy is above that of always saying the more frequent class by two standard errors."""
    chance = max(labels.count(label) for label in set(labels)) / len(labels)
    return correct > chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5
