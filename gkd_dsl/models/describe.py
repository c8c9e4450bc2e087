"""From a location to what is known of a model: its sizes, its head, how it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from gkd_dsl.models.errors import ModelError, near_misses
from gkd_dsl.models.families import FAMILIES, Family
from gkd_dsl.models.info import Build, Kept, ModelInfo, Task
from gkd_dsl.models.locate import locate, read_config
from gkd_dsl.models.tokenizer import read_vocabulary

TASKS: tuple[Task, ...] = get_args(Task)

_ORDER = ("H", "V", "N", "A", "KV", "D", "F", "E", "I")
_USUAL = {
    "H": ("hidden_size", "d_model", "n_embd", "dim"),
    "V": ("vocab_size",),
    "N": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "A": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "KV": ("num_key_value_heads",),
    "D": ("head_dim",),
    "F": ("intermediate_size", "n_inner", "hidden_dim", "d_ff"),
}
_ANY_FIELD = ("num_labels", "id2label", "label2id", "problem_type", "chunk_size_feed_forward")


def describe(
    location: str,
    *,
    task: Task | None = None,
    num_labels: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    offline: bool = False,
    root: Path | None = None,
) -> ModelInfo:
    """What is known of the model at `location` before its weights are loaded.

    The task is that of the saved class unless given; `num_labels` alone asks for a classifier.
    `overrides` are config fields that differ from the file's (dropout, `max_position_embeddings`, ...).

    Raises ModelError.
    """
    folder = locate(location, root=root, offline=offline)
    config = read_config(folder, location)
    known = FAMILIES.get(str(config.get("model_type")))
    for name in known.computed if known is not None else ():
        config.pop(name, None)
    changed = _apply(config, overrides or {}, location)
    build = Build("hf", str(folder), overrides=_as_items(overrides, num_labels))
    return _info(location, folder, changed, build, task, num_labels)


def truncated(
    base: ModelInfo,
    name: str,
    *,
    layers: Sequence[int] | None = None,
    width: int | None = None,
    heads: int | None = None,
    inner: int | None = None,
    task: Task | None = None,
    num_labels: int | None = None,
) -> ModelInfo:
    """The model that keeps only the blocks `layers` of `base` (all unless given), the model called `name` in the spec.

    Negative layers count from the end; the order is kept, and a layer may be taken twice. With `width` it keeps the
    first `width` features, the first `heads` heads (as many as keep their size, unless given) and the first `inner`
    features of the feed-forward part (in the same proportion, unless given). Task and labels are those of the base
    unless given.

    Raises ModelError for no layers, layers that the base lacks, or a width that does not fit.
    """
    count = base.size("N")
    chosen = list(range(count or 1) if layers is None else layers)
    if not chosen:
        raise ModelError(f"truncated({name}, layers = []) keeps no layer", "write for example layers = [0, 2, 4]")
    if base.formal:
        build = Build("truncated", None, base=name, layers=tuple(chosen), origin=base)
        return ModelInfo(base.location, None, None, base.architecture, task or base.task, (), (), build, formal=True)
    family = FAMILIES.get(base.family or "")
    if family is None or count is None:
        raise ModelError(
            f'"{base.location}" is a {base.config.get("model_type")}, a family without a table: it cannot be truncated',
            f"families with one: {', '.join(FAMILIES)}",
        )
    for layer in chosen:
        if not -count <= layer < count:
            raise ModelError(f"{name} has no layer {layer}", f"its layers run from 0 to {count - 1}")
    kept = tuple(layer % count for layer in chosen)
    overrides: dict[str, Any] = {family.fields["N"]: len(kept)}
    types = base.config.get("layer_types")
    if isinstance(types, list) and len(types) == count:
        overrides["layer_types"] = [types[layer] for layer in kept]
    overrides |= _narrowed(base, family, name, width, heads, inner)
    config = {**base.config, **overrides}
    if num_labels is None and task in (None, "classification") and base.task == "classification":
        num_labels = base.size("C")
    wanted = task or ("classification" if num_labels is not None and base.task != "classification" else base.task)
    merged = {**dict(base.build.overrides), **overrides}
    items = _as_items(merged, num_labels)
    build = Build("truncated", base.path, base=name, layers=kept, overrides=items, origin=base)
    return _info(base.location, Path(base.path) if base.path else None, config, build, wanted, num_labels)


def _narrowed(
    base: ModelInfo, family: Family, name: str, width: int | None, heads: int | None, inner: int | None
) -> dict[str, Any]:
    """The config fields of a model of fewer features, heads and inner features."""
    if width is None and heads is None and inner is None:
        return {}
    if family.inside is not None or family.q.transform.startswith("fused"):
        raise ModelError(
            f"a {family.name} is not narrowed: its attention has no matrix whose first rows are its first heads",
            "take fewer layers, or start from random weights",
        )
    H, A, KV, D, F = (base.size(size) or 1 for size in ("H", "A", "KV", "D", "F"))
    width = H if width is None else width
    if heads is None:
        if (width * A) % H and width < H:
            raise ModelError(f"{name} has {A} heads of {D} features: {width} is no whole number of them", "say `heads`")
        heads = width * A // H
    inner = max(1, F * width // H) if inner is None else inner
    for what, wanted, held in (("width", width, H), ("heads", heads, A), ("inner", inner, F)):
        if not 1 <= wanted <= held:
            raise ModelError(f"{what} = {wanted} is not a part of the {held} that {name} has", f"from 1 to {held}")
    group = A // KV
    if heads > group and heads % group:
        raise ModelError(f"{group} heads of {name} share a key, and {heads} is no multiple", f"{group} or {2 * group}")
    found = {family.fields["H"]: width, family.fields["A"]: heads, family.fields["F"]: inner}
    if family.fields["KV"] != family.fields["A"]:
        found[family.fields["KV"]] = max(1, heads // group)
    if family.fields["D"] != family.fields["H"]:
        found[family.fields["D"]] = D
    elif width != heads * D:
        raise ModelError(
            f"heads of {name} have {D} features, and {heads} of them are not {width}",
            f"write `width = {heads * D}`",
        )
    return found


def with_head(base: ModelInfo, name: str, *, task: Task | None = None, num_labels: int | None = None) -> ModelInfo:
    """The model with the body of `base`, the model called `name` in the spec, and a new head for `task`.

    `num_labels` alone asks for a classifier.

    Raises ModelError without a task, or for a head that the family lacks.
    """
    if task is None and num_labels is None:
        raise ModelError(f"with_head({name}) does not say which head", "write for example task = classification")
    items = _as_items(None if base.formal else dict(base.build.overrides), num_labels)
    if base.formal:
        build = Build("headed", None, base=name, overrides=items, origin=base)
        wanted: Task = task or "classification"
        return ModelInfo(base.location, None, None, base.architecture, wanted, (), (), build, formal=True)
    if base.family not in FAMILIES:
        raise ModelError(
            f'"{base.location}" is a {base.config.get("model_type")}, a family without a table: '
            "where its body ends is not known",
            f"families with one: {', '.join(FAMILIES)}",
        )
    layers = tuple(range(base.size("N") or 0))
    build = Build("headed", base.path, base=name, layers=layers, overrides=items, origin=base)
    folder = Path(base.path) if base.path else None
    return _info(base.location, folder, dict(base.config), build, task, num_labels)


def random_init(
    base: str | ModelInfo,
    *,
    task: Task | None = None,
    num_labels: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    offline: bool = False,
    root: Path | None = None,
) -> ModelInfo:
    """A model with random weights, made from a config with some fields changed.

    `base` is a location or a model of the spec; the tokenizer is the base's.

    Raises ModelError for a field that the config does not have, a value of the wrong kind, or
    fields that do not fit together.
    """
    if isinstance(base, str):
        base = describe(base, offline=offline, root=root)
    if base.formal:
        build = Build("random", None, overrides=_as_items(overrides, num_labels))
        return ModelInfo(base.location, None, None, base.architecture, task or base.task, (), (), build, formal=True)
    # Random weights have no vocabulary that was cut.
    known = {**base.config, "vocab_size": base.kept.full} if base.kept is not None else base.config
    config = _apply(known, overrides or {}, base.location)
    merged = {**dict(base.build.overrides), **(overrides or {})}
    build = Build("random", base.path, overrides=_as_items(merged, num_labels))
    if num_labels is None and task in (None, "classification") and base.task == "classification":
        num_labels = base.size("C")
    wanted = task or ("classification" if num_labels is not None else base.task)
    return _info(base.location, Path(base.path) if base.path else None, config, build, wanted, num_labels)


def keeping(info: ModelInfo, kept: Kept) -> ModelInfo:
    """The model with a part of its vocabulary: V is how many ids it keeps.

    Raises ModelError for more ids than there are, or a model that keeps a part already.
    """
    if info.kept is not None:
        raise ModelError(f'"{info.location}" keeps a part of its vocabulary already')
    full = info.size("V")
    if full is not None and not 1 <= kept.count <= full:
        raise ModelError(f"{kept.count} ids are not a part of {full}", f"from 1 to {full}")
    sizes = tuple((name, kept.count if name == "V" else size) for name, size in info.sizes)
    fields = tuple((name, f"{source}, kept" if name == "V" else source) for name, source in info.size_fields)
    config = {**info.config, "vocab_size": kept.count}
    return replace(info, sizes=sizes, size_fields=fields, build=replace(info.build, kept=kept), config=config)


def whole(info: ModelInfo) -> ModelInfo:
    """The model before its vocabulary is cut."""
    kept = info.build.kept
    if kept is None:
        return info
    sizes = tuple((name, kept.full if name == "V" else size) for name, size in info.sizes)
    config = {**info.config, "vocab_size": kept.full}
    return replace(info, sizes=sizes, build=replace(info.build, kept=None), config=config)


def formal(name: str, *, task: Task = "classification") -> ModelInfo:
    """The model that a method is written over: no size is known, every tap exists."""
    return ModelInfo(name, None, None, "model", task, (), (), Build("hf", None), has_pooler=True, formal=True)


def _as_items(overrides: Mapping[str, Any] | None, num_labels: int | None) -> tuple[tuple[str, Any], ...]:
    items = dict(overrides or {})
    if num_labels is not None:
        items["num_labels"] = num_labels
    return tuple(sorted((key, _frozen(value)) for key, value in items.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _frozen(item)) for key, item in value.items()))
    return value


def _apply(config: Mapping[str, Any], overrides: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The config with the overrides, each under the name that the family's config uses."""
    family = FAMILIES.get(str(config.get("model_type")))
    result = dict(config)
    if not overrides:
        return result
    aliases = dict(family.aliases) if family else {}
    known = {*config, *_ANY_FIELD, *aliases, *(family.defaults if family else ())}
    for name, value in overrides.items():
        if name not in known:
            near = near_misses(name, known)
            raise ModelError(
                f'the config of "{location}" ({config.get("model_type")}) has no field {name}',
                f"did you mean {near[0]}?"
                if near
                else f"it has {', '.join(sorted(known - set(_ANY_FIELD))[:12])}, ...",
                near,
            )
        field = aliases.get(name, name)
        before = result.get(field, family.defaults.get(field) if family else None)
        _same_kind(name, value, before)
        for other, target in aliases.items():
            if target == field:
                result.pop(other, None)
        result[field] = list(value) if isinstance(value, tuple) else value
        if name == "num_labels":
            _set_labels(result, value)
    _fit_layer_types(result, config, overrides, family)
    return result


def _same_kind(name: str, value: Any, before: Any) -> None:
    if before is None or value is None:
        return
    number = (int, float)
    if isinstance(before, bool) != isinstance(value, bool) or (
        isinstance(before, number) != isinstance(value, number) or isinstance(before, str) != isinstance(value, str)
    ):
        raise ModelError(
            f"the config field {name} is {_kind(before)}, not {_kind(value)}", f"it is {before!r} in the file"
        )
    if isinstance(before, int) and not isinstance(before, bool) and isinstance(value, float):
        raise ModelError(f"the config field {name} is a whole number, not {value!r}")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "a text" if isinstance(value, str) else "a list or an object"


def _fit_layer_types(
    result: dict[str, Any], config: Mapping[str, Any], overrides: Mapping[str, Any], family: Family | None
) -> None:
    """A list with one entry a layer follows a change of depth: cut, or its last entry repeated."""
    types = config.get("layer_types")
    if family is None or not isinstance(types, list) or not types or "layer_types" in overrides:
        return
    count = result.get(family.fields["N"])
    if isinstance(count, int) and count > 0:
        result["layer_types"] = [types[min(i, len(types) - 1)] for i in range(count)]


def _set_labels(config: dict[str, Any], count: int) -> None:
    present = config.get("id2label")
    config.pop("num_labels", None)
    if isinstance(present, Mapping) and len(present) == count:
        return
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(count)}


def _info(
    location: str,
    folder: Path | None,
    config: dict[str, Any],
    build: Build,
    task: Task | None,
    num_labels: int | None,
) -> ModelInfo:
    family = FAMILIES.get(config["model_type"])
    if num_labels is not None:
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
            raise ModelError(f"num_labels is a whole number from 1, not {num_labels!r}")
        if task not in (None, "classification"):
            raise ModelError(
                f"num_labels is for a classifier, and the task is {task}", 'drop it, or write task = "classification"'
            )
        task = "classification"
    if task is not None and task not in TASKS:
        near = near_misses(task, TASKS)
        raise ModelError(f'there is no task "{task}"', f"tasks are {', '.join(TASKS)}", near)
    architecture, task = _architecture(location, config, family, task)
    if family is not None and task == "causal_lm":
        # without it transformers lets every token see the ones after it
        config.update(family.causal)
    if num_labels is not None:
        _set_labels(config, num_labels)
    elif "num_labels" in config and isinstance(config["num_labels"], int) and "id2label" not in config:
        _set_labels(config, config["num_labels"])
    sizes, fields = _sizes(location, config, family, task)
    pooled = family is not None and family.pooler is not None and task in family.pooled
    vocabulary = read_vocabulary(folder) if folder is not None else None
    return ModelInfo(
        location,
        str(folder) if folder is not None else None,
        family.name if family else None,
        architecture,
        task,
        sizes,
        fields,
        build,
        vocabulary,
        pooled,
        config=config,
    )


def _architecture(
    location: str, config: Mapping[str, Any], family: Family | None, task: Task | None
) -> tuple[str, Task]:
    saved = config.get("architectures")
    name = saved[0] if isinstance(saved, list) and saved and isinstance(saved[0], str) else None
    if family is None:
        found = task or _task_by_name(name)
        return name or str(config["model_type"]), found
    by_class: dict[str, Task] = {cls: key for key, cls in family.classes.items()} | dict(family.accepts)
    if task is None:
        if name is not None and name not in by_class:
            raise ModelError(
                f'"{location}" is a {name}, whose head is none of {", ".join(family.classes)}',
                'write task = "encoder" to use its body without the head',
            )
        task = by_class[name] if name is not None else "encoder"
    if task not in family.classes:
        raise ModelError(
            f"{family.name} models have no {task} head",
            f"tasks of this family: {', '.join(family.classes)}",
        )
    return family.classes[task], task


def _task_by_name(name: str | None) -> Task:
    if name is None:
        return "encoder"
    for ending, task in (
        ("ForSequenceClassification", "classification"),
        ("ForMaskedLM", "masked_lm"),
        ("ForPreTraining", "masked_lm"),
        ("ForCausalLM", "causal_lm"),
        ("LMHeadModel", "causal_lm"),
    ):
        if name.endswith(ending):
            return task  # type: ignore[return-value]
    return "encoder"


def _sizes(
    location: str, config: Mapping[str, Any], family: Family | None, task: Task
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]:
    sizes: dict[str, int] = {}
    sources: dict[str, str] = {}
    for size in _ORDER:
        found = _field(config, family, size)
        if found is not None:
            sources[size], value = found
            sizes[size] = _positive(location, sources[size], value)
    _derive(location, sizes, sources, explicit_kv="KV" in sizes, family=family)
    if task == "classification":
        labels = config.get("id2label")
        count = config.get("num_labels", 2) if not isinstance(labels, Mapping) else len(labels)
        sizes["C"] = _positive(location, "num_labels", count)
        sources["C"] = "num_labels" if not isinstance(labels, Mapping) or not labels else "id2label"
    return tuple(sizes.items()), tuple(sources.items())


def _field(config: Mapping[str, Any], family: Family | None, size: str) -> tuple[str, Any] | None:
    if family is None:
        for usual in _USUAL.get(size, ()):
            if isinstance(config.get(usual), int) and not isinstance(config.get(usual), bool):
                return usual, config[usual]
        return None
    name = family.fields.get(size)
    if name is None or (size == "I" and not _narrow(config, family)):
        return None
    if size in ("KV", "D") and name in (family.fields["A"], family.fields["H"]):
        return None
    for spelling in (name, *(other for other, target in family.aliases.items() if target == name)):
        if spelling in config:
            return None if config[spelling] is None else (spelling, config[spelling])
    value = family.defaults.get(name)
    return None if value is None else (name, value)


def _narrow(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the inside of a block has a width of its own."""
    flag = family.inside[0] if family.inside is not None else ""
    return bool(config.get(flag, family.defaults.get(flag)))


def _positive(location: str, field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f'config `{field}` of "{location}" is {value!r}', "it must be a whole number from 1")
    return value


def _derive(
    location: str, sizes: dict[str, int], sources: dict[str, str], *, explicit_kv: bool, family: Family | None
) -> None:
    """Fill KV, D and F from the others where the config leaves them to be derived; check that all fit."""
    if "H" in sizes and "A" in sizes:
        whole = "I" if "I" in sizes else "H"
        width, heads = sizes[whole], sizes["A"]
        # transformers refuses this for every family here but those whose head size is a field of its own
        if width % heads and ("D" not in sizes or (family is not None and family.name == "llama")):
            below = width // heads * heads
            fitting = [str(fits) for fits in (below, below + heads) if fits]
            raise ModelError(
                f'{sources[whole]} = {width} of "{location}" is not divisible by {sources["A"]} = {heads}',
                f"{' or '.join(fitting)} is",
            )
        if "D" not in sizes:
            sizes["D"], sources["D"] = width // heads, f"{sources[whole]} / {sources['A']}"
    if "A" in sizes:
        if not explicit_kv:
            sizes["KV"], sources["KV"] = sizes["A"], sources["A"]
        if sizes["A"] % sizes["KV"]:
            raise ModelError(
                f'{sources["A"]} = {sizes["A"]} of "{location}" is not divisible by {sources["KV"]} = {sizes["KV"]}',
                "each key/value head serves the same number of query heads",
            )
    if family is not None and "F" not in sizes and "H" in sizes:
        sizes["F"], sources["F"] = 4 * sizes["H"], f"4 * {sources['H']}"
    if "D" in sizes and sizes["D"] % 2 and family is not None and "head_dim" in family.fields.values():
        raise ModelError(
            f'the head size {sizes["D"]} of "{location}" ({sources["D"]}) is odd',
            "rotary positions need an even head size",
        )
    for key in [key for key in (*_ORDER,) if key in sizes]:
        sizes[key] = sizes.pop(key)
