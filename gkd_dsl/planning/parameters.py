"""The parameters of a model, by name and shape, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from gkd_dsl.graph.nodes import PolicyNode, ProjectNode
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.fields import config_value
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.lora import selected_modules
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.planning.adapters import is_trained, with_adapters

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model: `shapes` by name as `named_parameters` gives them, a shared one once.

    Where the family has no table `exact` is false, and one entry stands for the usual transformer of these sizes.
    """

    shapes: tuple[tuple[str, Shape], ...]
    exact: bool = True

    @cached_property
    def count(self) -> int:
        """How many numbers."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def vectors(self) -> int:
        """How many of them are in vectors: biases, and the weights of norms."""
        return sum(shape[0] for _, shape in self.shapes if len(shape) == 1) if self.exact else 0

    @cached_property
    def largest(self) -> int:
        """The size of the largest tensor."""
        return max((math.prod(shape) for _, shape in self.shapes), default=0)

    def under(self, modules: Iterable[str]) -> Parameters:
        """Those inside some modules; `""` is the whole model."""
        chosen = tuple(modules)
        kept = [
            item for item in self.shapes if any(not m or item[0] == m or item[0].startswith(f"{m}.") for m in chosen)
        ]
        return Parameters(tuple(kept), self.exact)


@lru_cache(maxsize=64)
def parameters(info: ModelInfo) -> Parameters:
    """All parameters of a model."""
    family = FAMILIES.get(info.family or "")
    if family is None:
        usual = _usual(info)
        return Parameters(tuple(with_adapters(info, usual.shapes)), exact=False)
    body = {
        "bert": _bert, "roberta": _bert, "distilbert": _distilbert, "mobilebert": _mobilebert, "gpt2": _gpt2,
    }.get(family.name, _decoder)  # fmt: skip
    prefix = "" if info.task == "encoder" else f"{family.prefix}."
    found = [(prefix + name, shape) for name, shape in body(info)]
    return Parameters(tuple(with_adapters(info, (*found, *_head(info)))))


@lru_cache(maxsize=1024)
def part(info: ModelInfo, name: str | None) -> Parameters:
    """The parameters of a part (`head`, `embed`, `body`, `layer.3`), None for all.

    A head that shares its weight with the embeddings has it too. Of a model of an unknown family it is all of them.
    """
    whole = parameters(info)
    if name is None or not whole.exact or (name == "head" and info.task == "encoder"):
        return whole if name != "head" or info.task != "encoder" else Parameters(())
    try:
        modules = part_modules(info, name)
    except ModelError:
        return whole
    found = whole.under(modules)
    if name == "head" and tied(info):
        words = FAMILIES[info.family or ""].words
        shared = [item for item in whole.shapes if item[0].endswith(words)]
        return Parameters((*found.shapes, *shared))
    return found


@lru_cache(maxsize=1024)
def trained(info: ModelInfo, name: str | None) -> Parameters:
    """What a stage trains that trains a part of a model: all of it or, with adapters, what is not frozen."""
    if info.build.lora is None:
        return part(info, name)
    whole = parameters(info)
    modules: tuple[str, ...] = ("",)
    if name is not None and whole.exact and (name != "head" or info.task != "encoder"):
        modules = selected_modules(info, name)
    found = whole.under(modules)
    return Parameters(tuple(item for item in found.shapes if is_trained(info, item[0])), whole.exact)


def tied(info: ModelInfo) -> bool:
    """Whether the head of a language model shares its weight with the word embeddings."""
    return info.task in ("masked_lm", "causal_lm") and bool(config_value(info, "tie_word_embeddings"))


def projection(node: ProjectNode) -> int:
    """Parameters of a projection."""
    return node.in_features * node.out_features + node.out_features * node.bias


def policy(node: PolicyNode) -> int:
    """Parameters of a policy: one map for all actions, by way of the hidden units where there are any."""
    if not node.hidden:
        return node.features + 1
    return node.hidden * (node.features + 1) + node.hidden + 1


def _linear(name: str, out: int, into: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _sizes(info: ModelInfo, *names: str) -> list[int]:
    return [info.size(name) or 0 for name in names]


def _bert(info: ModelInfo) -> Named:
    H, V, N, F = _sizes(info, "H", "V", "N", "F")
    yield "embeddings.word_embeddings.weight", (V, H)
    yield "embeddings.position_embeddings.weight", (config_value(info, "max_position_embeddings"), H)
    yield "embeddings.token_type_embeddings.weight", (config_value(info, "type_vocab_size"), H)
    yield from _norm("embeddings.LayerNorm", H)
    for i in range(N):
        block = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{block}.attention.self.{name}", H, H)
        yield from _linear(f"{block}.attention.output.dense", H, H)
        yield from _norm(f"{block}.attention.output.LayerNorm", H)
        yield from _linear(f"{block}.intermediate.dense", F, H)
        yield from _linear(f"{block}.output.dense", H, F)
        yield from _norm(f"{block}.output.LayerNorm", H)
    if info.has_pooler:
        yield from _linear("pooler.dense", H, H)


def _distilbert(info: ModelInfo) -> Named:
    H, V, N, F = _sizes(info, "H", "V", "N", "F")
    yield "embeddings.word_embeddings.weight", (V, H)
    yield "embeddings.position_embeddings.weight", (config_value(info, "max_position_embeddings"), H)
    yield from _norm("embeddings.LayerNorm", H)
    for i in range(N):
        block = f"transformer.layer.{i}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from _linear(f"{block}.attention.{name}", H, H)
        yield from _norm(f"{block}.sa_layer_norm", H)
        yield from _linear(f"{block}.ffn.lin1", F, H)
        yield from _linear(f"{block}.ffn.lin2", H, F)
        yield from _norm(f"{block}.output_layer_norm", H)


def _mobilebert(info: ModelInfo) -> Named:
    H, V, N, F, E = _sizes(info, "H", "V", "N", "F", "E")
    narrow = bool(config_value(info, "use_bottleneck"))
    inside = config_value(info, "intra_bottleneck_size") if narrow else H
    shared = bool(config_value(info, "key_query_shared_bottleneck"))
    given = inside if config_value(info, "use_bottleneck_attention") else H
    yield "embeddings.word_embeddings.weight", (V, E)
    yield "embeddings.position_embeddings.weight", (config_value(info, "max_position_embeddings"), H)
    yield "embeddings.token_type_embeddings.weight", (config_value(info, "type_vocab_size"), H)
    yield from _linear("embeddings.embedding_transformation", H, E * (3 if config_value(info, "trigram_input") else 1))
    yield from _norm("embeddings.LayerNorm", H)
    for i in range(N):
        block = f"encoder.layer.{i}"
        yield from _linear(f"{block}.attention.self.query", inside, inside)
        yield from _linear(f"{block}.attention.self.key", inside, inside)
        yield from _linear(f"{block}.attention.self.value", inside, given)
        yield from _linear(f"{block}.attention.output.dense", inside, inside)
        yield from _norm(f"{block}.attention.output.LayerNorm", inside)
        yield from _linear(f"{block}.intermediate.dense", F, inside)
        yield from _linear(f"{block}.output.dense", inside, F)
        yield from _norm(f"{block}.output.LayerNorm", inside)
        if narrow:
            yield from _linear(f"{block}.output.bottleneck.dense", H, inside)
            yield from _norm(f"{block}.output.bottleneck.LayerNorm", H)
            for name in ("input", "attention") if shared else ("input",):
                yield from _linear(f"{block}.bottleneck.{name}.dense", inside, H)
                yield from _norm(f"{block}.bottleneck.{name}.LayerNorm", inside)
        for number in range(config_value(info, "num_feedforward_networks") - 1):
            yield from _linear(f"{block}.ffn.{number}.intermediate.dense", F, inside)
            yield from _linear(f"{block}.ffn.{number}.output.dense", inside, F)
            yield from _norm(f"{block}.ffn.{number}.output.LayerNorm", inside)
    if info.has_pooler and config_value(info, "classifier_activation"):
        yield from _linear("pooler.dense", H, H)


def _gpt2(info: ModelInfo) -> Named:
    H, V, N, F = _sizes(info, "H", "V", "N", "F")
    yield "wte.weight", (V, H)
    yield "wpe.weight", (config_value(info, "n_positions"), H)
    for i in range(N):
        block = f"h.{i}"
        yield from _norm(f"{block}.ln_1", H)
        # Conv1D keeps its weight the other way round.
        for name, into, out in (
            ("attn.c_attn", H, 3 * H),
            ("attn.c_proj", H, H),
            ("mlp.c_fc", H, F),
            ("mlp.c_proj", F, H),
        ):
            yield f"{block}.{name}.weight", (into, out)
            yield f"{block}.{name}.bias", (out,)
        yield from _norm(f"{block}.ln_2", H)
    yield from _norm("ln_f", H)


def _decoder(info: ModelInfo) -> Named:
    H, V, N, A, KV, D, F = _sizes(info, "H", "V", "N", "A", "KV", "D", "F")
    family = info.family
    asks = family == "qwen2" or bool(config_value(info, "attention_bias"))
    gives = family != "qwen2" and asks
    inner = bool(config_value(info, "mlp_bias"))
    yield "embed_tokens.weight", (V, H)
    for i in range(N):
        block = f"layers.{i}"
        yield from _linear(f"{block}.self_attn.q_proj", A * D, H, asks)
        yield from _linear(f"{block}.self_attn.k_proj", KV * D, H, asks)
        yield from _linear(f"{block}.self_attn.v_proj", KV * D, H, asks)
        yield from _linear(f"{block}.self_attn.o_proj", H, A * D, gives)
        if family == "qwen3":
            yield from _norm(f"{block}.self_attn.q_norm", D, bias=False)
            yield from _norm(f"{block}.self_attn.k_norm", D, bias=False)
        yield from _linear(f"{block}.mlp.gate_proj", F, H, inner)
        yield from _linear(f"{block}.mlp.up_proj", F, H, inner)
        yield from _linear(f"{block}.mlp.down_proj", H, F, inner)
        yield from _norm(f"{block}.input_layernorm", H, bias=False)
        yield from _norm(f"{block}.post_attention_layernorm", H, bias=False)
    yield from _norm("norm", H, bias=False)


def _head(info: ModelInfo) -> Named:
    H, V, C = _sizes(info, "H", "V", "C")
    family, task = info.family or "", info.task
    shared = tied(info)
    if task == "classification":
        if family == "roberta":
            yield from _linear("classifier.dense", H, H)
            yield from _linear("classifier.out_proj", C, H)
        elif family == "distilbert":
            yield from _linear("pre_classifier", H, H)
            yield from _linear("classifier", C, H)
        elif family in ("bert", "mobilebert"):
            yield from _linear("classifier", C, H)
        else:
            yield "score.weight", (C, H)
    elif task in ("masked_lm", "causal_lm"):
        if family in ("bert", "mobilebert"):
            yield from _bert_head(info, H, V, shared)
        elif family == "roberta":
            yield "lm_head.bias", (V,)
            yield from _linear("lm_head.dense", H, H)
            yield from _norm("lm_head.layer_norm", H)
            if not shared:
                yield from _linear("lm_head.decoder", V, H)
        elif family == "distilbert":
            yield from _linear("vocab_transform", H, H)
            yield from _norm("vocab_layer_norm", H)
            if not shared:
                yield "vocab_projector.weight", (V, H)
            yield "vocab_projector.bias", (V,)
        elif not shared:
            yield "lm_head.weight", (V, H)


def _bert_head(info: ModelInfo, H: int, V: int, shared: bool) -> Named:
    yield "cls.predictions.bias", (V,)
    yield from _linear("cls.predictions.transform.dense", H, H)
    yield from _norm("cls.predictions.transform.LayerNorm", H)
    width = H
    if info.family == "mobilebert":
        width = info.size("E") or H
        yield "cls.predictions.dense.weight", (H - width, V)
    if not shared:
        yield from _linear("cls.predictions.decoder", V, width)


def _usual(info: ModelInfo) -> Parameters:
    """12 H^2 a block and the embeddings, with F where it is known: what most transformers have."""
    H, V, N, F = _sizes(info, "H", "V", "N", "F")
    block = 4 * H * H + 2 * H * (F or 4 * H)
    return Parameters((("embeddings", (V, H)), *((f"block.{i}", (block,)) for i in range(N))), exact=False)
