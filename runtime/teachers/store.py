"""Tensors of rows of a data set on the disk: shards that are written whole or not at all, and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from gkd_dsl.models.stored import MANIFEST
from gkd_dsl.runtime.errors import CACHE, RunError, writing

FORMAT = 1
_SHARED = "shared.safetensors"
SHARD_BYTES = 64 * 2**20
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32, "bool": torch.bool}
_HINT = "make it again with `gkd cache`"
_ANEW = "delete the folder, and make it again with `gkd cache`"
_MEND = "`gkd cache --resume` runs its rows again; with `cache = auto` delete the folder"
_DATA = (
    "rows, their order, `held_out` and `max_length` decide it: put back what differs, or make it again with `gkd cache`"
)
_BEFORE = {"quantisation": "none"}
"""Fields that earlier manifests lack, and what is said by that."""


@dataclass(frozen=True)
class Part:
    """What is kept of each row under one name. `dims` are its axes without the batch: "L" (tokens) or a size."""

    dims: tuple[str | int, ...]
    dtype: str

    def shape(self, length: int) -> tuple[int, ...]:
        """The shape in a row of this length."""
        return tuple(length if dim == "L" else int(dim) for dim in self.dims)

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """How many numbers there are in rows of these lengths."""
        sizes = [int(dim) for dim in self.dims if dim != "L"]
        return lengths.astype(np.int64) ** self.dims.count("L") * int(np.prod(sizes, dtype=np.int64))


@dataclass
class _Shard:
    file: str
    rows: np.ndarray
    lengths: np.ndarray
    sha256: str
    bytes: int
    parts: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, np.ndarray] = field(default_factory=dict)


class Store:
    """The stored rows of one folder. Rows are addressed by their numbers; padding is not stored.

    `identity` says what the rows were made of, field by field; `rows` is how many there are when all are stored;
    `about` is written besides, and not compared. With `mend` every file is compared with its checksum, and rows of
    those that are damaged count as missing. What was written before is found again: a run that was ended goes on.

    Raises RunError: a folder of another identity (with the field that differs), or one that is damaged.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        rows: int,
        *,
        shard_bytes: int = SHARD_BYTES,
        read: bool = False,
        about: Mapping[str, Any] | None = None,
        mend: bool = False,
    ) -> None:
        self.folder, self.identity, self.total = folder, dict(identity), rows
        self.about = dict(about or {})
        self.parts: dict[str, Part] = {}
        self.shared: dict[str, Tensor] = {}
        self._declared: dict[str, tuple[str, ...]] = {}
        self._shards: list[_Shard] = []
        self._shard_of = np.full(rows, -1, dtype=np.int32)
        self._place = np.zeros(rows, dtype=np.int64)
        self._pending: dict[int, dict[str, Tensor]] = {}
        self._pending_lengths: dict[int, int] = {}
        self._bytes, self._shard_bytes = 0, shard_bytes
        if (folder / MANIFEST).is_file():
            self._open(mend)
        elif read:
            raise RunError(CACHE, f"there is no stored teacher in {folder}", "make it with `gkd cache SPEC`")

    @property
    def count(self) -> int:
        """How many rows are stored."""
        return int((self._shard_of >= 0).sum())

    @property
    def bytes(self) -> int:
        """The bytes of its shards."""
        return sum(shard.bytes for shard in self._shards)

    @property
    def complete(self) -> bool:
        """Whether every row is stored."""
        return self.count == self.total

    def has(self, rows: Sequence[int]) -> np.ndarray:
        """Bool: which of these rows are stored, those that wait to be written included."""
        return np.array([self._shard_of[row] >= 0 or row in self._pending for row in rows], dtype=bool)

    def add(self, row: int, length: int, parts: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a row, without padding; they are on the disk after the next flush."""
        for name, value in parts.items():
            part = Part(tuple(self._dims(name, value)), str(value.dtype).removeprefix("torch."))
            if self.parts.setdefault(name, part) != part:
                raise ValueError(f"row {row}: {name} is {part}, and was {self.parts[name]}")
        held = {name: value.contiguous().cpu().clone() for name, value in parts.items()}
        self._pending[row], self._pending_lengths[row] = held, length
        self._bytes += sum(value.nbytes for value in held.values())
        if self._bytes >= self._shard_bytes or self.count + len(self._pending) == self.total:
            self.flush()

    def declare(self, name: str, dims: Sequence[str]) -> None:
        """Say what the axes of a part are before its first row: "L" for tokens, anything else for a size."""
        self._declared[name] = tuple(dims)

    def flush(self) -> None:
        """Write what waits. Raises RunError."""
        if not self._pending:
            return
        rows = np.array(list(self._pending), dtype=np.int64)
        lengths = np.array([self._pending_lengths[row] for row in rows], dtype=np.int64)
        tensors = {name: torch.cat([self._pending[int(row)][name].reshape(-1) for row in rows]) for name in self.parts}
        # Only what the manifest names is read: a file of a run that was ended before that is written over.
        taken = {shard.file for shard in self._shards}
        name = next(name for number in count() if (name := f"shard-{number:05d}.safetensors") not in taken)
        tensors |= {"rows": torch.from_numpy(rows), "lengths": torch.from_numpy(lengths)}
        with writing("the stored teacher", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            digest, size = self._save(name, tensors)
            if self.shared and not (self.folder / _SHARED).is_file():
                self._save(_SHARED, self.shared)
            shard = _Shard(name, rows, lengths, digest, size)
            self._take(shard)
            self._write_manifest()
        self._pending, self._pending_lengths, self._bytes = {}, {}, 0

    def read(self, rows: Sequence[int], starts: Sequence[int], length: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Parts of these rows in a batch padded to `length`, row b from token `starts[b]` on; padding is 0."""
        found: dict[str, Tensor] = {}
        for name in names:
            part = self.parts[name]
            out = torch.zeros((len(rows), *part.shape(length)), dtype=_DTYPES[part.dtype])
            for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
                value = self._row(int(row), name, part)
                own = value.shape[part.dims.index("L")] if "L" in part.dims else 0
                at = tuple(slice(start, start + own) if dim == "L" else slice(None) for dim in part.dims)
                out[place][at] = value
            found[name] = out
        return found

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """The tokens of stored rows."""
        return [
            self._pending_lengths[row] if row in self._pending else int(self._held(row).lengths[self._place[row]])
            for row in rows
        ]

    def _held(self, row: int) -> _Shard:
        if self._shard_of[row] < 0:
            raise RunError(CACHE, f"row {row} is not in the stored teacher {self.folder}", _HINT)
        return self._shards[self._shard_of[row]]

    def _row(self, row: int, name: str, part: Part) -> Tensor:
        if row in self._pending:
            return self._pending[row][name]
        shard = self._held(row)
        if not shard.parts:
            self._map(shard)
        place = int(self._place[row])
        start, stop = shard.starts[name][place : place + 2]
        return shard.parts[name][start:stop].view(part.shape(int(shard.lengths[place])))

    def _dims(self, name: str, value: Tensor) -> list[str | int]:
        declared = self._declared.get(name) or [""] * value.ndim
        return ["L" if dim == "L" else size for dim, size in zip(declared, value.shape, strict=True)]

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
        work = self.folder / f".{name}.{os.getpid()}"
        try:
            safetensors.torch.save_file(dict(tensors), work)
            with work.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = work.stat().st_size
            # The library writes files that their owner alone can read; a store may be read by others.
            os.chmod(work, 0o666 & ~_umask())
            os.replace(work, self.folder / name)
        finally:
            work.unlink(missing_ok=True)
        return digest, size

    def _write_manifest(self) -> None:
        data = {
            "format": FORMAT,
            "identity": self.identity,
            **self.about,
            "rows": self.total,
            "stored": self.count,
            "parts": {name: {"dims": list(part.dims), "dtype": part.dtype} for name, part in self.parts.items()},
            "shared": sorted(self.shared),
            "shards": [
                {"file": s.file, "rows": len(s.rows), "bytes": s.bytes, "sha256": s.sha256} for s in self._shards
            ],
        }
        work = self.folder / f".{MANIFEST}.{os.getpid()}"
        try:
            with work.open("w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, self.folder / MANIFEST)
        finally:
            work.unlink(missing_ok=True)

    def _open(self, mend: bool) -> None:
        path = self.folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise RunError(CACHE, f"{path} has format {data['format']}, and this version reads {FORMAT}", _ANEW)
            refuse_other(dict(data["identity"]), self.identity, self.folder)
            self.parts = {name: Part(tuple(part["dims"]), part["dtype"]) for name, part in data["parts"].items()}
            if unknown := {part.dtype for part in self.parts.values()} - _DTYPES.keys():
                raise ValueError(f"no dtype {', '.join(sorted(unknown))} is stored")
            entries = [entry for entry in data["shards"] if not mend or self._whole(entry)]
            if data["shared"]:
                try:
                    self.shared = safetensors.torch.load_file(self.folder / _SHARED)
                except (OSError, safetensors.SafetensorError):
                    if not mend:
                        raise
                    # It is written anew with the next rows, so that some have to be run.
                    (self.folder / _SHARED).unlink(missing_ok=True)
                    entries = entries[:-1]
            for entry in entries:
                self._take(self._shard(entry))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise RunError(CACHE, f"the stored teacher {self.folder} cannot be read: {error}", _ANEW) from error

    def _whole(self, entry: Mapping[str, Any]) -> bool:
        """Whether a shard is what the manifest says, all of it."""
        path = self.folder / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]

    def _shard(self, entry: Mapping[str, Any]) -> _Shard:
        path = self.folder / entry["file"]
        if not path.is_file():
            raise RunError(CACHE, f"{path} is missing", _MEND)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise RunError(CACHE, f"{path} has {size} bytes, and the manifest says {entry['bytes']}", _MEND)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                rows, lengths = file.get_tensor("rows").numpy(), file.get_tensor("lengths").numpy()
        except safetensors.SafetensorError as error:
            raise RunError(CACHE, f"{path} is damaged: {error}", _MEND) from error
        # Its checksum is compared when it is first read; where rows are has to be right before.
        if len(rows) != len(lengths) or ((rows < 0) | (rows >= self.total)).any() or (lengths < 0).any():
            raise RunError(CACHE, f"{path} is damaged: it names rows that there are none of", _MEND)
        return _Shard(path.name, rows, lengths, entry["sha256"], size)

    def _take(self, shard: _Shard) -> None:
        for name, part in self.parts.items():
            shard.starts[name] = np.concatenate(([0], np.cumsum(part.counts(shard.lengths))))
        self._shard_of[shard.rows] = len(self._shards)
        self._place[shard.rows] = np.arange(len(shard.rows))
        self._shards.append(shard)

    def _map(self, shard: _Shard) -> None:
        """Map a shard into memory, after its checksum is compared: once, when it is first read."""
        path = self.folder / shard.file
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RunError(CACHE, f"{path} cannot be read: {error.strerror}", _MEND) from error
        if digest != shard.sha256:
            raise RunError(CACHE, f"{path} is damaged: its checksum is not the manifest's", _MEND)
        # A private map: what is not read takes no memory.
        raw = torch.from_file(str(path), shared=False, size=shard.bytes, dtype=torch.uint8)
        head = int.from_bytes(bytes(raw[:8].tolist()), "little")
        table = json.loads(bytes(raw[8 : 8 + head].tolist()))
        for name, part in self.parts.items():
            start, stop = (8 + head + offset for offset in table[name]["data_offsets"])
            shard.parts[name] = raw[start:stop].view(_DTYPES[part.dtype])


def refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise RunError, naming the first field that differs, where a folder was made of something else.

    A field that is None here is not known here, and is not compared.
    """
    for name, value in wanted.items():
        if value is not None and stored.get(name, _BEFORE.get(name)) != value:
            raise RunError(
                CACHE,
                f"the stored teacher {folder} is of another run: {name} is {_short(stored.get(name))} there and "
                f"{_short(value)} here",
                _DATA if name == "data set" else _HINT,
            )


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
