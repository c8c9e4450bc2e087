"""The step in double precision against a loop written by hand, and when tensors are let go."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plans import LOSSES, batch, models, stage_plan

from gkd_dsl.runtime.program import generator
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.schedules import Clock

CLOCK = Clock(3, 11, 11.0)
WEIGHTS = {"hard": 0.3, "soft": 0.7, "hid": 3 / (10 * 0.5), "att": 0.1}


def by_hand(made, blocks, data, losses):
    """The losses from transformers' own outputs, each token and row in turn."""
    s, t = made["s"], made["t"]
    for model in (s, t):
        model.config._attn_implementation = "eager"
    scores = {}

    def keep(name):
        def hook(module, args, kwargs, output):
            hidden = args[0]
            shape = (*hidden.shape[:2], 4, -1)
            q, k = (layer(hidden).view(shape).transpose(1, 2) for layer in (module.query, module.key))
            scores[name] = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5

        return hook

    places = {"s": s.bert.encoder.layer[1], "t": t.bert.encoder.layer[2]}
    handles = [layer.attention.self.register_forward_hook(keep(n), with_kwargs=True) for n, layer in places.items()]
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    out_s = s(**inputs, output_hidden_states=True)
    with torch.no_grad():
        out_t = t(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for model in (s, t):
        model.config._attn_implementation = "sdpa"
    valid = data["attention_mask"].bool()
    found = {}
    if "hard" in losses:
        found["hard"] = F.cross_entropy(out_s.logits, data["labels"])
    if "soft" in losses:
        logs = F.log_softmax(out_s.logits / 2.0, -1)
        found["soft"] = 4.0 * F.kl_div(logs, F.softmax(out_t.logits / 2.0, -1), reduction="batchmean")
    if "hid" in losses:
        difference = blocks["W"](out_s.hidden_states[1]) - out_t.hidden_states[2]
        found["hid"] = 0.5 * difference[valid].pow(2).mean(-1).mean()
    if "att" in losses:
        cells = []
        for row, length in enumerate(valid.sum(1).tolist()):
            cells.append((scores["s"][row] - scores["t"][row])[:, :length, :length].pow(2).flatten())
        found["att"] = torch.cat(cells).mean()
    return found


def gradients(step):
    return {name: p.grad.clone() for name, p in step.trainable() if p.grad is not None}


@pytest.mark.parametrize("losses", [("hard",), ("soft",), ("hid",), ("att",), LOSSES])
def test_equals_a_loop_by_hand_in_value_and_gradient(losses):
    made = models(torch.float64, dropout=0.0)
    plan = stage_plan(losses, dropout=0.0)
    blocks = {name: block.double() for name, block in make_projections(plan.projections, 5).items()}
    step = StepModule(plan, made, blocks).train()
    data = batch(5, 8, seed=2)
    out = step(data, CLOCK, step.denominators([data], CLOCK))
    out.loss.backward()
    ours = gradients(step)
    step.zero_grad(set_to_none=True)
    expected = by_hand(made, blocks, data, losses)
    total = sum(WEIGHTS[name] * value for name, value in expected.items())
    total.backward()
    theirs = gradients(step)
    assert out.loss.dtype == torch.float64
    assert list(out.terms) == list(losses)
    # A layer whose scores are tapped computes its softmax in fp32, and hands it on to the logits.
    joined = losses == LOSSES
    exact = {"rtol": 1e-7, "atol": 1e-8} if joined else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(out.loss, total, **exact)
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name], value.detach(), **exact)
        assert out.weights[name] == pytest.approx(WEIGHTS[name])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **({"rtol": 1e-5, "atol": 1e-7} if joined else exact))


def test_draws_are_of_the_seed_the_operator_the_step_and_the_micro_batch():
    def drawn(key="op/a", **of):
        return torch.rand(8, generator=generator(key, replace(CLOCK, **of))).tolist()

    assert drawn() == drawn()
    others = [drawn("op/b"), drawn(seed=1), drawn(step=4), drawn(micro=1)]
    assert all(other != drawn() for other in others)


def test_taps_are_let_go_at_their_last_use():
    """When the attention loss is computed, the hidden state of the teacher is gone."""
    for free in (True, False):
        step = StepModule(stage_plan(("hid", "att"), free=free), models())
        data = batch()
        taps, seen = [], []
        functions = step._program._functions
        detach, mse = functions["detach"], functions["mse"]

        def watched(x, taps=taps, detach=detach):
            taps.append(weakref.ref(x))
            return detach(x)

        def looking(student, taps=taps, seen=seen, mse=mse, **rest):
            if student.ndim == 4:
                gc.collect()
                seen.append(taps[0]() is None)
            return mse(student=student, **rest)

        functions["detach"], functions["mse"] = watched, looking
        step(data, CLOCK, step.denominators([data], CLOCK))
        assert seen == [free]


def test_freeing_changes_nothing():
    results = []
    for free in (True, False):
        step = StepModule(stage_plan(dropout=0.0, free=free), models(dropout=0.0))
        data = batch()
        results.append(step(data, CLOCK, step.denominators([data], CLOCK)).loss)
    assert results[0] == results[1]
