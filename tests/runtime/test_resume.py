"""A run that is killed or stopped at any moment, then resumed, is the run that was not."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from plans import Data, evaluating, models, spec, stage_plan, teaching_plan

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.graph.plan import Apply
from gkd_dsl.runtime import interrupt
from gkd_dsl.runtime.checkpoint import differences
from gkd_dsl.runtime.errors import RunError, Stopped
from gkd_dsl.runtime.fingerprint import fingerprint
from gkd_dsl.runtime.interrupt import StopRequest
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Constant, Span

STEPS = Span(1, "steps")


class At:
    """Does something after one step of the run, counted over all stages."""

    def __init__(self, step, act):
        self.step, self.act, self.seen = step, act, 0

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.seen += 1
        if self.seen == self.step:
            self.act()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def two_stages(every=STEPS):
    """`t` is taught for 5 steps, then teaches `s` for 9, over more than one epoch each; dropout on."""
    optim = OptimSpec(lr=5e-3, warmup=Span(2, "steps"))
    first = teaching_plan("teach", 0, duration=Span(5, "steps"), optim=optim, checkpoint_every=every)
    second = stage_plan(
        name="main",
        order=1,
        duration=Span(9, "steps"),
        optim=optim,
        checkpoint_every=every,
        accumulate=2,
        metrics=("acc",),
        evaluate=evaluating(Span(2, "steps")),
        keep_best="acc",
        seed=3,
    )
    return spec(first, second)


def run(plan, folder, listeners=(), resume=False):
    return Run(
        plan, folder=folder, loaders=lambda _: Data(rows=24, batch_size=3), models=models(), listeners=listeners
    ).run(resume=resume)


def in_a_process(act):
    """Run a function in a forked process and give its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        act()
        status = 0
    finally:
        os._exit(status)


def lines(folder):
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


def tensors(result):
    found = {f"{name}/{key}": v for name, m in result.models.items() for key, v in m.state_dict().items()}
    return found | {f"W/{key}": v for key, v in result.projections["W"].state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody interrupts: its lines, its tensors and its metrics."""
    folder = RunFolder.create("whole", root=tmp_path_factory.mktemp("runs"))
    result = run(two_stages(), folder)
    return lines(folder), {key: value.clone() for key, value in tensors(result).items()}, result.metrics


def assert_same(folder, result, whole):
    assert lines(folder) == whole[0]
    found = tensors(result)
    assert found.keys() == whole[1].keys()
    assert all(torch.equal(value, whole[1][key]) for key, value in found.items())
    assert result.metrics == whole[2]
    assert set(result.metrics["main"]) == {"acc"}


def test_the_uninterrupted_run_has_every_step_once(whole):
    steps = [(line["stage"], line["step"]) for line in whole[0] if line["kind"] == "step"]
    assert steps == [("teach", n) for n in range(1, 6)] + [("main", n) for n in range(1, 10)]


@pytest.mark.parametrize("step", [1, 5, 6, None])
def test_killed_after_a_step_and_resumed(tmp_path, whole, step):
    """SIGKILL comes before the checkpoint of that step is written; before the first one the run begins anew."""
    if step is None:
        step = random.SystemRandom().randint(2, 13)
    folder = RunFolder.create("killed", root=tmp_path)
    kill = At(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    status = in_a_process(lambda: run(two_stages(), folder, [kill]))
    assert os.WTERMSIG(status) == signal.SIGKILL
    result = run(two_stages(), RunFolder.open(folder.path), resume=True)
    assert_same(folder, result, whole)


def test_killed_three_times_between_rare_checkpoints(tmp_path, whole):
    plan = two_stages(Span(3, "steps"))
    folder = RunFolder.create("rare", root=tmp_path)
    for number, step in enumerate((5, 4, 4)):
        kill = At(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        at = folder
        status = in_a_process(lambda at=at, n=number, kill=kill: run(plan, at, [kill], resume=n > 0))
        assert os.WTERMSIG(status) == signal.SIGKILL
        folder = RunFolder.open(folder.path)
    assert_same(folder, run(plan, folder, resume=True), whole)


def test_killed_at_any_moment(tmp_path, whole):
    """Also in the middle of a write: whatever is there can be read, and the run goes on from it."""
    clock = random.SystemRandom()
    for _ in range(2):
        folder = RunFolder.create("moment", root=tmp_path)
        child = os.fork()
        if not child:
            try:
                run(two_stages(), folder)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 20
        while folder.checkpoints.pointed("last") is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(clock.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_same(folder, run(two_stages(), RunFolder.open(folder.path), resume=True), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, whole, number):
    plan = two_stages(Span(100, "steps"))
    folder = RunFolder.create("stopped", root=tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"stopped in stage `main` after step 3 of 9.*--resume.*stopped") as raised:
        run(plan, folder, [At(8, lambda: os.kill(os.getpid(), number))])
    assert raised.value.folder == folder.path
    assert signal.getsignal(number) is before
    assert folder.checkpoints.pointed("last").name == "main-3"
    assert_same(folder, run(plan, RunFolder.open(folder.path), resume=True), whole)


def test_a_signal_in_the_last_step_of_a_stage_stops_before_the_next(tmp_path, whole):
    folder = RunFolder.create("border", root=tmp_path)
    with pytest.raises(Stopped, match="stopped in stage `teach` after step 5 of 5"):
        run(two_stages(), folder, [At(5, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert_same(folder, run(two_stages(), RunFolder.open(folder.path), resume=True), whole)


def test_a_second_signal_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(two_stages(), RunFolder.create("twice", root=tmp_path), [At(2, twice)])


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_the_first_process_says_that_it_is_asked_to_stop(rank, monkeypatch, capfd):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
    assert ("once more ends at once" in capfd.readouterr().err) == (rank != "1")


def test_a_run_in_a_thread_leaves_the_handlers_alone():
    """Python lets the main thread alone set them; who runs us there may ask for the end of it."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def ask():
        with StopRequest() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_handler_that_was_not_set_from_python(monkeypatch):
    """Python cannot put it back: the default one is, in place of an error at the end of a run."""
    put = []
    monkeypatch.setattr(interrupt.signal, "signal", lambda number, handler: put.append((number, handler)))
    with StopRequest():
        put.clear()
    assert put == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL)]


def test_a_finished_run_resumed_does_nothing(tmp_path, whole):
    folder = RunFolder.create("done", root=tmp_path)
    run(two_stages(), folder)
    again = At(1, lambda: pytest.fail("a step was made"))
    assert_same(folder, run(two_stages(), RunFolder.open(folder.path), [again], resume=True), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: replace(s, accumulate=1), "stage `main`: accumulate is 2 there and 1 here"),
        (
            lambda s: replace(s, optim=replace(s.optim, lr=1e-4)),
            "stage `main`: optim.lr is 0.005 there and 0.0001 here",
        ),
        (lambda s: replace(s, duration=Span(10, "steps")), "stage `main`: duration is 9 steps there and 10 steps here"),
        (lambda s: replace(s, seed=4), "stage `main`: seed is 3 there and 4 here"),
    ],
)
def test_a_checkpoint_of_another_spec_is_refused_by_the_field(tmp_path, change, named):
    plan = two_stages()
    folder = RunFolder.create("other", root=tmp_path)
    with pytest.raises(Stopped):
        run(plan, folder, [At(6, lambda: os.kill(os.getpid(), signal.SIGINT))])
    second = plan.stages[1]
    other = replace(plan, stages=(plan.stages[0], replace(second, stage=change(second.stage))))
    before = folder.metrics.read_text()
    with pytest.raises(RunError) as raised:
        run(other, RunFolder.open(folder.path), resume=True)
    assert raised.value.code == "E0805"
    assert named in raised.value.message
    assert folder.metrics.read_text() == before


def test_before_the_first_checkpoint_another_spec_is_refused_too(tmp_path):
    plan = two_stages()
    folder = RunFolder.create("early", root=tmp_path)
    folder.write_json("plan.json", fingerprint(plan))
    first = plan.stages[0]
    other = replace(plan, stages=(replace(first, stage=replace(first.stage, seed=9)), plan.stages[1]))
    with pytest.raises(RunError, match="stage `teach`: seed is 0 there and 9 here"):
        run(other, RunFolder.open(folder.path), resume=True)


def test_numbers_inside_a_loss_are_compared():
    """The coefficient of a term, and the temperature of an operator."""
    plan = spec(stage_plan())
    (stage,) = plan.stages
    hid = next(loss for loss in stage.losses if loss.name == "hid")
    changed = replace(hid, parts=tuple((Constant(0.25), key) for _, key in hid.parts))
    coefficient = replace(stage, losses=tuple(changed if loss is hid else loss for loss in stage.losses))
    hot = (("dims", ("B",)), ("temperature", Constant(3.0)))
    program = tuple(replace(i, attrs=hot) if isinstance(i, Apply) and i.op == "kl" else i for i in stage.program)
    assert program != stage.program
    for other in (coefficient, replace(stage, program=program)):
        assert list(differences(fingerprint(plan), fingerprint(replace(plan, stages=(other,)))))


def test_a_changed_loss_and_precision_are_named_too(tmp_path):
    plan = two_stages()
    folder = RunFolder.create("other", root=tmp_path)
    with pytest.raises(Stopped):
        run(plan, folder, [At(6, lambda: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(RunError, match="runtime: precision is absent there and 'bf16' here"):
        run(replace(plan, runtime=(("precision", "bf16"),)), RunFolder.open(folder.path), resume=True)
    second = stage_plan(("hard", "soft"), name="main", order=1)
    with pytest.raises(RunError, match=r"the checkpoint main-1 is of another spec: stage `main`"):
        run(replace(plan, stages=(plan.stages[0], second)), RunFolder.open(folder.path), resume=True)


def test_a_run_goes_on_with_another_runtime_block(tmp_path):
    """Where memory ran out, what is advised must not cost the steps that were made."""
    plan = two_stages()
    whole = run(plan, RunFolder.create("whole", root=tmp_path))
    for number, runtime in enumerate(
        [
            (("checkpoint", True),),
            (("backend", "ddp"), ("device", "cpu")),
            (("t.placement", "offload"), ("t.cache", "off"), ("fuse_logits", "off")),
        ]
    ):
        folder = RunFolder.create(f"part{number}", root=tmp_path)
        with pytest.raises(Stopped):
            run(plan, folder, [At(8, lambda: os.kill(os.getpid(), signal.SIGINT))])
        backend = dict(runtime).get("backend", "local")
        again = run(replace(plan, backend=backend, runtime=runtime), RunFolder.open(folder.path), resume=True)
        for name, value in whole.models["s"].state_dict().items():
            torch.testing.assert_close(again.models["s"].state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("runtime", "named"),
    [
        ((("t.placement", "cached"), ("t.cache", "x")), "runtime: t.placement is absent there and 'cached' here"),
        ((("t.cache", "auto"),), "runtime: t.cache is absent there and 'auto' here"),
        ((("t.tail", "bucket"),), "runtime: t.tail is absent there and 'bucket' here"),
    ],
)
def test_what_changes_a_teachers_outputs_is_compared(runtime, named):
    plan = two_stages()
    found = list(differences(fingerprint(plan), fingerprint(replace(plan, runtime=runtime))))
    name, there, here = found[0]
    assert len(found) == 1
    assert f"{name} is {there or 'absent'} there and {here} here" == named
