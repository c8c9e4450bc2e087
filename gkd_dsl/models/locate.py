"""From a location, as written in a spec, to the folder with `config.json`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from gkd_dsl.models.errors import ModelError, near_misses
from gkd_dsl.places import entries, expanded, is_dir, is_file

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
_DEPTH = 4


def offline_by_environment() -> bool:
    """Whether `HF_HUB_OFFLINE` asks for no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def locate(location: str, *, root: Path | None = None, offline: bool = False) -> Path:
    """The folder with `config.json` of a model.

    `location` is a folder (relative to `root`, then to the current folder), `package:NAME` or
    `package:NAME/sub` (a folder inside an installed package, which is not imported), or a hub id
    (`name`, `org/name`, `org/name@revision`).

    Raises ModelError.
    """
    if not location.strip():
        raise ModelError("the location of a model is empty", "write a folder, a hub id, or package:NAME")
    if location.startswith("package:"):
        return _in_package(location.removeprefix("package:"))
    bases = _bases(root)
    for base in bases:
        folder = base / expanded(location)
        if is_file(folder):
            raise ModelError(f"{location} is a file, not a folder", "write the folder that holds config.json")
        if is_dir(folder):
            return _with_config(folder, location)
    looks_like_path = location.startswith((".", "/", "~")) or location.endswith("/")
    if looks_like_path or not _HUB_ID.fullmatch(location):
        raise _missing_folder(location, bases)
    return _from_hub(location, bases, offline=offline or offline_by_environment())


def read_config(folder: Path, location: str) -> dict[str, Any]:
    """The parsed `config.json` of a folder; it has a `model_type`.

    Raises ModelError for a file that cannot be read, is not JSON, or does not say its `model_type`.
    """
    path = folder / "config.json"
    shown = f"config.json of {location}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{shown} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{shown} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{shown} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            "save the model again with save_pretrained, or repair that line",
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{shown} holds a JSON {type(config).__name__}, not an object")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(
            f'the config.json of "{location}" has no model_type, so its family is not known',
            'add "model_type", such as "bert" or "llama", to it',
        )
    return config


def _bases(root: Path | None) -> list[Path]:
    here = Path.cwd()
    return [here] if root is None or root.resolve() == here else [root, here]


def _with_config(folder: Path, location: str) -> Path:
    if is_file(folder / "config.json"):
        return folder
    written = location.rstrip("/")
    below = [f"{written}/{path.parent.name}" for path in sorted(folder.glob("*/config.json")) if _is_model(path)]
    hint = f"there is one in {', '.join(below[:4])}" if below else "a transformers model is saved by save_pretrained"
    raise ModelError(f"the folder {location} has no config.json", hint, below)


def _is_model(config: Path) -> bool:
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("model_type"), str)


def _missing_folder(location: str, bases: list[Path]) -> ModelError:
    near = _near_folders(location, bases)
    hint = f"did you mean {near[0]}?" if near else "paths start at the folder of the spec, then at the current one"
    if expanded(location).is_absolute() and not near:
        hint = "check the path"
    return ModelError(f"there is no folder {location}", hint, near)


def _near_folders(location: str, bases: list[Path]) -> list[str]:
    """Folders beside the missing one whose names look like it, written as the location was."""
    written = location.rstrip("/")
    head, _, name = written.rpartition("/")
    prefix = f"{head}/" if head or written.startswith("/") else ""
    for base in bases:
        parent = base / expanded(prefix or ".")
        if is_dir(parent):
            names = [entry.name for entry in entries(parent) if is_dir(entry)]
            if near := near_misses(name, names):
                return [prefix + found for found in near]
    return []


def _in_package(rest: str) -> Path:
    name, _, sub = rest.partition("/")
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(
            f'"package:{rest}" does not name a package', "write package:NAME or package:NAME/folder, NAME as imported"
        )
    folder = _package_folder(name)
    if sub:
        inside = folder / sub
        if not is_dir(inside):
            names = [entry.name for entry in entries(inside.parent) if is_dir(entry)] if is_dir(inside.parent) else []
            head = sub.rpartition("/")[0]
            prefix = f"package:{name}/{head + '/' if head else ''}"
            near = [prefix + found for found in near_misses(inside.name, names)]
            hint = f"did you mean {near[0]}?" if near else f"the package is at {folder}"
            raise ModelError(f"package {name} has no folder {sub}", hint, near)
        if is_file(inside / "config.json"):
            return inside
        folder = inside
    found = _model_folders(folder)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"package:{rest} holds no model: no config.json with a model_type in {folder}")
    inside_names = [f"package:{name}/{path.relative_to(_package_folder(name)).as_posix()}" for path in found]
    raise ModelError(
        f"package:{rest} holds {len(found)} models", f"say which: {', '.join(inside_names[:4])}", inside_names
    )


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it (nor its parents)."""
    first, *others = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if spec is None:
        dashed = " (in code a package is written with underscores)" if "-" in first else ""
        raise ModelError(f"package {first} is not installed", f"install it in this environment{dashed}")
    if not places:
        raise ModelError(f"{first} is a single module, not a package with folders")
    folder = Path(places[0]).joinpath(*others)
    if not is_dir(folder):
        raise ModelError(f"package {first} has no subpackage {'.'.join(others)}")
    return folder


def _model_folders(folder: Path) -> list[Path]:
    found: list[Path] = []
    level = [folder]
    for _ in range(_DEPTH):
        deeper: list[Path] = []
        for place in level:
            config = place / "config.json"
            if is_file(config) and _is_model(config):
                found.append(place)
            deeper += sorted(
                entry for entry in entries(place) if is_dir(entry) and not entry.name.startswith((".", "__"))
            )
        level = deeper
    return found


def _from_hub(location: str, bases: list[Path], *, offline: bool) -> Path:
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = location.partition("@")
    near = _near_folders(location, bases)
    also = f"; or did you mean the folder {near[0]}?" if near else ""
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except ValueError:
        raise ModelError(
            f'"{location}" is neither a folder nor the name of a model on the hub', also[2:], near
        ) from None
    if isinstance(cached, str):
        return Path(cached).parent
    if cached is not None:
        raise ModelError(f"{location} has no config.json on the hub", "it is not a transformers model" + also, near)
    if offline:
        raise ModelError(
            f"{location} is not a folder, and not in the local hub cache",
            f"fetch it once with `hf download {repo}`, or its config alone with `gkd check --online`{also}",
            near,
        )
    return _download(repo, revision or None, location, also, near)


def _download(repo: str, revision: str | None, location: str, also: str, near: list[str]) -> Path:
    """Fetch the config and the tokenizer's files; the weights come when the spec is run."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(repo, "config.json", revision=revision)
    except hub.GatedRepoError:
        raise ModelError(
            f"{repo} is gated on the hub", "accept its terms there, then log in with hf auth login"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ModelError(
            f"{location} is not a folder, and there is no such model on the hub",
            "check the name; a private one needs hf auth login" + also,
            near,
        ) from None
    except hub.RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision {revision} on the hub") from None
    except hub.LocalEntryNotFoundError:
        raise ModelError(
            f"{location} is not a folder, not in the local hub cache, and the hub cannot be reached",
            "check the network, or give a local folder" + also,
            near,
        ) from None
    except hub.EntryNotFoundError:
        raise ModelError(
            f"{repo} has no config.json on the hub", "it is not a transformers model" + also, near
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{location} cannot be fetched from the hub: {first}", also[2:], near) from None
    for name in _TOKENIZER_FILES:
        try:
            hf_hub_download(repo, name, revision=revision)
        except (hub.EntryNotFoundError, OSError):
            continue
    return Path(config).parent
