"""Numbers of a plan against counts made by hand, for two Llamas of 8 and 2 blocks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.planning.chunks import chunks
from gkd_dsl.planning.estimate import estimate
from gkd_dsl.planning.layout import Setup, Trained, trained
from gkd_dsl.planning.machine import Machine, this_machine
from gkd_dsl.planning.operators import in_kernel
from gkd_dsl.planning.parameters import parameters
from gkd_dsl.planning.search import _options, cheapest
from gkd_dsl.planning.simulate import depth

GIB = 2**30
ONE, TWO = Machine(1, 80 * GIB, 80 * GIB), Machine(2, 80 * GIB, 80 * GIB)
BLOCK = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
HEAD = 2000 * 64
STUDENT = 2 * BLOCK + 2 * HEAD + 64
MICRO = 4


def node_of(plan, name):
    return next(node for node in plan.stages[0].models if node.name == name)


@pytest.mark.parametrize(
    ("train", "student", "found"),
    [
        ("s", 'hf("s")', Trained(STUDENT, HEAD, 0)),
        ("s.embed", 'hf("s")', Trained(HEAD, HEAD, 0)),
        ("s.layer[0]", 'hf("s")', Trained(BLOCK, 64 * 128, 1)),
        ("s.layer[1], s.head", 'hf("s")', Trained(BLOCK + HEAD, HEAD, 2)),
        ("s.head", 'hf("s")', Trained(HEAD, HEAD, 3)),
        ("s", 'hf("s") {\n adapter = lora(r = 2, targets = ["q_proj"])\n}', Trained(2 * 2 * 2 * 64, 128, 1)),
    ],
)
def test_what_is_trained_and_from_which_block_on(train, student, found, compiled):
    plan = compiled(student=student, stage=f"  train {train}")
    assert trained(plan.stages[0], node_of(plan, "s")) == found
    stage = estimate(plan, ONE)[0]
    assert dict(stage.device)["optimizer"] in (8 * found.count, 12 * found.count)


@pytest.mark.parametrize(("optim", "moments"), [("adamw", 2), ("sgd", 0), ("sgd", 1)])
def test_moments_of_the_optimiser(optim, moments, compiled):
    how = f"{optim}(lr = 0.1, momentum = 0.9)" if moments == 1 else f"{optim}(lr = 0.1)"
    stage = estimate(compiled(stage=f"  optim = {how}"), replace(ONE, kind="cpu"))[0]
    held = dict(stage.device).get("optimizer", 0)
    # On the CPU Adam's square roots, of the largest tensor, come on top where its step is the peak.
    assert held in (4 * moments * STUDENT, 4 * moments * STUDENT + 8 * HEAD * (moments == 2))


def test_computed_positions_do_not_shorten_a_text(compiled):
    """Llama's positions go on beyond those that its config names, and so do its runs."""
    assert [estimate(compiled(max_length=n), ONE)[0].length for n in (16, 64, 4096)] == [16, 64, 4096]


@pytest.mark.parametrize(("tap", "blocks"), [("logits", 8), ("final", 8), ("hidden[8]", 8), ("hidden[3]", 3)])
def test_of_a_streamed_teacher_the_blocks_that_run_are_moved(tap, blocks, compiled):
    """Also where the head is not run, which stays on the device in any case."""
    student = "logits" if tap == "logits" else "hidden[1]"
    plan = compiled(loss=f"mse(s.{student} <- t.{tap})")
    for place in ("offload", "disk"):
        stage = estimate(plan, ONE, Setup(placement=(("t", place),)))[0]
        teacher = next(model for model in stage.models if model.name == "t")
        assert teacher.moved == 4 * blocks * BLOCK
        assert dict(stage.work.link) == {"t weights": MICRO * 4 * blocks * BLOCK}
        assert teacher.read == (4 * blocks * BLOCK if place == "disk" else 0)


@pytest.mark.parametrize(("tap", "left"), [("logits", 0), ("hidden[8]", HEAD), ("hidden[3]", 5 * BLOCK + HEAD)])
def test_of_a_teacher_in_chunks_what_is_not_run_is_not_moved(tap, left, compiled):
    student = "logits" if tap == "logits" else "hidden[1]"
    plan = compiled(loss=f"mse(s.{student} <- t.{tap})")
    setup = Setup("gemini", half=True, placement=(("t", "gemini"),), chunk=2**14, reach=0)
    found = parameters(node_of(plan, "t").info)
    needed = 1 - left / found.count
    teacher = next(model for model in estimate(plan, TWO, setup)[0].models if model.name == "t")
    each = 2 * chunks(found, 2**14, 0).total / 2
    assert (teacher.moved, teacher.gathered) == (
        pytest.approx(each * needed, abs=1),
        pytest.approx(each * needed, abs=1),
    )


def test_the_columns_of_all_micro_batches_are_there_at_once(compiled):
    few, many = (estimate(compiled(accumulate=n), ONE)[0] for n in (4, 32))
    columns = len(compiled().stages[0].columns)
    assert columns >= 2
    assert many.device_bytes - few.device_bytes == 8 * columns * 8 * 64 * (32 - 4)


def test_what_a_host_can_keep_is_read_from_disk_once(compiled):
    plan, size = compiled(), 4 * 8 * BLOCK
    for host, read in ((1.3 * size, 0), (1.2 * size, MICRO * size)):
        stage = estimate(plan, replace(ONE, host_memory=round(host)), Setup(placement=(("t", "disk"),)))[0]
        assert dict(stage.work.disk).get("t weights", 0) == read


@pytest.mark.parametrize(("field", "width"), [({"torch_dtype": "bfloat16"}, 2), ({"dtype": "float16"}, 2), ({}, 4)])
def test_a_file_has_numbers_as_wide_as_its_config_says(field, width, compiled, tmp_path):
    compiled()
    config = tmp_path / "t" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    teacher = next(m for m in estimate(compiled("teacher t { placement = disk }"), ONE)[0].models if m.name == "t")
    # In memory they are as the precision of the run has them.
    assert (teacher.read, teacher.moved) == (width * 8 * BLOCK, 4 * 8 * BLOCK)


def test_what_gemini_moves_of_a_student(compiled):
    """For the forward and for the backward of each micro-batch: bf16 chunks, half of them here; gradients back."""
    plan = compiled("precision = bf16")
    setup = Setup("gemini", half=True, offload_optim_frac=1.0, offload_param_frac=1.0, chunk=2**14, reach=0)
    packed = chunks(parameters(node_of(plan, "s").info), 2**14, 0).total
    work = estimate(plan, TWO, setup)[0].work
    assert dict(work.link)["s weights"] == 2 * MICRO * 2 * packed / 2
    assert dict(work.link)["s optimizer"] == 4 * STUDENT / 2
    assert dict(work.between)["s weights"] == 2 * MICRO * 2 * packed / 2
    assert dict(work.between)["s gradients"] == MICRO * 2 * STUDENT / 2
    staying = estimate(plan, TWO, replace(setup, offload_param_frac=0.0, offload_optim_frac=0.0))[0].work
    assert not dict(staying.link)


def test_a_stage_fits_in_both_memories_and_on_a_cpu_in_the_one(compiled):
    stage = estimate(compiled(), ONE)[0]

    def fits(device, host, machine, margin=0.0):
        return replace(stage, device=(("weights", device),), host=(("t weights", host),)).fits(machine, margin)

    gpu, cpu = Machine(1, 1000, 2000), Machine(1, 1000, 1000, kind="cpu")
    assert fits(950, 1900, gpu)
    assert not fits(951, 0, gpu)
    assert not fits(0, 1901, gpu)
    assert not fits(950, 0, gpu, 0.05)
    assert not fits(0, 1900, gpu, 0.05)
    assert fits(900, 50, cpu)
    assert not fits(900, 51, cpu)


def test_a_change_leaves_more_free_than_it_must_where_it_can(compiled):
    plan = compiled("precision = bf16", batch_size=64)
    halved = estimate(plan, ONE, replace(Setup.of(plan), split=2))[0].device_bytes
    machine = replace(ONE, device_memory=round(halved / 0.94))
    assert estimate(plan, machine)[0].device_bytes > 0.95 * machine.device_memory
    found = cheapest(plan, machine, Setup.of(plan))
    assert found is not None
    assert found.stages[0].fits(machine, 0.05)


def options(plan, machine):
    return list(_options(plan, machine, Setup.of(plan)))


def test_every_device_has_whole_texts_in_each_change(compiled):
    plan = compiled(batch_size=24, accumulate=3)
    for setup in options(plan, TWO):
        assert 24 * setup.merge % (setup.split * setup.ranks(TWO)) == 0
        assert 3 % setup.merge == 0
    assert max(setup.split for setup in options(plan, ONE)) == 8
    assert {setup.split for setup in options(plan, TWO) if setup.backend != "local"} == {1, 2, 4}


def test_what_cannot_be_moved_stays_in_each_change(compiled):
    packed = compiled(teacher='hf("t") {\n quantize = bitsandbytes(load_in_8bit = true)\n}')
    assert {setup.placement for setup in options(packed, ONE)} == {()}
    # What is made from a config alone is in no file.
    made = compiled(teacher='random_init("t")')
    assert {where for setup in options(made, ONE) for _, where in setup.placement} == {"offload", "gemini"}
    adapted = compiled(student='hf("s") {\n adapter = lora(r = 2, targets = ["q_proj"])\n}')
    assert {setup.backend for setup in options(adapted, TWO)} == {"local", "ddp"}
    plain = compiled(stage="  optim = sgd(lr = 0.1)")
    assert {setup.backend for setup in options(plain, TWO)} == {"local", "ddp"}


@pytest.mark.parametrize(
    ("ops", "fits"),
    [
        (("kl", "cross_entropy"), True),
        (("jsd",), True),
        (("kl", "jsd"), False),
        (("cross_entropy", "cross_entropy"), False),
        (("tvd",), False),
    ],
)
def test_a_kernel_has_one_loss_of_each_kind(ops, fits):
    assert in_kernel(ops) is fits


@pytest.mark.parametrize(
    ("stop", "blocks"),
    [
        (None, 8),
        (TapPath("embed"), 0),
        (TapPath("hidden", 0), 0),
        (TapPath("hidden", 3), 3),
        (TapPath("layer", 3, "out"), 4),
        # Its query is there before the block has done much.
        (TapPath("layer", 3, "attn.q"), 3),
        (TapPath("logits"), 8),
    ],
)
def test_blocks_that_a_forward_runs(stop, blocks, compiled):
    assert depth(ForwardPlan("t/forward", "t", False, (), stop), node_of(compiled(), "t")) == blocks


def test_the_memory_of_the_host_is_what_its_group_may_have(monkeypatch):
    said = {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: said[str(path)])
    assert this_machine().host_memory == 2**20
    said["/sys/fs/cgroup/memory.max"] = "2097152"
    assert this_machine().host_memory == 2**21
    said |= dict.fromkeys(said, str(2**60))
    assert 2**21 < this_machine().host_memory < 2**60


def machine_of(*words):
    spec = Path(__file__).parents[2] / "examples" / "large" / "distil.gkd"
    done = CliRunner().invoke(application("plan"), ["plan", str(spec), "--json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)["machine"]


def test_options_are_of_what_they_say(monkeypatch):
    monkeypatch.setenv("PATH", "")
    here = machine_of("--host-memory", "3GiB")
    assert (here["kind"], here["device_bytes"], here["host_bytes"]) == ("cpu", 3 * GIB, 3 * GIB)
    words = ("--device-memory", "40GiB", "--host-memory", "3GiB", "--link", "50GB/s", "--disk", "1GB/s")
    there = machine_of(*words)
    assert (there["kind"], there["devices"], there["device_bytes"], there["host_bytes"]) == (
        "cuda",
        1,
        40 * GIB,
        3 * GIB,
    )
    assert [there[f"{name}_bytes_a_second"] for name in ("link", "between", "disk")] == [50e9, 50e9, 1e9]
    assert machine_of(*words, "--between", "300GB/s")["between_bytes_a_second"] == 300e9
