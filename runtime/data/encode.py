"""Texts to token ids, in parallel, once: the result stays in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.runtime.data.errors import DataError
from gkd_dsl.runtime.data.quiet import cache_folder, quiet
from gkd_dsl.runtime.data.rows import Chosen

VERSION = "1"
DEFAULT_LENGTH = 128
_ROWS_A_PROCESS = 50_000
_ROWS_A_PROCESS_SLOW = 2_000


@dataclass(frozen=True)
class Encoded:
    """Token ids of every row: `input_ids`, `token_type_ids` where the tokenizer has them, `prompt_length`
    for causal models, `labels` for classification and regression; `row` is its place among the chosen rows.
    `left_out` counts rows with nothing to learn.
    """

    rows: datasets.Dataset
    left_out: int


@dataclass(frozen=True)
class Recipe:
    """How texts become ids: all that the result depends on beside the texts and the tokenizer."""

    task: str
    max_length: int
    add_eos: bool
    token_types: bool


def recipe_for(
    tokenizer: PreTrainedTokenizerBase, args: Mapping[str, AttrValue], task: str, stage_length: int | None
) -> Recipe:
    """The recipe of a source for one stage; the length is never above what the tokenizer's model takes."""
    asked = stage_length or args.get("max_length") or DEFAULT_LENGTH
    longest = int(tokenizer.model_max_length or DEFAULT_LENGTH)
    length = min(int(asked), longest) if isinstance(asked, int) else DEFAULT_LENGTH
    token_types = task != "causal_lm" and "token_type_ids" in tokenizer.model_input_names
    if task == "masked_lm" and tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token, which a masked model needs", arg="task")
    return Recipe(task, length, bool(args.get("add_eos", True)), token_types)


def encode(
    chosen: Chosen, digest: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, workers: int | None = None
) -> Encoded:
    """Tokenise the chosen rows. `digest` stands for their content; the same rows are tokenised once.

    A fast tokenizer has threads of its own, so further processes start only for many rows.
    """
    rows = chosen.rows
    if not recipe.token_types and "text_pair" in rows.column_names and recipe.task == "causal_lm":
        raise DataError("a causal model takes no second text", arg="text_pair", hint="use `prompt` and `completion`")
    features: dict[str, Any] = {"row": datasets.Value("int64"), "input_ids": datasets.List(datasets.Value("int32"))}
    if recipe.token_types:
        features["token_type_ids"] = datasets.List(datasets.Value("int8"))
    if recipe.task == "causal_lm":
        features["prompt_length"] = datasets.Value("int32")
    if chosen.labels is not None:
        features["labels"] = datasets.Value("float32" if recipe.task == "regression" else "int64")
    key = _key(chosen, digest, tokenizer, recipe)
    processes = workers if workers is not None else processes_for(rows.num_rows, bool(tokenizer.is_fast))
    processes = min(processes, rows.num_rows)
    with quiet(forks=processes > 1):
        done = rows.map(
            _encode,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": tokenizer, "recipe": recipe, "labels": chosen.labels},
            features=datasets.Features(features),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(cache_folder() / f"tokens-{key}.arrow"),
            new_fingerprint=key,
        )
    return Encoded(done, rows.num_rows - done.num_rows)


def processes_for(rows: int, fast: bool) -> int:
    """How many processes tokenise: one for few rows, at most one a core and eight in all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(cores, 8, rows // (_ROWS_A_PROCESS if fast else _ROWS_A_PROCESS_SLOW)))


def _encode(
    batch: Mapping[str, list[Any]],
    places: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    labels: Sequence[int] | Sequence[float] | None,
) -> dict[str, list[Any]]:
    if recipe.task == "causal_lm":
        return _encode_causal(batch, places, tokenizer, recipe)
    # A blank first text is left out before; a missing second one is an empty text.
    pairs = [text or "" for text in batch["text_pair"]] if "text_pair" in batch else None
    encoded = tokenizer(
        list(batch["text"]),
        pairs,
        truncation=True,
        max_length=recipe.max_length,
        return_attention_mask=False,
        return_token_type_ids=recipe.token_types,
    )
    result: dict[str, list[Any]] = {"row": list(places), "input_ids": encoded["input_ids"]}
    if recipe.token_types:
        result["token_type_ids"] = encoded["token_type_ids"]
    if labels is not None:
        result["labels"] = [labels[place] for place in places]
    return result


def _encode_causal(
    batch: Mapping[str, list[Any]], places: Sequence[int], tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> dict[str, list[Any]]:
    """Ids of whole texts, or of prompt and completion; the end of the text is added before the cut."""
    end = tokenizer.eos_token_id
    result: dict[str, list[Any]] = {"row": [], "input_ids": [], "prompt_length": []}
    if "completion" in batch:
        completions = tokenizer(list(batch["completion"]), add_special_tokens=False)["input_ids"]
        texts = [text or "" for text in batch["prompt"]] if "prompt" in batch else [""] * len(completions)
        prompts = tokenizer(texts)["input_ids"]
        # Some tokenizers end every text; a prompt goes on.
        prompts = [ids[:-1] if ids and end is not None and ids[-1] == end else ids for ids in prompts]
    else:
        completions = tokenizer(list(batch["text"]))["input_ids"]
        prompts = [[]] * len(completions)
    for place, prompt, completion in zip(places, prompts, completions, strict=True):
        ids = [*prompt, *completion]
        if recipe.add_eos and end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        ids = ids[: recipe.max_length]
        # Position i predicts i + 1, so the first token is never learned.
        if len(ids) > max(1, len(prompt)):
            result["row"].append(place)
            result["input_ids"].append(ids)
            result["prompt_length"].append(len(prompt))
    return result


def _key(chosen: Chosen, digest: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    labels = hashlib.sha256(repr(chosen.labels).encode()).hexdigest() if chosen.labels is not None else ""
    parts = [VERSION, digest, tokenizer_digest(tokenizer), repr(recipe), labels, sorted(chosen.rows.column_names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for two tokenizers that give the same ids; what an earlier call left in one does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.special_tokens_map, tokenizer.truncation_side]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True, default=str).encode()).hexdigest()[:32]
