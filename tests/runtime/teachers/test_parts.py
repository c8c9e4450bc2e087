"""Taps as they are stored and as they come back, without a model."""

import numpy as np
import torch

from gkd_dsl.graph.passes.sparse import IDS, TAIL, TopK
from gkd_dsl.graph.plan import ForwardPlan, TapPlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.teachers.parts import Layout, own_tokens, spans
from gkd_dsl.runtime.teachers.store import Store
from gkd_dsl.types import BATCH, LENGTH, Dim, TensorType

SCORES, LOGITS, WEIGHT = TapPath("layer", 0, "attn.scores"), TapPath("logits"), TapPath("weight", name="w")
CPU = torch.device("cpu")


def layout_of(top_k=None):
    heads, classes = Dim("A", 2), Dim("C", 6)
    types = {
        SCORES: TensorType("float", (BATCH, heads, LENGTH, LENGTH)),
        LOGITS: TensorType("float", (BATCH, classes)),
        WEIGHT: TensorType("float", (Dim("H", 3),)),
    }
    return Layout(types, top_k), types


def forward_of(types, *more):
    taps = (*(TapPlan(f"t/{path.key}", path, type) for path, type in types.items()), *more)
    return ForwardPlan("t/forward", "t", False, taps)


def values_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    scores = torch.randn(2, 2, 4, 4, generator=generator)
    # As a decoder masks its keys.
    hidden = ~mask.bool()[:, None, None] | torch.ones(4, 4, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    return {
        SCORES: scores,
        LOGITS: torch.randn(2, 6, generator=generator),
        WEIGHT: torch.randn(3, generator=generator),
    }, mask


def through_a_store(folder, layout, values, mask):
    """What is read back of a store that is opened again, in another batch: its rows the other way round."""
    store = Store(folder, {}, 2)
    for name, dims in layout.dims().items():
        store.declare(name, dims)
    store.shared = {path.key: values[path] for path in layout.shared()}
    parts = layout.encode(values, mask)
    starts, counts = spans(mask)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        store.add(row, count, own_tokens(parts, layout.dims(), row, start, count))
    again = Store(folder, {}, 2, read=True)
    assert again.complete
    assert again.lengths([1, 0]) == counts[::-1]
    return again.read([1, 0], starts[::-1], mask.shape[1], sorted(again.parts)) | again.shared


def test_what_masks_attention_stays_a_number(tmp_path):
    layout, types = layout_of()
    values, mask = values_of()
    found = layout.decode(through_a_store(tmp_path, layout, values, mask), forward_of(types), CPU)
    scores = found["t/layer.0/attn.scores"]
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    seen = (mask[:, None, :, None] * mask[:, None, None, :]).bool().expand_as(scores).flip(0)
    wanted = values[SCORES].flip(0)
    np.testing.assert_allclose(scores[seen].numpy(), wanted[seen].numpy(), rtol=2**-7)
    assert (scores[~seen] == 0).all()
    # Logits and weights come back bit for bit.
    assert torch.equal(found["t/logits"], values[LOGITS].flip(0))
    assert torch.equal(found["t/weight.w"], values[WEIGHT])


def test_the_largest_logits_come_back_with_the_mass_of_the_others(tmp_path):
    top_k = TopK(2, (1.0, 3.0))
    layout, types = layout_of(top_k)
    values, mask = values_of(1)
    rest = TensorType("int", (BATCH, Dim("k", 2)))
    forward = forward_of(types, *(TapPlan(f"t/logits{end}", LOGITS, rest) for end in (IDS, TAIL)))
    found = layout.decode(through_a_store(tmp_path, layout, values, mask), forward, CPU)
    logits = values[LOGITS].flip(0).double().numpy()
    order = np.argsort(-logits, axis=-1)
    assert found[f"t/logits{IDS}"].dtype == torch.int64
    assert found[f"t/logits{IDS}"].tolist() == order[:, :2].tolist()
    np.testing.assert_array_equal(found["t/logits"].numpy(), np.take_along_axis(logits, order[:, :2], -1).astype("f"))
    others = np.take_along_axis(logits, order[:, 2:], -1)
    mass = np.stack([np.log(np.exp(others / T).sum(-1)) for T in (1.0, 3.0)], -1)
    np.testing.assert_allclose(found[f"t/logits{TAIL}"].numpy(), mass, rtol=1e-5)


def test_a_lost_file_of_weights_is_written_anew(tmp_path):
    """The rows of one shard are run again, so that there is something to take the weights from."""
    layout, _ = layout_of()
    values, mask = values_of()
    through_a_store(tmp_path, layout, values, mask)
    (tmp_path / "shared.safetensors").write_bytes(b"half")
    store = Store(tmp_path, {}, 2, mend=True)
    assert not store.complete
    assert store.shared == {}
    assert not (tmp_path / "shared.safetensors").exists()
