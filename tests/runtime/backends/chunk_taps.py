"""A teacher in Gemini's chunks against one in memory: python chunk_taps.py OUT FOLDER   under RANK and WORLD_SIZE

FOLDER holds a saved model a family. Whether each tap is the same bit for bit, and the bytes that this process holds.
"""

import gc
import json
import os
import sys
import weakref
from pathlib import Path

import torch

FAMILIES = ("bert", "llama", "gpt2")
KINDS = ("hidden.0", "hidden.2", "probs", "mlp", "query", "logits", "weight")


def main(out, folder):
    from host_accelerator import install

    install()
    from gkd_dsl.graph.nodes import ModelNode
    from gkd_dsl.graph.plan import ForwardPlan, TapPlan
    from gkd_dsl.models.describe import describe
    from gkd_dsl.models.taps import TapPath
    from gkd_dsl.runtime.backends.base import Settings
    from gkd_dsl.runtime.backends.gemini import GeminiBackend
    from gkd_dsl.runtime.models.load import load
    from gkd_dsl.runtime.processes import Processes
    from gkd_dsl.runtime.teachers.gemini import GeminiTeachers
    from gkd_dsl.runtime.teachers.live import LiveTeachers
    from gkd_dsl.types import BATCH, LENGTH, Dim, TensorType

    backend = GeminiBackend(Settings(), Processes.here())
    width = TensorType("float", (BATCH, LENGTH, Dim("H", None)))
    asked = dict(
        zip(
            KINDS,
            (
                TapPath("hidden", 0), TapPath("hidden", 2), TapPath("layer", 2, "attn.probs"),
                TapPath("layer", 0, "mlp"), TapPath("layer", 1, "attn.q"), TapPath("logits"), None,
            ),
            strict=True,
        )
    )  # fmt: skip

    def forward(*paths, stop=None):
        return ForwardPlan("t/forward", "t", False, tuple(TapPlan(p.key, p, width) for p in paths), stop)

    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = {}
    for family in FAMILIES:
        info = describe(str(Path(folder) / family))
        node = ModelNode(f"model/{family}", "t", "teacher", info)
        half = load(info, half=torch.bfloat16)
        name = max((n for n, p in half.named_parameters() if ".1." in n and p.ndim == 2), key=len)
        paths = {**asked, "weight": TapPath("weight", name=name)}
        live, exact = LiveTeachers([node], {"t": half}), LiveTeachers([node], {"t": load(info)})
        for way, whole, shard, offload in (
            ("files", None, 1.0, 1.0), ("half", None, 0.5, 0.0), ("device", None, 1.0, 0.5),
            ("whole", lambda info=info: load(info), 1.0, 1.0),
        ):  # fmt: skip
            if whole is not None:
                # What cannot be read weight by weight is read whole.
                node = ModelNode(node.key, "t", "teacher", made_elsewhere(info))
            settings = {"min_chunk_size_m": 0.004, "search_range_m": 0}
            source = GeminiTeachers(node, whole, shard=shard, offload=offload, chunks=settings)
            held = [source.held()]
            for block in source._tapper.blocks(range(3)):
                block.register_forward_hook(lambda *_, h=held, s=source: h.append(s.held()))
            with backend.taps_context():
                first = source.taps(forward(paths["hidden.2"], stop=paths["hidden.2"]), inputs, {}, {})
                taps = source.taps(forward(*paths.values()), inputs, {}, {})
                wanted = live.taps(forward(*paths.values()), inputs, {}, {})
                full = exact.taps(forward(*paths.values()), inputs, {}, {})
            held.append(source.held())
            chunks = source._wrapped.chunk_manager
            all_chunks = chunks.get_chunks(source._wrapped.fp16_params)
            assert all(type(value) is torch.Tensor and not value.requires_grad for value in taps.values())
            found[f"{family}/{way}"] = {
                "same": {kind: torch.equal(taps[p.key], wanted[p.key]) for kind, p in paths.items()},
                "stopped": torch.equal(first[paths["hidden.2"].key], wanted[paths["hidden.2"].key]),
                "off": {kind: off(taps[p.key], full[p.key]) for kind, p in paths.items()},
                "whole": sum(2 * p.numel() for p in half.parameters()),
                "held": held,
                "chunks": len(all_chunks),
                "gathered": sum(chunk.is_gathered for chunk in all_chunks),
                "on the device": sum(chunk.cpu_shard is None for chunk in all_chunks),
                "buffers": sorted({str(b.dtype) for b in source.model.buffers() if b.is_floating_point()}),
            }
            del all_chunks
            gone = weakref.ref(chunks)
            del chunks, source, block
            gc.collect()
            found[f"{family}/{way}"]["let go"] = gone() is None
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(found))


def off(value, wanted):
    """The largest difference as a part of the largest value."""
    there = wanted.detach().float()
    return float((value.float() - there).abs().max() / there.abs().max())


def made_elsewhere(info):
    from dataclasses import replace

    return replace(info, build=replace(info.build, kind="random"))


if __name__ == "__main__":
    main(*sys.argv[1:])
