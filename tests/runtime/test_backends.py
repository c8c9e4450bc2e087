"""The local backend: optimisers, precision, checkpointing, clipping, and what stops a step."""

import copy
from dataclasses import replace
from itertools import chain

import pytest
import torch
from plans import LOSSES, batch, models, rows_of, stage_plan
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.runtime.backends import ddp
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.ddp import _device
from gkd_dsl.runtime.backends.local import LocalBackend, device_of
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.optim import LearningRate, make_optimizer
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.schedules import Arithmetic, Clock, Constant, Ramp, Span

CLOCK = Clock(3, 11, 11.0)


def started(losses=LOSSES, settings=None, optim=None, dropout=0.0, **rest):
    made = models(dropout=dropout)
    step = StepModule(stage_plan(losses, dropout=dropout, optim=optim, **rest), made)
    backend = LocalBackend(settings or Settings(device="cpu"))
    backend.begin(step, step.plan.stage.optim)
    return backend, step, made


def weights_of(step):
    return {name: p.detach().clone() for name, p in step.trainable()}


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        (
            OptimSpec("adamw", 2e-3, 0.1, (0.8, 0.99), 1e-6, clip=0.5),
            lambda groups: torch.optim.AdamW(groups, lr=2e-3, betas=(0.8, 0.99), eps=1e-6),
        ),
        (
            OptimSpec("sgd", 2e-3, 0.1, momentum=0.9, clip=None),
            lambda groups: torch.optim.SGD(groups, lr=2e-3, momentum=0.9),
        ),
    ],
)
def test_a_step_is_what_torch_makes_of_it(spec, theirs):
    backend, step, made = started(("hard", "hid"), optim=spec)
    twin = copy.deepcopy({"s": made["s"], "W": step.projections["W"], "t": made["t"]})
    named = [*twin["s"].named_parameters(), *twin["W"].named_parameters()]

    def plain(name):
        return name.endswith("bias") or "LayerNorm" in name

    optimizer = theirs(
        [
            {"params": [p for n, p in named if not plain(n)], "weight_decay": 0.1},
            {"params": [p for n, p in named if plain(n)], "weight_decay": 0.0},
        ]
    )
    twin["s"].train()
    for number in range(3):
        data = batch(4, 7, seed=number)
        result = backend.step([data], CLOCK, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
        out = twin["s"](**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = twin["t"](**inputs, output_hidden_states=True).hidden_states[2]
        valid = data["attention_mask"].bool()
        hard = torch.nn.functional.cross_entropy(out.logits, data["labels"])
        hid = 0.5 * (twin["W"](out.hidden_states[1]) - teacher)[valid].pow(2).mean(-1).mean()
        (0.3 * hard + 0.6 * hid).backward()
        if spec.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], spec.clip)
            assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        assert result.terms["hard"] == pytest.approx(hard.item(), rel=1e-4)
        assert result.loss == pytest.approx((0.3 * hard + 0.6 * hid).item(), rel=1e-4)
    for (name, ours), (_, expected) in zip(step.trainable(), named, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_weight_decay_leaves_biases_and_norms_alone():
    _, step, _ = started(("hard",))
    optimizer = make_optimizer(OptimSpec(weight_decay=0.3), step.trainable())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in step.trainable():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.3), name


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [Span(0, "percent"), Span(6, "percent"), Span(7, "steps"), Span(0.5, "epochs")])
def test_the_rate_is_that_of_transformers(decay, warmup):
    spec, total = OptimSpec(lr=3e-4, warmup=warmup, decay=decay), 50
    rate = LearningRate(spec, total, 20.0)
    steps = {"percent": 3 if warmup.amount else 0, "steps": 7, "epochs": 10}[warmup.unit]
    assert rate.warmup_steps == steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, steps, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, steps, total),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, steps),
    }[decay]()
    for step in range(total):
        assert rate.at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_a_warmup_in_tokens_becomes_steps_by_the_mean():
    assert LearningRate(OptimSpec(warmup=Span(1000, "tokens")), 50, 20.0, 64.0).warmup_steps == 16


def test_a_warmup_longer_than_the_stage_ends_with_it():
    rate = LearningRate(OptimSpec(lr=1.0, warmup=Span(100, "steps")), 50, 20.0)
    assert rate.warmup_steps == 50
    assert [rate.at(step) for step in (0, 25, 49)] == pytest.approx([0.0, 0.5, 0.98])


def checkpointed(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_changes_nothing():
    found = []
    for on in (False, True):
        torch.manual_seed(5)
        backend, step, made = started(settings=Settings(device="cpu", checkpoint=on), dropout=0.1)
        assert checkpointed(made["s"]) == on
        results = [backend.step([batch(seed=n)], CLOCK, 1e-3) for n in range(2)]
        found.append((results, weights_of(step)))
        backend.end()
        assert not checkpointed(made["s"])
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_accumulating_four_micro_batches_is_one_batch_of_eight():
    data = batch(8, 9, seed=4, lengths=[9, 2, 3, 9, 4, 2, 7, 1])
    whole, *_ = started()
    parts, *_ = started()
    a = whole.step([data], CLOCK, 1e-3)
    b = parts.step([rows_of(data, n, n + 2) for n in range(0, 8, 2)], CLOCK, 1e-3)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert b.terms == pytest.approx(a.terms, rel=1e-5)
    assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-4)


def test_bf16_forwards_and_fp32_losses():
    torch.manual_seed(0)
    exact, _, _ = started()
    cast, step, _ = started(settings=Settings(precision="bf16", device="cpu"))
    seen = {}
    functions = step._program._functions
    kl, project = functions["kl"], functions["project"]
    functions["kl"] = lambda **given: seen.setdefault("kl", (given["student"].dtype, kl(**given)))[1]
    functions["project"] = lambda **given: seen.setdefault("project", project(**given))
    data = batch()
    a, b = exact.step([data], CLOCK, 1e-3), cast.step([data], CLOCK, 1e-3)
    assert seen["kl"][0] == torch.bfloat16
    assert seen["kl"][1].dtype == torch.float32
    assert seen["project"].dtype == torch.bfloat16
    assert b.loss != a.loss
    assert b.loss == pytest.approx(a.loss, rel=0.05)
    assert all(p.dtype == torch.float32 for _, p in step.trainable())


def test_a_loss_that_is_not_finite_stops_with_its_name_and_changes_nothing():
    backend, step, _ = started()
    before = weights_of(step)
    function = step._program._functions["kl"]
    step._program._functions["kl"] = lambda **given: function(**given) / 0.0
    with pytest.raises(RunError, match=r"E0802: loss `soft` is inf in step 4 of stage `main`"):
        backend.step([batch()], CLOCK, 1e-3)
    assert all(torch.equal(before[name], p) for name, p in step.trainable())
    assert all(p.grad is None for _, p in step.trainable())


def test_a_weight_that_is_not_finite_is_named():
    nowhere = Arithmetic("/", Constant(1.0), Ramp(0.0, 0.0, Span(5, "steps")))
    backend, _, _ = started(weights={"hid": nowhere})
    with pytest.raises(RunError, match="the weight of loss `hid` is nan in step 4"):
        backend.step([batch()], CLOCK, 1e-3)


def test_a_gradient_that_is_not_finite_names_its_loss():
    backend, step, _ = started(weights={"hid": Constant(1.0)})
    before = weights_of(step)
    function = step._program._functions["mse"]

    def broken(student, **given):
        value = function(student=student, **given)
        if student.ndim == 3:
            student.register_hook(lambda gradient: gradient * float("nan"))
        return value

    step._program._functions["mse"] = broken
    with pytest.raises(RunError, match=r"E0802: the gradient of loss `hid` is not finite in step 4"):
        backend.step([batch()], CLOCK, 1e-3)
    assert all(torch.equal(before[name], p) for name, p in step.trainable())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_to_lower(error):
    backend, step, _ = started(("hard",))

    def full(**given):
        raise error

    step._program._functions["cross_entropy"] = full
    with pytest.raises(RunError) as raised:
        backend.step([batch(4, 7)], CLOCK, 1e-3)
    assert raised.value.code == "E0803"
    assert "a micro-batch of 4 texts of 7 tokens" in raised.value.message
    assert "lower `batch_size` to 2 and double `accumulate`" in raised.value.hint


def test_another_error_is_not_taken_for_one_of_memory():
    backend, step, _ = started(("hard",))

    def broken(**given):
        raise RuntimeError("shapes differ")

    step._program._functions["cross_entropy"] = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        backend.step([batch()], CLOCK, 1e-3)


def test_the_optimizer_comes_back_bit_for_bit():
    backend, step, _ = started(("hard", "hid"))
    for number in range(2):
        backend.step([batch(seed=number)], CLOCK, 1e-3)
    saved = {key: value.clone() for key, value in backend.optimizer_state().items()}
    weights = weights_of(step)
    other, other_step, _ = started(("hard", "hid"))
    with torch.no_grad():
        for name, p in other_step.trainable():
            p.copy_(weights[name])
    other.load_optimizer_state(saved)
    assert backend.step([batch(seed=5)], CLOCK, 1e-3) == other.step([batch(seed=5)], CLOCK, 1e-3)
    assert all(torch.equal(weights_of(step)[name], value) for name, value in weights_of(other_step).items())


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto").type == "cpu"
    with pytest.raises(RunError, match="torch sees no GPU here"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_a_process_has_the_gpu_of_its_number_on_its_machine(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpu = torch.device("cuda")
    # Process 6 of 8 on four machines of two GPUs each.
    assert _device(gpu, Processes(5, 8, 1)) == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(RunError, match="process 3 of this machine has no GPU: there are 2"):
        _device(gpu, Processes(2, 8, 2))
    assert _device(torch.device("cpu"), Processes(5, 8, 7)) == torch.device("cpu")


def test_gradients_are_exchanged_in_parts_of_one_dtype(monkeypatch):
    monkeypatch.setattr(ddp, "_BUCKET", 10)
    half = torch.zeros(2, dtype=torch.bfloat16)
    given = [torch.zeros(4), torch.zeros(6), torch.zeros(1), half, half, torch.zeros(30), torch.zeros(1)]
    found = ddp._buckets(given)
    assert [[part.numel() for part in bucket] for bucket in found] == [[4, 6], [1], [2, 2], [30], [1]]
    assert all(a is b for a, b in zip(chain(*found), given, strict=True))


def test_a_stage_trains_with_dropout_and_leaves_models_without():
    """Evaluations and exports come after `end`."""
    backend, _, made = started(("hard", "hid"), dropout=0.1)
    assert made["s"].training
    assert not made["t"].training
    backend.end()
    assert not any(module.training for model in made.values() for module in model.modules())


def test_each_micro_batch_has_its_number():
    """Operators that draw take it: two micro-batches must not get the same numbers."""
    backend, step, _ = started(("hard",))
    seen = []
    step.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    backend.step([batch(seed=n) for n in range(3)], CLOCK, 1e-3)
    assert seen == [replace(CLOCK, micro=n) for n in range(3)]


def test_inference_is_in_the_precision_of_the_forwards():
    seen = []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        backend = LocalBackend(Settings(precision=precision, device="cpu"))
        backend.infer(lambda: seen.append(torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype))
        assert seen[-1] == dtype


def test_the_state_of_a_parameter_of_one_number_is_beside_it():
    """Only torch's own counter of steps stays on the CPU."""
    backend, _, _ = started(("hard",))
    parameter = torch.nn.Parameter(torch.zeros((), device="meta"))
    backend._named = [("a", parameter)]
    backend.load_optimizer_state({"step/a": torch.tensor(3.0), "exp_avg/a": torch.tensor(1.0)})
    state = backend._optimizer.state[parameter]
    assert (state["step"].device.type, state["exp_avg"].device.type) == ("cpu", "meta")
    assert float(state["step"]) == 3.0
