"""Two processes read one store, or stream one teacher each: the losses of one process with the teacher in memory."""

import json
import sys
from pathlib import Path

import pytest
from stored_world import ALL, CACHED, CLASSIFY, LANGUAGE, cache, classifiers, decoders, placed, spec

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "backends"))

from ranks import started  # noqa: E402
from stored_ranks import losses  # noqa: E402

# Each process draws the dropout of its own rows.
STILL = CLASSIFY.replace(
    'random_init("s")', 'random_init("s", hidden_dropout_prob = 0.0, attention_probs_dropout_prob = 0.0)'
)
PLACES = {
    "cached": CACHED,
    "offload": placed("placement = offload"),
    "disk": placed("placement = disk"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By the name of a spec what one process gives, and what each of two gives."""
    root = tmp_path_factory.mktemp("ranks")
    patch = pytest.MonkeyPatch()
    patch.setenv("GKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    specs, wanted = {}, {}
    for kind, make, text, words in (
        ("bert", classifiers, STILL, {"OBJECTIVE": ALL}),
        ("llama", decoders, LANGUAGE, {"LOSS": "kl"}),
    ):
        folder = root / kind
        folder.mkdir()
        make(folder)
        for place, block in PLACES.items():
            path = spec(folder, text, block, f"{place}.gkd", **words)
            if place == "cached":
                cache(path)
                alone = spec(folder, text.replace('hf("t")', 'cached("kept")'), "", "alone.gkd", **words)
                specs[f"{kind}-alone"] = alone
            specs[f"{kind}-{place}"] = path
        packed = 'hf("t") {\n  quantize = bitsandbytes(load_in_8bit = true, llm_int8_threshold = 0.0)\n}'
        specs[f"{kind}-packed"] = spec(folder, text.replace('hf("t")', packed), "", "packed.gkd", **words)
    for name, path in specs.items():
        (wanted[name],) = losses([path])
    for name, path in specs.items():
        text = path.read_text().replace("device = cpu", "device = cpu\n  backend = ddp")
        specs[name] = path.with_name(f"ddp-{path.name}")
        specs[name].write_text(text)
    processes = started(2, HERE / "stored_ranks.py", root / "out", *specs.values())
    assert [process.wait(300) for process in processes] == [0, 0]
    of_ranks = [dict(zip(specs, json.loads((root / f"out.{rank}").read_text()), strict=True)) for rank in (0, 1)]
    patch.undo()
    return wanted, of_ranks


@pytest.mark.parametrize("place", ["cached", "alone", "offload", "disk", "packed"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_two_processes_give_the_losses_of_one(found, kind, place):
    wanted, (first, second) = found
    name = f"{kind}-{place}"
    steps, metrics = wanted[name]
    assert first[name] == second[name]
    mine, its_metrics = first[name]
    assert len(mine) == len(steps) > 0
    for one, other in zip(mine, steps, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert len(its_metrics) == len(metrics)
    for one, other in zip(its_metrics, metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
