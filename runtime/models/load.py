"""Models and tokenizers from what the checker knows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from gkd_dsl.models.describe import describe, whole
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo, Task
from gkd_dsl.runtime.errors import out_of_memory
from gkd_dsl.runtime.models import quantised, vocabulary
from gkd_dsl.runtime.models.adapters import merged, with_adapter, with_lora
from gkd_dsl.runtime.models.halved import HALF, halve, saved_in

log = logging.getLogger("gkd_dsl")

_AUTO: dict[Task, str] = {
    "encoder": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class LoadReport:
    """What did not come from the saved weights.

    new      parameters that start from random values
    dropped  saved tensors that this model has no place for
    all_new  whether nothing was saved: a model with random weights
    """

    name: str
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    all_new: bool = False

    def __str__(self) -> str:
        lines = []
        if self.all_new:
            lines.append(f"{self.name}: all {len(self.new)} parameters start from random values")
        elif self.new:
            lines.append(f"{self.name}: {_some(self.new)} start from random values: train before use")
        if self.dropped:
            lines.append(f"{self.name}: {_some(self.dropped)} of the saved weights are not used")
        return "; ".join(lines)


def load(
    info: ModelInfo,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    models: Mapping[str, PreTrainedModel] | None = None,
    seed: int = 0,
    root: Path | None = None,
    half: torch.dtype | None = None,
    trained: bool = True,
) -> PreTrainedModel:
    """The model, in eval mode, in `dtype` (float32 unless given) on `device`; what is new in it is logged.

    `models` holds the models of the spec made so far (the base of a truncated one, and one whose embeddings say
    which ids are alike). `seed` gives new weights; `root` is where the paths of a counted source start.
    With `half` the matrices are in that dtype: of a model that nothing trains, and that is run under autocast to it.
    Of one that is not `trained` all weights of the body have to be saved, but for a pooler.

    Raises ModelError.
    """
    model, report = load_with_report(info, dtype=dtype, device=device, models=models, seed=seed, root=root, half=half)
    if not trained and info.build.kind == "hf":
        body = _body_names(model)
        if lacking := [key for key in report.new if key in body and "pooler" not in key.split(".")]:
            raise ModelError(
                f'{_some(lacking)} of "{info.location}" are not in its files, and no stage trains them',
                "fetch its files again, or name the checkpoint that the config belongs to",
            )
    if str(report):
        log.log(logging.INFO if report.all_new else logging.WARNING, "%s", report)
    return model


def load_with_report(
    info: ModelInfo,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    models: Mapping[str, PreTrainedModel] | None = None,
    seed: int = 0,
    root: Path | None = None,
    half: torch.dtype | None = None,
) -> tuple[PreTrainedModel, LoadReport]:
    """As `load`, with the report instead of a log line."""
    if info.build.lora is not None:
        below = replace(info, build=replace(info.build, lora=None))
        model, report = load_with_report(
            below, dtype=dtype, device=device, models=models, seed=seed, root=root, half=half
        )
        return with_lora(model, info, seed), report
    if info.build.kept is not None:
        model, report = load_with_report(whole(info), models=models, seed=seed)
        cut_down = _cut(info, model, models or {}, root or Path.cwd())
        _settle(cut_down, dtype, half)
        return cut_down.to(device).eval(), report  # type: ignore[arg-type]
    with _quiet(), _seeded(seed):
        if info.formal:
            raise ModelError(f"{info.location} is the model of a method: it has no weights")
        if info.build.kind == "stored":
            raise ModelError(f"{info.location} holds outputs of a model, and no weights", "name the model by `hf(...)`")
        if info.build.kind == "hf":
            model, report = _from_weights(info, _read_in(info, half or dtype or torch.float32))
            if info.build.adapter is not None:
                model = with_adapter(model, info.build.adapter, info.location)
        elif info.build.kind == "random":
            model = build(info)
            report = LoadReport(info.location, new=tuple(name for name, _ in model.named_parameters()), all_new=True)
        else:
            model, report = _copied(info, models or {})
    if info.task == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = padding_token(info, model)
    _settle(model, dtype, half)
    if quantised.is_quantised(model):
        # Where it was quantised: on the GPU, where there is one.
        return model.eval(), report
    return model.to(device).eval(), report  # type: ignore[arg-type]


def build(info: ModelInfo) -> PreTrainedModel:
    """The model with the weights its config starts from (on the meta device, none).

    Raises ModelError for a config that its class refuses.
    """
    config = config_of(info)
    padding = config.pad_token_id
    if info.kept is not None and padding is not None and padding >= config.vocab_size:
        # Ids stay those of the whole vocabulary; here one would be a row that does not exist.
        config.pad_token_id = None
    try:
        if info.family is None:
            model = getattr(transformers, _AUTO[info.task]).from_config(config)
        else:
            model = getattr(transformers, info.architecture)(config)
        model.config.pad_token_id = padding
        return model
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f'"{info.location}" cannot be built: {_first_line(error)}') from None


def config_of(info: ModelInfo) -> PreTrainedConfig:
    """The transformers config of a model, with the spec's overrides.

    Raises ModelError.
    """
    fields = dict(info.config)
    if not fields:
        overrides = {key: value for key, value in info.build.overrides if key != "num_labels"}
        fields = dict(
            describe(info.path or info.location, task=info.task, num_labels=info.size("C"), overrides=overrides).config
        )
    kind = fields.pop("model_type", None)
    fields["architectures"] = [info.architecture]
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
    except KeyError:
        raise ModelError(f'this release of transformers has no model_type "{kind}"') from None
    try:
        return config_class.from_dict(fields)
    except Exception as error:  # the config classes raise errors of a private library
        raise ModelError(f'the config of "{info.location}" is refused: {_first_line(error)}') from None


def load_tokenizer(info: ModelInfo) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; one without a padding token pads with its end-of-text token.

    Raises ModelError where there is none.
    """
    if info.path is None:
        raise ModelError(f"{info.location} is the model of a method: it has no tokenizer")
    source, revision = _source(info, tokenizer=True)
    # without files transformers would make up an empty tokenizer
    if source == info.path and not any((Path(source) / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f'there is no tokenizer beside "{info.location}"', "save one there with save_pretrained")
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # whatever a tokenizer's own code raises on files that it does not understand
        raise ModelError(
            f'"{info.location}" has no tokenizer that can be loaded: {_first_line(error)}',
            "save one beside the model with save_pretrained",
        ) from None
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_in(info: ModelInfo, dtype: torch.dtype) -> torch.dtype:
    """The dtype to read weights in that end in `dtype`: an adapter is added to them before they are rounded."""
    if info.build.adapter is None or info.build.quantised is not None or dtype not in HALF.values():
        return dtype
    base = replace(info, build=replace(info.build, adapter=None))
    return dtype if saved_in(base, dtype) else torch.float32


def _from_weights(info: ModelInfo, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    config = config_of(info)
    source, revision = _source(info)
    name = info.architecture if info.family is not None else _AUTO[info.task]
    extra = quantised.reading(info, dtype)
    try:
        model, found = getattr(transformers, name).from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
    except Exception as error:  # the readers of weight files raise errors of their own libraries
        if out_of_memory(error):
            raise
        why, hint = damage(Path(source)) or (_first_line(error), "")
        raise ModelError(f'the weights of "{info.location}" cannot be loaded: {why}', hint) from None
    resized = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in found["mismatched_keys"]]
    body = _body_names(model)
    if wrong := [key for key in resized if key in body]:
        raise ModelError(
            f'{_some(wrong)} of "{info.location}" have other shapes than its config says',
            "fields that change shapes are for random_init, not for saved weights",
        )
    if extra:
        quantised.refuse_unfit(model, info)
    return model, LoadReport(
        info.location,
        new=tuple(sorted({*found["missing_keys"], *resized})),
        dropped=tuple(sorted(found["unexpected_keys"])),
    )


def damage(folder: Path) -> tuple[str, str] | None:
    """The first safetensors file of a folder that cannot be read, and what to do; None where all can, by their heads.

    The library compares the size of a file with its head, and reads no weight.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            with suppress(OSError), path.open("rb") as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    return f"{path} is a pointer of Git LFS", "fetch the file itself: `git lfs pull`"
            return f"{path}: {_first_line(error)}", "the file is cut short, or is none of weights: fetch it again"
    return None


def _body_names(model: PreTrainedModel) -> set[str]:
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in body}


def _copied(info: ModelInfo, models: Mapping[str, PreTrainedModel]) -> tuple[PreTrainedModel, LoadReport]:
    """Copy a base model's embeddings, chosen blocks, norms and pooler; its head too, unless a new one is asked for."""
    base = models.get(info.build.base or "")
    if base is None:
        raise ModelError(f"{info.location} is made from {info.build.base}, which is not loaded")
    family = FAMILIES[info.family or ""]
    model = build(info)
    layers = info.build.layers or ()
    with merged(base):
        body, head = base.base_model.state_dict(), base.state_dict()
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    new: list[str] = []
    shorter = _shorter(info)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if not name.startswith(prefix):
                source = head.get(name) if info.build.kind == "truncated" else None
            else:
                source = body.get(_renumbered(name.removeprefix(prefix), family.blocks, layers))
            if source is not None and source.shape == target.shape:
                target.copy_(source)
            elif source is not None and _is_part(target.shape, source.shape, shorter):
                # The first features, heads and inner features of a wider model.
                target.copy_(source[tuple(slice(length) for length in target.shape)])
            else:
                new.append(name)
    model.tie_weights()
    found = vocabulary.attached(base)
    if found is not None:
        vocabulary.attach(model, found)
    owned = {name for name, _ in model.named_parameters()}
    made = f"{'with_head' if info.build.kind == 'headed' else 'truncated'}({info.build.base})"
    return model, LoadReport(made, new=tuple(name for name in new if name in owned))


def _shorter(info: ModelInfo) -> set[tuple[int, int]]:
    """The lengths of axes that a model of fewer features has, each with that of its base."""
    base = info.build.origin
    if info.build.kind != "truncated" or base is None:
        return set()

    def lengths(model: ModelInfo) -> list[int]:
        H, A, KV, D, F = (model.size(size) or 0 for size in ("H", "A", "KV", "D", "F"))
        return [H, A * D, KV * D, F]

    return {(mine, theirs) for mine, theirs in zip(lengths(info), lengths(base), strict=True) if mine < theirs}


def _is_part(mine: torch.Size, theirs: torch.Size, shorter: set[tuple[int, int]]) -> bool:
    if len(mine) != len(theirs):
        return False
    return all(a == b or (a, b) in shorter for a, b in zip(mine, theirs, strict=True))


def _cut(info: ModelInfo, model: PreTrainedModel, models: Mapping[str, PreTrainedModel], root: Path) -> PreTrainedModel:
    """The model with the part of its vocabulary that it keeps."""
    kept = info.build.kept
    assert kept is not None
    like = model if kept.like is None else models.get(kept.like)
    if like is None:
        raise ModelError(f"{kept.like} says which ids are alike, and is not loaded")
    embeddings = like.get_input_embeddings().get_parameter("weight")
    if embeddings.shape[0] != kept.full:
        raise ModelError(f"{kept.like} has {embeddings.shape[0]} embeddings, and {info.location} {kept.full}")
    compact = vocabulary.cut(model, build(info), vocabulary.id_map(kept, load_tokenizer(info), embeddings, root))
    compact.config.pad_token_id = model.config.pad_token_id
    return compact


def _renumbered(name: str, blocks: str, layers: tuple[int, ...]) -> str:
    """The base's name of a parameter: block k of the new model is block `layers[k]` of the base."""
    if not name.startswith(f"{blocks}."):
        return name
    index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
    return f"{blocks}.{layers[int(index)]}.{rest}"


def _source(info: ModelInfo, *, tokenizer: bool = False) -> tuple[str, str | None]:
    """What to hand to `from_pretrained`: the folder or, for a hub model not yet fetched whole, its id and revision."""
    folder = Path(info.path or "")
    in_cache = folder.parent.name == "snapshots"
    if in_cache and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        repo, _, revision = info.location.partition("@")
        return repo, revision or None
    if not tokenizer and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(
            f"{info.location} has no weights (model.safetensors) beside its config.json",
            f'random_init("{info.location}") makes it with random weights',
        )
    return str(folder), None


def padding_token(info: ModelInfo, model: PreTrainedModel) -> int | None:
    """The id that a decoder's classifier takes for padding: the tokenizer's, else the end of text."""
    if info.vocabulary is not None:
        return load_tokenizer(info).pad_token_id
    end = model.config.eos_token_id
    return end[0] if isinstance(end, list) else end


def _settle(model: nn.Module, dtype: torch.dtype | None, half: torch.dtype | None) -> None:
    """Give the weights their dtype for good."""
    if half is not None:
        halve(model, half)
    elif not quantised.is_quantised(model):
        _cast(model, dtype or torch.float32)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`; buffers stay, since rotary frequencies in bf16 lose distant positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own warnings and progress bars; what matters is in the report."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def part_parameters(model: PreTrainedModel, modules: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of modules named as by `part_modules`, each once, by their names in the model.

    A weight that a head shares with the embeddings belongs to both parts, under the first of its names.
    """
    wanted = {id(parameter) for name in modules for parameter in model.get_submodule(name).parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in wanted]
