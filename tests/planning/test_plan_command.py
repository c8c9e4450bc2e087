import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.planning import units
from gkd_dsl.planning.chunks import Chunks, chunks
from gkd_dsl.planning.estimate import estimate, seconds_of
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine, this_machine
from gkd_dsl.planning.parameters import Parameters, parameters
from gkd_dsl.planning.report import block, report
from gkd_dsl.planning.search import _options, _ordered, changes, cheapest, weigh

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "examples" / "large" / "distil.gkd"
GIB = 2**30
EIGHT = Machine(8, 40 * GIB, 512 * GIB, between=200e9)
ONE = Machine(1, 80 * GIB, 512 * GIB)
SIZES = {"10b": 9_775_157_248, "70b": 70_553_706_496, "110b": 110_819_024_896, "405b": 405_853_388_800}


def plan_of(teacher="70b", path=SPEC):
    checked = check_path(path, params={"teacher": teacher} if path == SPEC else {})
    assert checked.ok
    return compile_plan(checked.graph, runtime=checked.runtime)


def run(*words):
    return CliRunner().invoke(application("plan"), ["plan", *words])


@pytest.mark.parametrize(
    ("teacher", "machine"), [(t, m) for t in SIZES for m in (EIGHT, ONE) if (t, m) != ("10b", ONE)]
)
def test_large_teachers_do_not_fit_as_they_are_and_fit_with_the_change(teacher, machine):
    plan = plan_of(teacher)
    found = report("distil.gkd", plan, machine)
    models = {model.name: model for model in found.stages[0].models}
    assert models["t"].count == SIZES[teacher]
    assert models["t"].trains == 0
    assert models["s"].trains == models["s"].count == 1_235_814_400
    assert not found.fits
    assert found.proposal is not None
    for stage in found.proposal.stages:
        assert stage.fits(machine)
        assert stage.device_bytes <= 0.95 * machine.device_memory
        assert stage.host_bytes <= 0.95 * machine.host_memory
    assert found.proposal.setup != found.setup


def test_a_teacher_larger_than_the_host_is_read_from_disk_and_says_what_bounds_a_step():
    found = report("distil.gkd", plan_of("405b"), ONE)
    assert found.proposal is not None
    assert dict(found.proposal.setup.placement) == {"t": "disk"}
    work = found.proposal.stages[0].work
    inside = SIZES["405b"] - 2 * 128256 * 16384 - 16384
    assert dict(work.disk)["t weights"] == pytest.approx(2 * inside * found.proposal.stages[0].micro, rel=1e-6)
    assert work.seconds(ONE) == max(work.compute_seconds(ONE), work.link_seconds(ONE), work.disk_seconds(ONE))


def test_a_machine_that_is_large_enough_needs_no_change():
    found = report("distil.gkd", plan_of("10b"), ONE)
    assert found.fits
    assert found.proposal is None
    assert found.text().endswith("It fits.")


def test_nothing_fits_a_tiny_machine():
    found = report("distil.gkd", plan_of("70b"), Machine(1, GIB, GIB))
    assert not found.fits
    assert found.proposal is None
    assert "No change of the runtime block that was tried makes it fit." in found.text()


def pasted(text, source):
    """A spec with the lines of a proposal in the place of its own."""
    head, _, block_ = text.rpartition("runtime {")
    source = source[: source.rindex("\nruntime {")] if "\nruntime {" in source else source
    for name, value in re.findall(r"(batch_size|accumulate) = (\d+)", head):
        source = re.sub(rf"{name} = \d+", f"{name} = {value}", source)
    return f"{source}\nruntime {{{block_}\n"


@pytest.mark.parametrize("teacher", SIZES)
@pytest.mark.parametrize("machine", [EIGHT, ONE, replace(EIGHT, host_memory=1024 * GIB), replace(ONE, devices=2)])
def test_a_proposal_that_is_pasted_back_checks_and_fits(teacher, machine, tmp_path):
    found = report("distil.gkd", plan_of(teacher), machine)
    if found.proposal is None:
        assert found.fits
        return
    shutil.copytree(SPEC.parent, tmp_path / "large")
    path = tmp_path / "large" / "distil.gkd"
    path.write_text(pasted(block(found.plan, found.setup, found.proposal.setup), SPEC.read_text()))
    checked = check_path(path, params={"teacher": teacher})
    assert checked.ok, [diagnostic.message for diagnostic in checked.diagnostics]
    assert not checked.later
    again = report("distil.gkd", compile_plan(checked.graph, runtime=checked.runtime), machine)
    assert again.fits
    assert [s.device_bytes for s in again.stages] == [s.device_bytes for s in found.proposal.stages]
    assert [s.host_bytes for s in again.stages] == [s.host_bytes for s in found.proposal.stages]
    assert sum(s.work.seconds(machine) for s in again.stages) == pytest.approx(found.proposal.seconds)


@pytest.mark.parametrize("teacher", SIZES)
def test_arithmetic_is_six_operations_a_weight_and_token_for_the_student_and_two_for_the_teacher(teacher):
    found = estimate(plan_of(teacher), ONE)[0]
    tokens = 8 * 4 * 2048
    flops = dict(found.work.flops)
    for name, times, count in (("t", 2, SIZES[teacher]), ("s", 6, 1_235_814_400)):
        assert flops[name] >= 0.9 * times * count * tokens
        # Attention over all pairs, and no more than that, comes on top.
        assert flops[name] <= 1.2 * times * count * tokens


def test_bytes_of_a_parameter_by_hand(tmp_path):
    """What a device holds before a step: fp32 weights, moments; in bf16 the frozen teacher two bytes a matrix."""
    plan = plan_of(path=write(tmp_path, "runtime { precision = bf16 }"))
    found = estimate(plan, ONE)[0]
    models = {model.name: model for model in found.models}
    # A norm before attention, one before the feed-forward part, and the last.
    vectors = {"t": 64 * (2 * 8 + 1), "s": 64 * (2 * 2 + 1)}
    assert models["t"].device == 2 * models["t"].count + 2 * vectors["t"]
    assert models["s"].device == 4 * models["s"].count
    assert dict(found.device)["optimizer"] == 8 * models["s"].count
    # Autocast keeps a copy of what the student's products take; the head is fused, embeddings are looked up.
    copies = 2 * (models["s"].count - vectors["s"] - 2 * 500 * 64)
    assert dict(found.device)["weights"] == models["t"].device + models["s"].device + copies
    plain = estimate(plan_of(path=write(tmp_path, "")), ONE)[0]
    assert next(m.device for m in plain.models if m.name == "t") == 4 * models["t"].count


def test_checkpointing_comes_first_where_it_is_enough_and_nothing_else_is_as_cheap(tmp_path):
    path = write(tmp_path, "", batch_size="1", accumulate="1")
    text = (
        path.read_text()
        .replace("  minimize soft", "  minimize soft\n  max_length = 1024")
        .replace('hf("./s")', 'hf("./t")')
    )
    path.write_text(text.replace('teacher t = hf("./t")', 'teacher t = hf("./s")'))
    plan = plan_of(path=path)
    need = estimate(plan, ONE)[0].device_bytes
    only = replace(Setup.of(plan), half=True)
    machine = replace(ONE, device_memory=round(0.8 * estimate(plan, ONE, only)[0].device_bytes))
    found = cheapest(plan, machine, Setup.of(plan))
    assert found is not None
    assert found.setup.checkpoint
    assert found.setup.backend == "local"
    assert need > machine.device_memory


def test_ddp_is_proposed_where_the_rows_can_be_shared_out(tmp_path):
    plan = plan_of(path=write(tmp_path, "", batch_size="12", accumulate="1"))
    for devices, even in ((4, True), (8, False)):
        machine = replace(EIGHT, devices=devices)
        backends = {
            setup.backend
            for _, setup in _ordered(plan, machine, Setup.of(plan), _options(plan, machine, Setup.of(plan)))
        }
        assert backends == ({"local", "ddp", "gemini"} if even else {"local"})


def test_the_block_is_what_the_proposal_says(tmp_path):
    small = write(tmp_path, "")
    plan = plan_of(path=small)
    need = estimate(plan, Machine(1, 2**50, 2**50))[0].device_bytes
    machine = Machine(1, round(0.9 * need), 2**40)
    proposal = cheapest(plan, machine, Setup.of(plan))
    assert proposal is not None
    text = block(plan, Setup.of(plan), proposal.setup)
    head, _, runtime = text.rpartition("runtime {")
    stage = (
        dict(pair.strip().split(" = ") for pair in head.partition(": ")[2].partition(" (")[0].split(","))
        if head
        else {}
    )
    again = plan_of(path=write(tmp_path, f"runtime {{{runtime}", **stage))
    found = Setup.of(again)
    assert replace(proposal.setup, split=1, merge=1) == found
    assert [s.device_bytes for s in estimate(again, machine)] == [s.device_bytes for s in proposal.stages]
    assert all(s.fits(machine) for s in estimate(again, machine))


@pytest.mark.parametrize(
    "setup",
    [
        Setup(),
        Setup(half=True, checkpoint=True, fuse=False),
        Setup("ddp", placement=(("t", "offload"),)),
        Setup(placement=(("t", "disk"),)),
        Setup(half=True, placement=(("t", "cached"),)),
        Setup("gemini", half=True, offload_optim_frac=1.0, offload_param_frac=0.5),
    ],
)
def test_a_block_checks_and_says_the_setup(setup, tmp_path):
    (tmp_path / "outputs" / "t").mkdir(parents=True)
    plan = plan_of(path=write(tmp_path, ""))
    again = plan_of(path=write(tmp_path, block(plan, Setup.of(plan), setup)))
    assert Setup.of(again) == setup


def write(folder, runtime, batch_size="16", accumulate="2"):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 500, "hidden_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
    }  # fmt: skip
    for name, layers in (("t", 8), ("s", 2)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    path = folder / "spec.gkd"
    path.write_text(f"""gkd 1
teacher t = hf("./t")
student s = hf("./s")
param rows: text "rows"
data d = text(rows)
loss soft = kl(s.logits <- t.logits)
stage main for 10 steps {{
  minimize soft
  batch_size = {batch_size}
  accumulate = {accumulate}
}}
{runtime}
""")
    return path


def test_options_are_tried_in_the_order_of_the_steps_time():
    plan = plan_of("70b")
    current = Setup.of(plan)
    found = cheapest(plan, ONE, current)
    assert found is not None
    tried = _ordered(plan, ONE, current, _options(plan, ONE, current))
    place = [setup for _, setup in tried].index(found.setup)
    assert 0 < place < len(tried) - 1
    for _, setup in tried[:place]:
        assert not all(stage.fits(ONE, 0.05) for stage in estimate(plan, ONE, setup))
    times = [weigh(*seconds_of(plan, ONE, setup), setup) for _, setup in tried]
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(times))
    assert changes(current, current) == 0
    assert changes(current, found.setup) >= 1


def test_a_change_that_just_fits_is_taken_where_none_leaves_more_free(tmp_path):
    plan = plan_of(path=write(tmp_path, ""))
    least = min(
        estimate(plan, ONE, setup)[0].device_bytes
        for _, setup in _ordered(plan, ONE, Setup.of(plan), _options(plan, ONE, Setup.of(plan)))
    )
    machine = replace(ONE, device_memory=round(least / 0.94))
    found = cheapest(plan, machine, Setup.of(plan))
    assert found is not None
    assert found.stages[0].fits(machine)
    assert not found.stages[0].fits(machine, 0.05)


def test_a_teacher_that_fits_nowhere_is_cached():
    # Of its blocks none fits beside the student, and its embeddings do not either.
    found = report("distil.gkd", plan_of("405b"), replace(ONE, device_memory=24 * GIB))
    assert found.proposal is not None
    assert found.proposal.cached
    assert "`gkd cache SPEC`" in found.text()


def test_a_smaller_part_of_a_teacher_costs_less(tmp_path):
    path = write(tmp_path, "")
    whole = estimate(plan_of(path=path), ONE)[0]
    text = path.read_text().replace("kl(s.logits <- t.logits)", "mse(s.hidden[1] <- t.hidden[2])")
    path.write_text(text)
    part = estimate(plan_of(path=path), ONE)[0]
    layer = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 4 * 128 * 64
    assert dict(part.work.flops)["t"] == pytest.approx(16 * 128 * 2 * 2 * layer)
    assert dict(part.work.flops)["t"] < dict(whole.work.flops)["t"] / 3


def test_arithmetic_of_a_step_is_two_operations_a_weight_and_token(tmp_path):
    found = estimate(plan_of(path=write(tmp_path, "")), ONE)[0]
    tokens = 16 * 128 * 2
    weights = 8 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    attention = 8 * 4 * 128 * 64
    head = 2 * 500 * 64
    assert dict(found.work.flops)["t"] == tokens * (2 * weights + attention + head)


def test_processes_share_the_rows_and_exchange_gradients(tmp_path):
    alone = estimate(plan_of(path=write(tmp_path, "")), EIGHT)[0]
    shared = estimate(plan_of(path=write(tmp_path, "runtime { backend = ddp }")), EIGHT)[0]
    assert (alone.rows, shared.rows) == (16, 2)
    count = next(model.trains for model in shared.models if model.trains)
    assert dict(shared.work.between)["s gradients"] == 2 * 4 * count * 7 / 8
    assert shared.device_bytes < alone.device_bytes


def test_offloaded_weights_cross_the_link_once_a_micro_batch(tmp_path):
    setup = replace(Setup(), placement=(("t", "offload"),))
    found = estimate(plan_of(path=write(tmp_path, "")), ONE, setup)[0]
    teacher = next(model for model in found.models if model.name == "t")
    inside = 8 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert teacher.host == 4 * inside
    assert teacher.device == 4 * (teacher.count - inside)
    assert dict(found.work.link) == {"t weights": 2 * 4 * inside}


def test_a_cached_teacher_is_nowhere(tmp_path):
    found = estimate(plan_of(path=write(tmp_path, "")), ONE, Setup(placement=(("t", "cached"),)))[0]
    teacher = next(model for model in found.models if model.name == "t")
    assert (teacher.device, teacher.host) == (0, 0)
    assert "t" not in dict(found.work.flops)


def test_gemini_by_the_table_of_bytes(tmp_path):
    setup = Setup("gemini", half=True, placement=(("t", "gemini"),), offload_optim_frac=1.0, chunk=10**4, reach=0)
    plan = plan_of(path=write(tmp_path, ""))
    nodes = {node.name: parameters(node.info) for node in plan.stages[0].models}
    packed = {name: chunks(found, 10**4, 0) for name, found in nodes.items()}
    found = estimate(plan, EIGHT, setup)[0]
    models = {model.name: model for model in found.models}
    # All of the teacher in host memory unless that is said; the student on the devices, a part on each.
    assert (models["t"].device, models["t"].host) == (0, 2 * packed["t"].total)
    assert models["t"].moved == models["t"].host / 8
    assert models["t"].gathered == pytest.approx(2 * packed["t"].total * 7 / 8, abs=1)
    assert (models["s"].device, models["s"].host) == (round(2 * packed["s"].total / 8), 0)
    assert dict(found.host)["optimizer"] == 12 * models["s"].count
    assert "optimizer" not in dict(found.device)
    whole = 2 * packed["t"].total
    for shard, offload, device, host in ((1, 0, 1 / 8, 0), (1, 0.25, 0.75 / 8, 0.25), (0.5, 0, 0.5 + 0.5 / 8, 0)):
        other = estimate(plan, EIGHT, replace(setup, chunks=(("t", float(shard), float(offload)),)))[0]
        teacher = next(m for m in other.models if m.name == "t")
        assert (teacher.device, teacher.host) == (
            pytest.approx(whole * device, abs=1), pytest.approx(whole * host, abs=1),
        )  # fmt: skip
    # What Gemini does with a part: its sum counts a chunk once for each of its parameters.
    assert packed["s"].times > 2
    half = estimate(plan, EIGHT, replace(setup, offload_optim_frac=0.5))[0]
    assert dict(half.host)["optimizer"] == 12 * models["s"].count


def test_chunks_by_hand():
    def of(*sizes):
        return Parameters(tuple((f"p{number}", (size,)) for number, size in enumerate(sizes)))

    # 3 + 2 and 4 fill chunks of 1024; one that is larger has its own.
    one = chunks(of(700, 300, 900, 200), 1000, 0)
    assert (one.total, one.largest) == (3 * 1024, 1024)
    assert one.times == pytest.approx((2 + 1 + 1) / 3)
    # Of those in reach the size that leaves least empty.
    assert chunks(of(2000, 1000, 2000, 1000), 1000, 4096).total == 2 * 3072
    assert chunks(of(2000, 1000, 2000, 1000), 1000, 0).total == 4 * 2048
    assert chunks(of(10, 10), 1000, 0) == Chunks(20, 20, 1.0)
    assert one.gathered(1.0) == one.away(0.5) == 0.0
    assert one.away(1.0) == one.state_away(1.0) == one.gathered(0.0) == 1.0
    assert one.state_away(0.5) == pytest.approx(0.5 * 4 / 3)


def test_a_student_smaller_than_a_chunk_stays_whole_under_gemini(tmp_path):
    one = plan_of(path=write(tmp_path, "", accumulate="1"))
    found = estimate(one, EIGHT, Setup("gemini", half=True, offload_optim_frac=1.0))[0]
    student = next(model for model in found.models if model.name == "s")
    assert student.device == 2 * student.count
    assert dict(found.device)["optimizer"] == 12 * student.count
    assert "optimizer" not in dict(found.host)


def test_parameters_are_offloaded_only_with_all_of_the_optimizer(tmp_path):
    plan = plan_of(path=write(tmp_path, ""))
    for optim, parameter, there in ((0.5, 1.0, False), (1.0, 1.0, True), (1.0, 0.5, False)):
        setup = Setup("gemini", half=True, offload_optim_frac=optim, offload_param_frac=parameter, chunk=1000)
        student = next(m for m in estimate(plan, EIGHT, setup)[0].models if m.name == "s")
        assert (student.host > 0, student.device == 0) == (there, there)
    tried = [setup for _, setup in _ordered(plan, EIGHT, Setup.of(plan), _options(plan, EIGHT, Setup.of(plan)))]
    assert any(setup.offload_param_frac for setup in tried)
    assert all(setup.offload_optim_frac == 1.0 for setup in tried if setup.offload_param_frac)


def test_more_rows_need_more_and_checkpointing_less(tmp_path):
    small, large = (estimate(plan_of(path=write(tmp_path, "", batch_size=n)), ONE)[0] for n in ("4", "64"))
    assert small.device_bytes < large.device_bytes
    kept = estimate(plan_of(path=write(tmp_path, "runtime { checkpoint = true }", batch_size="64")), ONE)[0]
    assert kept.device_bytes < large.device_bytes
    assert kept.work.seconds(ONE) > large.work.seconds(ONE)


def test_the_command_prints_a_plan_and_a_block():
    done = run(
        str(SPEC), "--set", "teacher=110b", "--devices", "8", "--device-memory", "40GiB", "--host-memory", "512GiB"
    )
    assert done.exit_code == 0
    for words in ("110.8B", "It does not fit: stage main needs", "The cheapest change that fits:", "backend = "):
        assert words in done.output


def test_json(tmp_path):
    done = run(
        str(write(tmp_path, "")), "--json", "--device-memory", "1GiB", "--host-memory", "1GiB", "--compute", "1TFLOP/s"
    )
    found = json.loads(done.output)
    assert found["machine"]["flops_a_second"] == 1e12
    stage = found["stages"][0]
    assert stage["device_bytes"] == sum(stage["device"].values())
    assert found["fits"] is stage["fits"] is True
    assert found["change"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host-memory", "40"], "--host-memory: '40' has no unit; write for example 40GiB"),
        (["--device-memory", "40GB/s"], "--device-memory: 'GB/s' in '40GB/s' is not the unit of an amount of memory"),
        (["--device-memory", ""], "--device-memory: '' is not an amount of memory; write for example 40GiB"),
        (["--device-memory", "1.2.3GiB"], "--device-memory: '1.2.3GiB' is not an amount of memory"),
        (["--link", "fast"], "--link: 'fast' is not a rate of transfer; write for example 50GB/s"),
        (["--devices", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_options(words, said):
    done = run(str(SPEC), *words)
    assert done.exit_code == 2
    assert said in done.output


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine whose nvidia-smi prints these lines; it fails where there are none."""

    def install(*lines):
        program = tmp_path / "nvidia-smi"
        printed = "".join(f"echo {line}\n" for line in lines) or "exit 9\n"
        program.write_text(f"#!/bin/sh\n{printed}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_the_gpus_of_this_machine_are_those_that_nvidia_smi_lists(gpus):
    gpus("81559", "40960")
    found = this_machine()
    assert (found.kind, found.devices, found.device_memory) == ("cuda", 2, 40960 * 2**20)
    assert "2 devices of 40.0 GiB" in run(str(SPEC)).output


def test_devices_without_their_size_where_there_are_none(gpus):
    gpus()
    assert this_machine().kind == "cpu"
    done = run(str(SPEC), "--devices", "8")
    assert done.exit_code == 2
    assert "add --device-memory 40GiB" in done.output


def test_a_file_of_methods_has_no_plan():
    done = run(str(ROOT / "stdlib_methods" / "kd.gkd"))
    assert done.exit_code == 1
    assert "holds methods only" in done.output


def test_this_machine_is_described():
    found = this_machine()
    assert found.host_memory > GIB // 4
    assert units.in_bytes(found.host_memory) in str(found)


CODE = """
import sys
from gkd_dsl.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted(set(sys.modules) & {"torch", "transformers", "numpy", "datasets"})
print(heavy, file=sys.stderr)
"""


def test_a_plan_of_405_billion_parameters_loads_no_torch_and_takes_no_two_seconds():
    words = [
        "plan",
        str(SPEC),
        "--set",
        "teacher=405b",
        "--devices",
        "8",
        "--device-memory",
        "40GiB",
        "--host-memory",
        "1TiB",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    assert "405.9B" in done.stdout
    # Of the processor: what others run beside it does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_stored_outputs_are_named_where_they_halve_the_time_of_a_step():
    found = report("distil.gkd", plan_of("405b"), EIGHT)
    assert found.proposal is not None
    assert found.stored is not None
    assert found.stored.cached
    assert found.stored.seconds <= found.proposal.seconds / 2
    assert f"takes at least {units.in_seconds(found.stored.seconds)}; to store them" in found.text()
    assert report("distil.gkd", plan_of("10b"), ONE).stored is None
