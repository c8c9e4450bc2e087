"""The student as a folder that `transformers` loads: weights, tokenizer, model card and the spec."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime.model_card import Base, model_card
from gkd_dsl.runtime.models import adapters

_OURS, _VOCABULARY = "gkd_export.json", "kept_vocabulary.json"


class ExportError(Exception):
    """A student that cannot be exported; `hint` says what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    spec_text: str,
    card: Mapping[str, Any],
    label_names: Sequence[str] = (),
    pooling: Literal["mean", "cls", "last"] | None = None,
    normalize: bool = False,
    max_length: int | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    adapter: ModelInfo | None = None,
) -> Path:
    """Write the student so that `AutoModel....from_pretrained(folder)` gives the same outputs.

    The folder is written beside its place and renamed into it, so it is there whole or not at all; an earlier
    export is replaced, any other folder that is not empty is refused. `card` is described at `model_card`.
    `pooling` adds what sentence-transformers reads, with `normalize` and `max_length` for it. `vocabulary` is the map
    of a student that keeps a part of its ids, written beside it. With `adapter`, what is known of a student with
    adapters, what it trained is written alone, as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    Raises ExportError: no space, no permission, a folder that is in the way, parameters that the class of the
    model does not have.
    """
    target = Path(folder)
    refuse_foreign(target)
    if adapter is None:
        with adapters.merged(model):
            _refuse_strangers(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _in_words(error, target) from error
    try:
        base = None
        if adapter is not None:
            base = Base(*adapters.write(model, adapter, work))
            pooling = None
            parameters = sum(p.numel() for _, p in adapters.trainable(model, list(model.named_parameters())))
        else:
            with _no_progress_bars(), adapters.merged(model):
                model.save_pretrained(work)
                parameters = sum(p.numel() for p in model.parameters())
            _clean_config(work / "config.json", label_names)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if pooling is not None:
            _sentence_transformers(work, model, pooling, normalize, max_length)
        text = model_card(card, spec_text, type(model).__name__, parameters, pooling, base)
        (work / "README.md").write_text(text, encoding="utf-8")
        (work / "spec.gkd").write_text(spec_text, encoding="utf-8")
        _write_json(work / _OURS, {"version": 1, "card": _plain(card)})
        if vocabulary is not None:
            _write_json(work / _VOCABULARY, vocabulary)
        _settle(work)
        _swap(work, target)
    except OSError as error:
        raise _in_words(error, target) from error
    except Exception as error:
        # safetensors reports a full disk by an exception of its own.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _in_words(OSError(errno.ENOSPC, "no space"), target) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def weight_bytes(folder: str | Path) -> int:
    """The size of the weight files of a model folder."""
    names = ("*.safetensors", "*.bin")
    return sum(path.stat().st_size for pattern in names for path in Path(folder).glob(pattern))


def refuse_foreign(target: Path) -> None:
    """Raise ExportError where something else is in the way of an export."""
    above = next((folder for folder in target.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise ExportError(f"`{above}` is a file", "name a folder that is not below one")
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"`{target}` is a file", "name a folder")
    if any(target.iterdir()) and not (target / _OURS).is_file():
        raise ExportError(f"the folder `{target}` holds something else", "name a new folder, or empty it")


def _refuse_strangers(model: PreTrainedModel) -> None:
    """Nothing but the student: every tensor is one that its class makes from its config."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        fresh = type(model)._from_config(config)
    strangers = sorted(set(_state(model)) - set(_state(fresh)))
    if strangers:
        raise ExportError(
            f"the model carries parameters that `{type(model).__name__}` does not have: {', '.join(strangers[:5])}",
            "keep projections and teachers outside of the student",
        )


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def _clean_config(path: Path, label_names: Sequence[str]) -> None:
    """What a run set for itself does not belong to the student; the names of classes do."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("attn_implementation", "_attn_implementation", "output_hidden_states", "output_attentions"):
        config.pop(key, None)
    if label_names:
        config["id2label"] = {str(place): name for place, name in enumerate(label_names)}
        config["label2id"] = {name: place for place, name in enumerate(label_names)}
    _write_json(path, config)


def _sentence_transformers(
    work: Path, model: PreTrainedModel, pooling: str, normalize: bool, max_length: int | None
) -> None:
    """The module list in the form that every version of sentence-transformers reads."""
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    if normalize:
        modules.append(("2", "2_Normalize", "Normalize"))
    entries = [
        {"idx": place, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (name, path, kind) in enumerate(modules)
    ]
    _write_json(work / "modules.json", entries)
    (work / "1_Pooling").mkdir()
    modes = {"cls_token": pooling == "cls", "mean_tokens": pooling == "mean"}
    modes |= {"max_tokens": False, "mean_sqrt_len_tokens": False, "lasttoken": pooling == "last"}
    settings: dict[str, Any] = {"word_embedding_dimension": int(model.config.hidden_size)}
    settings |= {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    _write_json(work / "1_Pooling" / "config.json", settings)
    if normalize:
        (work / "2_Normalize").mkdir()
    longest = max_length or getattr(model.config, "max_position_embeddings", None)
    _write_json(work / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """The value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _settle(folder: Path) -> None:
    """Everything on the disk, and readable by whom a newly made file is: weights and `mkdtemp` are stricter."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    folder.chmod(mode | (mode & 0o444) >> 2)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _swap(work: Path, target: Path) -> None:
    """Put the new folder in its place; the old one goes away only when the new one stands."""
    if not target.exists():
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old.rmdir()
    target.rename(old)
    try:
        work.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _in_words(error: OSError, target: Path) -> ExportError:
    if error.errno == errno.ENOSPC:
        return ExportError(f"the disk of `{target.parent}` is full", "free some space, then `gkd export` again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ExportError(f"`{target.parent}` cannot be written", "name another folder")
    return ExportError(f"`{target}` cannot be written: {error.strerror or error}")
