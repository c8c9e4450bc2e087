"""A part of a vocabulary: which ids are kept, which kept id stands for a dropped one, models cut and made whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_dsl.graph.nodes import OptimSpec, SourceSpec, StageNode
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import Kept
from gkd_dsl.runtime.models.adapters import merged
from gkd_dsl.schedules import Span

_CHUNK = 1024


@dataclass(frozen=True)
class IdMap:
    """`kept` `[K]`: the id of each row that is kept. `rows` `[V]`: the row that stands for each id."""

    kept: Tensor
    rows: Tensor


def id_map(kept: Kept, tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, root: Path) -> IdMap:
    """The map of a model that keeps `kept`, by token counts of its source and similarities of `embeddings` `[V, H]`.

    Raises ModelError where special tokens and words do not fit; DataError for what is wrong with the source.
    """
    special = set(tokenizer.all_special_ids)
    always = special | {
        token for word in kept.words for token in tokenizer(word, add_special_tokens=False)["input_ids"]
    }
    chosen = choose(counts(kept, tokenizer, root), kept.count, always)
    return nearest(chosen, embeddings[: kept.full], special, cosine=kept.similarity == "cosine")


def counts(kept: Kept, tokenizer: PreTrainedTokenizerBase, root: Path) -> np.ndarray:
    """How often each id stands in the training rows of the source: `[V]`."""
    from gkd_dsl.runtime.data.loader import make_loader

    source = SourceSpec(kept.source, kept.kind, kept.args)
    stage = StageNode("", "vocabulary", 0, Span(1, "epochs"), source, (), (), OptimSpec(), batch_size=1)
    loader = make_loader(stage, source, tokenizer, task="encoder", seed=0, root=root)
    found = np.zeros(kept.full, dtype=np.int64)
    for rows in loader.train_rows.select_columns("input_ids").iter(batch_size=1000):
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows["input_ids"]])
        found += np.bincount(ids, minlength=kept.full)[: kept.full]
    return found


def choose(frequency: np.ndarray, count: int, always: Iterable[int]) -> list[int]:
    """The `count` ids that are kept: `always`, then the most frequent, of equally frequent ones the lowest.

    Raises ModelError where `always` is more than that.
    """
    first = sorted({token for token in always if 0 <= token < len(frequency)})
    if len(first) > count:
        raise ModelError(
            f"{count} ids are kept, and special tokens and words are {len(first)}", f"keep {len(first)} or more"
        )
    held = set(first)
    order = np.lexsort((np.arange(len(frequency)), -frequency))
    more = [int(token) for token in order if int(token) not in held][: count - len(first)]
    return sorted([*first, *more])


def nearest(chosen: Sequence[int], embeddings: Tensor, special: Iterable[int], *, cosine: bool = False) -> IdMap:
    """The map that puts each id that is not chosen on the most similar chosen one, by chunks.

    A special token stands for itself alone, unless nothing else is chosen. A kept id below the number of kept ids
    is its own row, so that padding stays where it is and a vocabulary kept whole is as it was.
    """
    full, count = embeddings.shape[0], len(chosen)
    kept = torch.empty(count, dtype=torch.long)
    low = [token for token in chosen if token < count]
    kept[low] = torch.tensor(low, dtype=torch.long)
    free = sorted(set(range(count)) - set(low))
    kept[free] = torch.tensor([token for token in chosen if token >= count], dtype=torch.long)
    rows = torch.full((full,), -1, dtype=torch.long)
    rows[kept] = torch.arange(count)
    dropped = torch.nonzero(rows < 0).flatten()
    reserved = set(special)
    stand = torch.tensor([row for row, token in enumerate(kept.tolist()) if token not in reserved] or range(count))
    vectors = embeddings.detach().to("cpu", torch.float32)
    if cosine:
        vectors = F.normalize(vectors, dim=-1)
    candidates = vectors[kept[stand]]
    for start in range(0, len(dropped), _CHUNK):
        some = dropped[start : start + _CHUNK]
        rows[some] = stand[(vectors[some] @ candidates.T).argmax(dim=-1)]
    return IdMap(kept, rows)


def cut(model: PreTrainedModel, compact: PreTrainedModel, found: IdMap) -> PreTrainedModel:
    """`compact`, of fewer ids, with the weights of `model`: those that run over the vocabulary by the rows kept."""
    _fill(model, compact, found.kept)
    attach(compact, found)
    return compact


def attach(model: PreTrainedModel, found: IdMap) -> None:
    """Let the model take ids of the whole vocabulary: its embeddings look up the row that stands for each."""
    embeddings = model.get_input_embeddings()
    device = model.device
    embeddings.register_buffer("id_map", found.rows.clone().to(device))
    embeddings.register_buffer("kept_ids", found.kept.clone().to(device))
    embeddings.register_forward_pre_hook(_look_up)


def attached(model: PreTrainedModel) -> IdMap | None:
    """The map of a model that keeps a part of its vocabulary."""
    held = dict(model.get_input_embeddings().named_buffers(recurse=False))
    return IdMap(held["kept_ids"], held["id_map"]) if "id_map" in held else None


def expanded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the whole vocabulary that computes the same: the rows of dropped ids repeat those that stand for them.

    The logit of a dropped id is that of its representative.
    """
    found = attached(model)
    if found is None:
        return model
    config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": len(found.rows)})
    full = type(model)(config).to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    with merged(model):
        _fill(model, full, found.rows.to("cpu"))
    return full.eval()


def saved_map(model: PreTrainedModel) -> Mapping[str, Any] | None:
    """The map as JSON holds it: the ids kept, and for each id the kept one that stands for it."""
    found = attached(model)
    if found is None:
        return None
    return {"kept": sorted(found.kept.tolist()), "stands_for": found.kept[found.rows].tolist()}


def _fill(source: nn.Module, target: PreTrainedModel, rows: Tensor) -> None:
    """Copy weights; an axis whose length differs is the vocabulary, and takes the rows."""
    held = source.state_dict()
    with torch.no_grad():
        for name, value in target.state_dict().items():
            weight = held[name]
            for axis, (wide, wanted) in enumerate(zip(weight.shape, value.shape, strict=True)):
                if wide != wanted:
                    weight = weight.index_select(axis, rows.to(weight.device))
            value.copy_(weight)
    target.tie_weights()


def _look_up(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_buffer("id_map")[args[0]], *args[1:])
