"""Teachers whose outputs are stored: the same losses, no weights, and refusals by name."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_world import (
    ALL,
    CACHED,
    CLASSIFY,
    LANGUAGE,
    WORDS,
    cache,
    classifiers,
    decoders,
    placed,
    plan,
    run,
    spec,
    table,
    tokenizer,
)

from gkd_dsl.meaning.check import check_path
from gkd_dsl.models.errors import ModelError
from gkd_dsl.runtime import fused
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.models import load
from gkd_dsl.runtime.ops.fused_head import fused_losses
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.runtime.teachers.store import Store


def close(found, wanted, rtol):
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=rtol, abs=1e-7)


def test_whole_logits_give_the_same_losses_and_metrics(tmp_path):
    folder = classifiers(tmp_path)
    live = run(spec(folder, CLASSIFY, OBJECTIVE="soft"))
    stored = spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft")
    cache(stored)
    found = run(stored)
    close(found.steps, live.steps, 1e-5)
    assert found.metrics == live.metrics
    assert len(found.metrics) == 2


def test_features_are_those_in_bf16(tmp_path):
    folder = classifiers(tmp_path)
    live = run(spec(folder, CLASSIFY, OBJECTIVE=ALL))
    stored = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(stored)
    # bf16 keeps 8 bits: a relative error of 2^-9 in what the teacher gives.
    close(run(stored).steps, live.steps, 1e-2)


def test_a_run_from_the_cache_opens_no_weights(tmp_path, monkeypatch):
    folder = classifiers(tmp_path)
    stored = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(stored)
    before = run(stored).steps
    (folder / "t" / "model.safetensors").unlink()
    original = load.load_with_report

    def without_teacher(info, **options):
        assert info.path != str(folder / "t")
        return original(info, **options)

    with monkeypatch.context() as patched:
        patched.setattr(load, "load_with_report", without_teacher)
        result = Run(plan(stored), root=folder).run()
        assert set(result.models) == {"s"}
        assert run(stored).steps == before
    with pytest.raises(ModelError, match="no weights"):
        run(spec(folder, CLASSIFY, OBJECTIVE=ALL, name="live.gkd"))


def test_the_bytes_of_a_store_do_not_hang_on_the_batch_size(tmp_path):
    folder = classifiers(tmp_path)
    stored = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(stored)
    first = Store(folder / "kept" / "main", {}, 20, read=True)
    rows = list(range(20))
    lengths = first.lengths(rows)
    one = first.read(rows, [0] * 20, max(lengths), sorted(first.parts))
    assert one["hidden.2"].dtype == torch.bfloat16
    assert one["logits"].dtype == torch.float32
    assert one["layer.1/attn.scores"].shape == (20, 2, max(lengths), max(lengths))
    for place, length in enumerate(lengths):
        assert (one["hidden.2"][place, length:] == 0).all()
        assert (one["hidden.2"][place, :length].abs().sum(-1) > 0).all()
    again = spec(
        folder, CLASSIFY.replace("batch_size = 4", "batch_size = 7"), CACHED.replace("kept", "other"), OBJECTIVE=ALL
    )
    cache(again)
    other = Store(folder / "other" / "main", {}, 20, read=True)
    two = other.read(rows, [0] * 20, max(lengths), sorted(other.parts))
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("op", ["kl", "reverse_kl", "jsd", "soft_cross_entropy"])
def test_the_largest_logits_of_a_language_model(tmp_path, op):
    folder = decoders(tmp_path)
    words = {"LOSS": op}
    dense = run(spec(folder, LANGUAGE, **words)).steps
    whole = spec(folder, LANGUAGE, CACHED, **words)
    cache(whole)
    close(run(whole).steps, dense, 1e-4)
    almost = spec(folder, LANGUAGE, placed("placement = cached", 'cache = "most"', "top_k = 44"), **words)
    cache(almost)
    # Of 45 classes one is left out: a bucket of one class is that class.
    close(run(almost).steps, dense, 1e-4)
    few = spec(folder, LANGUAGE, placed("placement = cached", 'cache = "few"', "top_k = 3"), **words)
    cache(few)
    sparse = run(few).steps
    assert all(torch.isfinite(torch.tensor(step["soft"])) for step in sparse)
    if op in ("kl", "reverse_kl", "jsd"):
        assert 0 < sparse[0]["soft"] < dense[0]["soft"]


@pytest.mark.parametrize("top_k", ["3", "0"])
def test_losses_over_stored_logits_are_run_with_the_head(tmp_path, top_k, monkeypatch):
    passes = []

    def seen(*args, **options):
        passes.append(1)
        return fused_losses(*args, **options)

    monkeypatch.setattr(fused, "fused_losses", seen)
    folder = decoders(tmp_path)
    there = placed("placement = cached", 'cache = "few"', f"top_k = {top_k}")
    found = {}
    for how in ("off", "auto", "on"):
        path = spec(folder, LANGUAGE, f"{there}\n  fuse_logits = {how}", LOSS="kl")
        if not found:
            cache(path)
        found[how] = run(path).steps
        assert len(passes) == (0 if how == "off" else len(found[how]))
        passes.clear()
    close(found["auto"], found["off"], 1e-5)
    close(found["on"], found["auto"], 0.0)


def test_top_k_of_the_command_line_is_what_a_run_reads(tmp_path):
    folder = decoders(tmp_path)
    path = spec(folder, LANGUAGE, CACHED, LOSS="kl")
    cache(path, top_k=5)
    fields = json.loads((folder / "kept" / "main" / "manifest.json").read_text())
    assert fields["identity"]["top_k"] == 5
    assert fields["identity"]["temperatures"] == [1.0, 2.0]
    assert set(fields["parts"]) == {"logits", "logits:ids", "logits:tail"}
    run(path)
    other = spec(folder, LANGUAGE, placed("placement = cached", 'cache = "kept"', "top_k = 6"), LOSS="kl")
    with pytest.raises(RunError, match="top_k is 5 there and 6 here"):
        run(other)


def test_a_temperature_at_which_nothing_is_stored_is_told(tmp_path, caplog):
    folder = decoders(tmp_path)
    few = placed("placement = cached", 'cache = "few"', "top_k = 3")
    path = spec(folder, LANGUAGE, few, LOSS="kl")
    cache(path)
    run(path)
    assert "temperature" not in caplog.text
    other = LANGUAGE.replace("temperature = 2.0", "temperature = 5.0")
    run(spec(folder, other, few, LOSS="kl"))
    assert "at temperature 1, 2; stage `main` reads them at 5, where it is estimated" in caplog.text
    caplog.clear()
    # Without a tail nothing is estimated.
    run(spec(folder, other, few.replace("top_k = 3", "top_k = 3\n    tail = renormalise"), LOSS="kl"))
    assert "temperature" not in caplog.text


def test_what_was_ended_is_gone_on_with(tmp_path):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)

    def end(model, stage, done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache(path, shard_bytes=1000, tell=end)
    (before,) = (folder / "kept").iterdir()
    had = json.loads((before / "manifest.json").read_text())["stored"]
    assert 0 < had <= 12
    # A file that was being written when the process died.
    (before / ".shard-00099.safetensors.7").write_bytes(b"half")
    with pytest.raises(RunError, match=r"has .* of 20 rows"):
        run(path)
    with pytest.raises(RunError, match="--resume"):
        cache(path)
    (filled,) = cache(path, shard_bytes=1000, resume=True)
    assert (filled.rows, filled.new) == (20, 20 - had)
    steps = run(path).steps
    whole = spec(folder, CLASSIFY, CACHED.replace("kept", "whole"), OBJECTIVE=ALL)
    cache(whole)
    close(steps, run(whole).steps, 1e-3)
    assert cache(path, resume=True)[0].new == 0


def test_damage_is_seen(tmp_path):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(path)
    shard = folder / "kept" / "main" / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(RunError, match=r"E0808.*checksum"):
        run(path)
    shard.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=f"has {len(whole) - 1} bytes, and the manifest says {len(whole)}"):
        run(path)
    shard.unlink()
    with pytest.raises(RunError, match="E0808"):
        run(path)
    (folder / "kept" / "main" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        run(path)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": 3},
        {"identity": "abc"},
        {"parts": []},
        {"parts": {"logits": {"dims": [3], "dtype": "float64"}}},
        {"shards": [3]},
        {"format": 9},
    ],
)
def test_a_manifest_that_says_something_else_ends_in_words(tmp_path, change):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(path)
    manifest = folder / "kept" / "main" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    for read in (lambda: run(path), lambda: cache(path, resume=True)):
        with pytest.raises(
            RunError, match=r"E0808.*(cannot be read|has format 9).*delete the folder, and make it again"
        ):
            read()


@pytest.mark.parametrize("byte", [0, 7])
def test_a_row_number_that_is_damaged(tmp_path, byte):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(path)
    shard = folder / "kept" / "main" / "shard-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    head = int.from_bytes(whole[:8], "little")
    whole[8 + head + json.loads(whole[8 : 8 + head])["rows"]["data_offsets"][0] + byte] ^= 0xFF
    shard.write_bytes(whole)
    with pytest.raises(RunError, match=r"E0808.*shard-00000\.safetensors is damaged.*--resume"):
        run(path)
    assert cache(path, resume=True)[0].new == 20
    run(path)


def test_resume_runs_the_rows_of_damaged_files_again(tmp_path):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(path, shard_bytes=2000)
    before = run(path).steps
    kept = folder / "kept" / "main"
    entries = json.loads((kept / "manifest.json").read_text())["shards"]
    assert len(entries) > 4
    files = [kept / entry["file"] for entry in entries]
    assert cache(path, resume=True)[0].new == 0
    flipped = bytearray(files[1].read_bytes())
    flipped[-20] ^= 8
    files[1].write_bytes(flipped)
    files[2].unlink()
    files[3].write_bytes(b"\xff" * entries[3]["bytes"])
    with pytest.raises(RunError, match=r"shard-00002.safetensors is missing.*--resume"):
        run(path)
    (filled,) = cache(path, resume=True)
    assert (filled.rows, filled.new) == (20, sum(entries[number]["rows"] for number in (1, 2, 3)))
    # What was whole is as it was.
    assert files[4].stat().st_size == entries[4]["bytes"]
    close(run(path).steps, before, 1e-3)
    assert cache(path, resume=True)[0].new == 0


def test_a_store_can_be_read_by_whom_the_umask_lets(tmp_path):
    folder = classifiers(tmp_path)
    cache(spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft"))
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (folder / "kept" / "main").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}
    assert len(modes) == 2


def test_another_data_set_tokenizer_or_model_is_refused_by_name(tmp_path):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft")
    cache(path)
    run(path)
    with pytest.raises(RunError, match=r"has no `hidden\[2\]`"):
        run(spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft + hid", name="more.gkd"))
    table(folder, 20, seed=1)
    with pytest.raises(RunError, match=r"data set is .* there and .* here"):
        run(path)
    table(folder, 20)
    run(path)
    with pytest.raises(RunError, match="data set is"):
        run(spec(folder, CLASSIFY.replace("batch_size", "max_length = 6\n  batch_size"), CACHED, OBJECTIVE="soft"))
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft")
    tokenizer(WORDS[::-1]).save_pretrained(folder / "s")
    tokenizer(WORDS[::-1]).save_pretrained(folder / "t")
    with pytest.raises(RunError, match="tokenizer is"):
        run(path)
    for name in ("s", "t"):
        tokenizer().save_pretrained(folder / name)
    run(path)
    config = json.loads((folder / "t" / "config.json").read_text())
    (folder / "t" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    with pytest.raises(RunError, match="model config is"):
        run(path)


def test_weight_files_of_another_size_are_refused(tmp_path):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft")
    cache(path)
    file = folder / "t" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt", "more": "x" * 64})
    with pytest.raises(RunError, match=r"weights is .* there and .* here"):
        run(path)


def test_the_seed_of_a_head_that_was_drawn_is_part_of_what_is_stored(tmp_path):
    folder = classifiers(tmp_path)
    saved = spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft")
    cache(saved)
    other = CLASSIFY.replace("batch_size", "seed = 5\n  batch_size")
    run(spec(folder, other, CACHED, OBJECTIVE="soft"))
    drawn = CLASSIFY.replace('hf("t")', 'hf("t", num_labels = 4)').replace('("s")', '("s", num_labels = 4)')
    cache(spec(folder, drawn, CACHED.replace("kept", "drawn"), OBJECTIVE="soft"))
    other = drawn.replace("batch_size", "seed = 5\n  batch_size")
    with pytest.raises(RunError, match="seed of new weights is 0 there and 5 here"):
        run(spec(folder, other, CACHED.replace("kept", "drawn"), OBJECTIVE="soft"))


def test_auto_runs_the_teacher_in_the_first_epoch_alone(tmp_path, monkeypatch):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, placed("cache = auto"), OBJECTIVE=ALL)
    forwards = []
    from gkd_dsl.runtime.teachers import live

    original = live.run_taps
    monkeypatch.setattr(live, "run_taps", lambda *given: forwards.append(given[1].model) or original(*given))
    auto = run(path, RunFolder.create("auto", out=folder / "auto"))
    # 16 rows to train on and 4 held out, 4 a batch: each once, of three epochs and two evaluations.
    assert forwards == ["t"] * 5
    close(auto.steps, run(spec(folder, CLASSIFY, OBJECTIVE=ALL, name="live.gkd")).steps, 1e-2)
    stored = spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL, name="cached.gkd")
    cache(stored)
    close(auto.steps, run(stored).steps, 1e-3)


def test_auto_goes_on_after_a_kill(tmp_path):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace("batch_size = 4", "batch_size = 4\n  checkpoint_every = 1 steps")
    path = spec(folder, text, placed("cache = auto"), OBJECTIVE=ALL)
    whole = run(path, RunFolder.create("a", out=folder / "a"))

    class Kill:
        def on_stage(self, record):
            pass

        def on_step(self, record):
            if record.step == 7:
                raise KeyboardInterrupt

        def on_evaluate(self, record):
            pass

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        run(path, RunFolder.create("b", out=folder / "b"), listeners=[Kill()])
    rest = run(path, RunFolder.open(folder / "b"), resume=True)
    assert rest.steps == whole.steps[-len(rest.steps) :]
    assert 0 < len(rest.steps) < len(whole.steps)


def test_auto_says_why_it_does_not_store(tmp_path, caplog):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, placed("cache = auto"), OBJECTIVE="soft")
    run(path)
    assert "the run has no folder" in caplog.text


def test_an_empty_text_is_no_folder(tmp_path):
    path = spec(classifiers(tmp_path), CLASSIFY, placed("placement = cached", 'cache = ""'), OBJECTIVE="soft")
    assert [found.code for found in check_path(path).diagnostics.errors] == ["E0431"]


def test_auto_of_a_model_that_is_trained_says_so(tmp_path, caplog):
    folder = classifiers(tmp_path)
    runtime = placed("cache = auto").replace("teacher t", "student s")
    run(spec(folder, CLASSIFY, runtime, OBJECTIVE=ALL), RunFolder.create("r", out=folder / "r"))
    assert "`cache = auto` of `s` in stage `main`: it is trained; it is run each time" in caplog.text
    assert not (folder / "r" / "teachers").exists()


@pytest.mark.parametrize("auto", [False, True])
def test_outputs_that_are_no_numbers_are_not_stored(tmp_path, auto):
    folder = classifiers(tmp_path)
    file = folder / "t" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.2.output.dense.bias"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    path = spec(folder, CLASSIFY, placed("cache = auto") if auto else CACHED, OBJECTIVE=ALL)
    with pytest.raises(RunError, match=r"E0802: `t` gives `\S+` that is not a number for rows \d+ to \d+; nothing of"):
        run(path, RunFolder.create("auto", out=folder / "auto")) if auto else cache(path)
    assert not list(folder.glob("**/shard-*"))


def test_all_frozen_teachers_without_a_place(tmp_path, monkeypatch):
    folder = classifiers(tmp_path)
    path = spec(folder, CLASSIFY, OBJECTIVE="soft")
    (filled,) = cache(path, out=folder / "out")
    assert filled.folder == folder / "out" / "t" / "main"
    found = run(spec(folder, CLASSIFY, CACHED.replace("kept", "out/t"), OBJECTIVE="soft"))
    assert found.steps


def test_of_several_teachers_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace("student s", 'teacher u = hf("t")\nstudent s').replace(
        "loss hid", "loss more = kl(s.logits <- u.logits)\nloss hid"
    )
    held, original = [], Run.alone

    def alone(self, plan, name):
        source = original(self, plan, name)
        held.append(set(self.models))
        return source

    monkeypatch.setattr(Run, "alone", alone)
    stages = (
        text.replace("OBJECTIVE", "soft + more") + "stage again for 1 epoch {\n  batch_size = 4\n  minimize soft\n}\n"
    )
    found = cache(spec(folder, stages), out=folder / "out")
    assert [(filled.model, filled.stage) for filled in found] == [("t", "main"), ("t", "again"), ("u", "main")]
    assert held == [{"t"}, {"t"}, {"u"}]
