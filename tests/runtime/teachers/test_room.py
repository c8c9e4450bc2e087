"""`gkd cache` of a teacher that is too large for its device."""

import pytest
import torch
from safetensors.torch import load_file
from stored_world import CACHED, CLASSIFY, LANGUAGE, cache, classifiers, decoders, spec

from gkd_dsl.models.describe import describe, random_init
from gkd_dsl.planning.layout import weights
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.parameters import parameters
from gkd_dsl.runtime.teachers import fill, room
from gkd_dsl.runtime.teachers.room import place_for
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers

GPU = torch.device("cuda")


@pytest.mark.parametrize("place", ["offload", "disk"])
@pytest.mark.parametrize(("world", "text", "words"), [
    (classifiers, CLASSIFY, {"OBJECTIVE": "soft + hid"}), (decoders, LANGUAGE, {"LOSS": "kl"}),
])  # fmt: skip
def test_what_is_stored_is_the_same(place, world, text, words, tmp_path, monkeypatch):
    found, settle = {}, StreamedTeachers._settle
    for where in ("resident", place):
        (tmp_path / where).mkdir()
        folder = world(tmp_path / where)
        streamed = []
        monkeypatch.setattr(StreamedTeachers, "_settle", lambda self, seen=streamed: seen.append(1) or settle(self))
        monkeypatch.setattr(fill, "place_for", lambda info, half, device, where=where: where)
        cache(spec(folder, text, f"precision = bf16\n  {CACHED}", **words))
        monkeypatch.setattr(StreamedTeachers, "_settle", settle)
        assert bool(streamed) is (where != "resident")
        files = sorted((folder / "kept").rglob("*.safetensors"))
        found[where] = [load_file(file) for file in files]
        assert files
    for one, other in zip(found["resident"], found[place], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_place_follows_from_the_memories(tmp_path, monkeypatch):
    info = describe(str(classifiers(tmp_path) / "t"))
    whole, half = (weights(parameters(info), is_half) for is_half in (False, True))
    monkeypatch.setattr(room, "device_memory", lambda device: round(whole / 0.8) + 8)
    assert place_for(info, False, GPU) == "resident"
    assert place_for(info, False, torch.device("cpu")) == "resident"
    monkeypatch.setattr(room, "device_memory", lambda device: round(whole / 0.9))
    assert place_for(info, True, GPU) == "resident"
    assert place_for(info, False, GPU) == "offload"
    monkeypatch.setattr(room, "this_machine", lambda: Machine(1, half, half, kind="cpu"))
    assert place_for(info, False, GPU) == "disk"
    # What is made here has no files to be read from.
    assert place_for(random_init(info, task="classification"), False, GPU) == "offload"
