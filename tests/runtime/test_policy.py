"""Policies: the estimate against enumeration, the delay of the reward, and state that survives a kill."""

import json
from itertools import product

import pytest
import torch
from tiny_runs import Rows, infos

from gkd_dsl.graph.nodes import OptimSpec, PolicyNode
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import Apply, PolicyPlan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.checkpoint import differences
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.fingerprint import fingerprint
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.policy import Policy, Selector, make_policies, surrogate
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Clock
from gkd_dsl.types import BATCH, Dim, TensorType

SGD = OptimSpec("sgd", lr=0.1, weight_decay=0.0, decay="constant", clip=None)
CPU = torch.device("cpu")
DRAW = Apply(
    "op/policy.1",
    "policy",
    (("0", "x0"), ("1", "x1"), ("block", "policy/pi")),
    (),
    TensorType("float", (BATCH, Dim("", 2))),
)


def policy(hidden=0, optim=SGD, features=3, seed=0, baseline=0.9):
    return Policy(PolicyNode("policy/pi", "pi", 2, features, hidden, optim, baseline), CPU, seed)


def states(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"x{k}": torch.randn(rows, 3, generator=generator) for k in range(2)}


def clock(step=0, micro=0, seed=0):
    return Clock(step, 10, 5.0, seed=seed, micro=micro)


# --- the estimate -------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_its_expectation_is_the_gradient_of_the_expected_reward(hidden, baseline):
    """K = 2: all 2^K choices, each with its chance. The baseline drops out."""
    selector = Selector(3, hidden, seed=1).double()
    x = torch.stack(list(states(1).values()), 1).double()
    reward = {(0, 0): -1.3, (0, 1): 0.2, (1, 0): 2.5, (1, 1): -0.4}
    parameters = list(selector.parameters())
    found = [torch.zeros_like(p) for p in parameters]
    expected = torch.zeros((), dtype=torch.float64)
    for choice in product((0, 1), repeat=2):
        actions = torch.tensor([choice], dtype=torch.float64)
        p = selector(x).sigmoid()
        chance = torch.where(actions == 1, p, 1 - p).prod()
        expected = expected + chance * reward[choice]
        estimate = surrogate(selector(x), actions, reward[choice] - baseline)
        for total, gradient in zip(found, torch.autograd.grad(estimate, parameters), strict=True):
            total += chance.detach() * gradient
    wanted = torch.autograd.grad(-expected, parameters)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-2


def test_it_is_log_pi_and_not_pi():
    """The chance of the choice itself has another gradient, smaller by the factor of that chance."""
    logits = torch.tensor([[0.3, -1.2]], dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(surrogate(logits, actions, 2.0), logits)
    torch.testing.assert_close(found, -2.0 * (actions - logits.detach().sigmoid()))
    p = logits.sigmoid()
    (wrong,) = torch.autograd.grad(-2.0 * torch.where(actions == 1, p, 1 - p).sum(), logits)
    assert (found - wrong).abs().min() > 0.1


def test_a_batch_weighs_as_one_sample():
    selector = Selector(3)
    x = torch.stack(list(states(1).values()), 1)
    actions = torch.tensor([[1.0, 0.0]])
    one = surrogate(selector(x), actions, 0.5)
    torch.testing.assert_close(surrogate(selector(x.repeat(6, 1, 1)), actions.repeat(6, 1), 0.5), one)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[800.0, -800.0]], requires_grad=True)
    value = surrogate(logits, torch.tensor([[0.0, 1.0]]), 1.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


# --- draws --------------------------------------------------------------------------------------


def test_draws_are_of_the_step_and_have_no_gradient():
    env = states(64)
    env["x0"].requires_grad_(True)
    one = policy().draw(DRAW, env, clock(3, 1, 7))
    assert not one.requires_grad
    assert set(one.unique().tolist()) == {0.0, 1.0}
    assert one.shape == (64, 2)
    assert torch.equal(policy().draw(DRAW, env, clock(3, 1, 7)), one)
    for other in (clock(4, 1, 7), clock(3, 2, 7), clock(3, 1, 8)):
        assert not torch.equal(policy().draw(DRAW, env, other), one)


def test_making_one_and_drawing_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    Selector(3, 4, seed=2)
    policy().draw(DRAW, states(), clock())
    assert torch.equal(torch.get_rng_state(), before)


def test_first_weights_are_of_the_seed_and_of_the_name():
    def first(name, seed=0):
        node = PolicyNode(f"policy/{name}", name, 2, 3, 0, SGD, 0.9)
        return weights(make_policies([PolicyPlan("op/policy.1", node, "reward")], CPU, seed)[name])

    assert torch.equal(first("pi"), first("pi"))
    assert not torch.equal(first("pi"), first("rho"))
    assert not torch.equal(first("pi"), first("pi", 1))


def test_states_in_half_precision_are_read_in_fp32():
    made, env = policy(), {name: value.bfloat16() for name, value in states(64).items()}
    wide = {name: value.float() for name, value in env.items()}
    assert torch.equal(made.draw(DRAW, env, clock()), made.draw(DRAW, wide, clock()))
    made.learn(0.0, clock())
    assert made.pending[0].dtype == torch.float32


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.5), (1.5, 0.8175744761936437)])
def test_how_often_an_action_is_chosen(bias, share):
    """Within five standard errors of the chance."""
    made = policy()
    with torch.no_grad():
        made.selector.layers[0].weight.zero_()
        made.selector.layers[0].bias.fill_(bias)
    found = torch.cat([made.draw(DRAW, states(50), clock(step)) for step in range(80)])
    error = (share * (1 - share) / found.numel()) ** 0.5
    assert abs(found.mean().item() - share) < 5 * error


# --- learning -----------------------------------------------------------------------------------


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.selector.parameters()])


def test_a_reward_is_for_the_choices_of_the_step_before():
    made = policy()
    first = weights(made)
    actions = []
    for step, reward in enumerate((5.0, 1.0)):
        made.start()
        actions.append(made.draw(DRAW, states(seed=step), clock(step)))
        made.learn(reward, clock(step))
        # Nothing was pending at first, and the first reward has no mean to be compared with.
        assert torch.equal(weights(made), first)
    assert made.baseline == 1.0
    made.start()
    made.draw(DRAW, states(seed=2), clock(2))
    x = torch.stack(list(states(seed=1).values()), 1)
    p = made.selector(x).sigmoid()
    log_pi = torch.where(actions[1] == 1, p.log(), (1 - p).log()).sum(-1).mean()
    wanted = torch.autograd.grad(log_pi * (3.0 - 1.0), list(made.selector.parameters()))
    made.learn(3.0, clock(2))
    torch.testing.assert_close(weights(made), first + 0.1 * torch.cat([g.flatten() for g in wanted]))
    assert made.baseline == pytest.approx(0.9 * 1.0 + 0.1 * 3.0, rel=1e-15)


def test_its_gradient_is_clipped_and_its_rate_decays():
    """Of three steps the third learns: at 0.1 (1 - 2 / 10), along a gradient of length 0.01."""
    made = policy(optim=OptimSpec("sgd", lr=0.1, weight_decay=0.0, decay="linear", clip=0.01))
    first = weights(made)
    for step, reward in enumerate((0.0, 0.0, 3.0)):
        made.start()
        made.draw(DRAW, states(seed=step), clock(step))
        made.learn(reward, clock(step))
    assert (weights(made) - first).norm().item() == pytest.approx(0.1 * 0.8 * 0.01, rel=1e-3)


def test_what_is_forgotten_gets_no_reward():
    made = policy()
    first = weights(made)
    for step, reward in enumerate((0.0, 1.0, 1.0)):
        made.start()
        made.draw(DRAW, states(seed=step), clock(step))
        if step == 2:
            mean = made.baseline
            made.forget()
            assert made.pending is None
        made.learn(reward, clock(step))
    assert torch.equal(weights(made), first)
    assert made.baseline == mean


def test_a_better_choice_becomes_likelier():
    """One action pays, the other costs: the policy finds out from the sum of both alone."""
    made = policy(optim=OptimSpec(lr=0.05, weight_decay=0.0, decay="constant"), baseline=0.8)
    env = {"x0": torch.eye(3)[:1].repeat(32, 1), "x1": torch.eye(3)[1:2].repeat(32, 1)}
    reward = 0.0
    for step in range(400):
        made.start()
        actions = made.draw(DRAW, env, clock(step))
        made.learn(reward, clock(step))
        reward = (actions[:, 0] - actions[:, 1]).mean().item()
    chance = made.selector(torch.stack(list(env.values()), 1)).sigmoid()[0]
    assert chance[0] > 0.8
    assert chance[1] < 0.2


def test_micro_batches_are_one_step():
    made = policy()
    made.start()
    for micro, rows in enumerate((3, 2)):
        made.draw(DRAW, states(rows, seed=micro), clock(0, micro))
    made.learn(0.0, clock())
    pending = made.pending
    assert pending[0].shape == (5, 2, 3)
    assert torch.equal(pending[0][3:], torch.stack(list(states(2, seed=1).values()), 1))
    assert pending[1].shape == (5, 2)


def test_what_is_not_kept():
    made = policy()
    made.draw(DRAW, states(), clock())
    made.start()
    with torch.no_grad():
        made.draw(DRAW, states(), clock())
    made.draw(DRAW, states(), clock(), keep=False)
    made.learn(1.0, clock())
    assert made.pending is None


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(RunError, match="the reward of policy `pi` is nan in step 4"):
        policy().learn(float("nan"), clock(3))


@pytest.mark.parametrize("hidden", [0, 4])
def test_its_state_comes_back_bit_for_bit(hidden):
    optim = OptimSpec(lr=0.01)
    one, two = policy(hidden, optim), policy(hidden, optim, seed=9)

    def go_on(made, steps):
        for step in steps:
            made.start()
            actions = made.draw(DRAW, states(seed=step), clock(step))
            made.learn(actions.mean().item(), clock(step))

    go_on(one, range(4))
    two.load({name: value.clone() for name, value in one.tensors().items()})
    for made in (one, two):
        go_on(made, range(4, 7))
    first, second = one.tensors(), two.tensors()
    assert first.keys() == second.keys()
    assert {"baseline", "pending/states", "pending/actions"} < first.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_state_of_another_policy_is_refused():
    with pytest.raises(RunError, match="does not fit policy `pi`"):
        policy().load(policy(features=5).tensors())


# --- in a run -----------------------------------------------------------------------------------

SPEC = """gkd 1
teacher a = random_init("t", task = "classification", num_labels = 3)
teacher b = random_init("t", task = "classification", num_labels = 3)
student s = random_init("s", task = "classification", num_labels = 3)
data rows = csv("rows.csv", text = "text", label = "label")
loss hard = cross_entropy(s.logits, batch.labels)
policy pi = selector([concat(cls(a.final), a.logits), concat(cls(a.final), b.logits)]) {
  reward = -(hard + soft)
  optim = adamw(lr = 0.05)
}
loss soft = mean(pi.pick[0] * per_sample(kl(s.logits <- a.logits)) + pi.pick[1] * per_sample(kl(s.logits <- b.logits)))
metric held = mean_loss(soft)
stage first for 4 steps {
  minimize hard + soft
  accumulate = 2
  seed = 3
  optim = adamw(lr = 1e-3)
  checkpoint_every = 1 steps
  evaluate held every 2 steps
}
stage second for 4 steps {
  minimize soft
  optim = adamw(lr = 1e-3)
  checkpoint_every = 1 steps
}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    infos(root, dropout=0.1)
    (root / "rows.csv").write_text("text,label\n" + "one,0\ntwo,1\nthree,2\n" * 3)
    checked = check_text(SPEC, "spec.gkd", root=root)
    assert [str(d.message) for d in checked.diagnostics] == []
    return root, compile_plan(checked.graph)


class CrashError(Exception):
    pass


class At:
    def __init__(self, step):
        self.step, self.metrics = step, []

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.step -= 1
        if self.step == 0:
            raise CrashError

    def on_evaluate(self, record):
        self.metrics.append(dict(record.metrics))

    def close(self):
        pass


def run(world, folder, crash=0, resume=False):
    root, plan = world
    made = Run(plan, folder=folder, root=root, listeners=[At(crash)], loaders=lambda _: Rows(batches=5))
    made.run(resume=resume)
    found = {f"s/{name}": value for name, value in made.models["s"].state_dict().items()}
    return found | made.policies["pi"].tensors()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    return run(world, RunFolder.create("whole", root=tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("step", [2, 3, 4, 5, 7, 8])
def test_killed_and_resumed_is_as_never_killed(world, whole, tmp_path, step):
    """Also over the border of two stages, where nothing is pending any more."""
    folder = RunFolder.create("killed", root=tmp_path)
    with pytest.raises(CrashError):
        run(world, folder, crash=step)
    found = run(world, RunFolder.open(folder.path), resume=True)
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_a_stage_begins_with_nothing_pending(world):
    """The last choices of a stage get no reward of the next one's losses."""
    root, plan = world
    seen = []

    class Watch(At):
        def on_stage(self, record):
            seen.append((record.stage, made.policies["pi"].pending is None))

        def on_step(self, record):
            seen.append((record.stage, made.policies["pi"].pending is None))

    made = Run(plan, root=root, listeners=[Watch(0)], loaders=lambda _: Rows(batches=5))
    made.run()
    assert seen == [("first", True), *[("first", False)] * 4, ("second", True), *[("second", False)] * 4]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("adamw(lr = 0.05)", "adamw(lr = 0.01)", "policy `pi`.optim.lr"),
        ("reward = -(hard + soft)", "reward = -(hard + 2 * soft)", "reward of `pi`"),
    ],
)
def test_a_policy_is_part_of_what_a_checkpoint_is_compared_by(world, before, after, named):
    root, plan = world
    other = compile_plan(check_text(SPEC.replace(before, after), "spec.gkd", root=root).graph)
    found = [name for name, *_ in differences(fingerprint(plan), fingerprint(other))]
    assert f"stage `first`: {named}" in found


def test_it_learns_in_a_run_and_not_in_an_evaluation(world, whole, tmp_path):
    _, plan = world
    before = Policy(plan.stages[0].policies[0].node, CPU).selector
    moved = [(whole[f"selector/{name}"] - value).abs().max() for name, value in before.named_parameters()]
    assert min(moved) > 1e-3
    # Without the evaluations the run is the same.
    root, plan = world
    text = "\n".join(line for line in SPEC.splitlines() if not line.startswith(("metric", "  evaluate")))
    quiet = compile_plan(check_text(text, "spec.gkd", root=root).graph)
    found = run((root, quiet), RunFolder.create("quiet", root=tmp_path))
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_its_reward_is_logged(world, tmp_path):
    folder = RunFolder.create("logged", root=tmp_path)
    run(world, folder)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 8
    for line in steps[:4]:
        assert line["rewards"]["pi"] == pytest.approx(-(line["terms"]["hard"] + line["terms"]["soft"]), rel=1e-5)


def test_a_policy_is_no_part_of_the_models(world, whole):
    root, plan = world
    made = Run(plan, root=root, loaders=lambda _: Rows(batches=5))
    made.run()
    assert not any("policy" in name or "selector" in name for name in made.models["s"].state_dict())
    assert made.projections == {}


def test_it_chooses_too_where_its_losses_have_no_weight_yet(world):
    root, _ = world
    text = SPEC.replace("loss soft = mean(", "loss soft = ramp(0 -> 1, until = 100%) * mean(")
    plan = compile_plan(check_text(text, "spec.gkd", root=root).graph).stages[1]
    models = {node.name: load(node.info, seed=number) for number, node in enumerate(plan.models)}
    (batch,) = Rows(batches=1).epoch(0)
    with Distiller(plan, models) as distiller:
        for step in range(2):
            distiller.step_to(step, 4)
            pending = distiller.policies["pi"].pending
            assert (pending is None) == (step == 0)
            assert distiller(batch).item() == 0.0 or step
    assert pending[0].shape[0] == len(batch["labels"])


def test_a_loop_of_ones_own(world):
    """`step_to` ends a step: a policy of two steps' rewards has a mean, and learns from the third on."""
    _, plan = world
    models = {node.name: load(node.info, seed=number) for number, node in enumerate(plan.stages[1].models)}
    rows = list(Rows(batches=5).epoch(0))
    with Distiller(plan.stages[1], models) as distiller:
        made = distiller.policies["pi"]
        first = weights(made)
        with pytest.raises(RunError, match=r"the policy `pi` learns where a step ends.*step_to"):
            distiller(rows[0])
        seen = []
        for step in range(4):
            distiller.step_to(step, 4)
            seen.append((made.baseline, torch.equal(weights(made), first)))
            distiller(rows[step]).backward()
            with torch.no_grad():
                distiller(rows[4])
        assert [same for _, same in seen] == [True, True, True, False]
        assert [mean is None for mean, _ in seen] == [True, True, False, False]
        assert made.pending[0].shape[0] == len(rows[2]["labels"])
