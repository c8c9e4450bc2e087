"""Blocks that a plan proposes, pasted back: they check, keep what the spec says, and fit."""

import re
from dataclasses import replace

import pytest

from gkd_dsl.planning.estimate import estimate
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import COMPUTE, Machine
from gkd_dsl.planning.report import block, report
from gkd_dsl.planning.search import with_cache

GIB = 2**30


def pasted(compiled, text, **spec):
    """The plan of the spec with a proposal in it."""
    head, _, lines = text.rpartition("runtime {\n")
    return compiled(lines.removesuffix("}"), **dict(re.findall(r"(batch_size|accumulate) = (\d+)", head)), **spec)


def test_a_spec_on_the_cpu_is_planned_on_the_cpu(compiled):
    """What a GPU has is no room for it, and Gemini, which needs one, is not proposed."""
    plan = compiled("device = cpu")
    on = Machine(4, GIB, 64 * GIB, compute=COMPUTE["cuda"])
    found = report("spec", plan, on)
    assert found.machine == Machine(1, 64 * GIB, 64 * GIB, compute=COMPUTE["cpu"], kind="cpu")
    assert found.fits
    assert "on the CPU, 64.0 GiB" in found.text()
    assert report("spec", plan, replace(on, compute=5e12)).machine.compute == 5e12
    need = found.stages[0].device_bytes
    small = report("spec", plan, replace(on, host_memory=round(0.9 * need)))
    assert small.proposal is not None
    assert small.proposal.setup.backend == "local"
    again = report("spec", pasted(compiled, block(plan, small.setup, small.proposal.setup)), small.machine)
    assert again.fits
    assert dict(again.plan.runtime)["device"] == "cpu"
    # Without that word it is the GPUs that count.
    assert report("spec", compiled("precision = fp32"), on).machine == on


def test_what_is_said_of_the_loss_scale_and_of_chunks_is_kept(compiled):
    said = "backend = gemini\nprecision = fp16\ninitial_scale = 1024\nhysteresis = 3\nmin_chunk_size_m = 0.01"
    plan = compiled(said)
    text = block(plan, Setup.of(plan), replace(Setup.of(plan), checkpoint=True, offload_optim_frac=1.0))
    runtime = dict(pasted(compiled, text).runtime)
    assert runtime == dict(plan.runtime) | {"checkpoint": True, "offload_optim_frac": 1.0}
    # Of another backend's there is nothing to keep.
    other = block(compiled("precision = bf16"), Setup(half=True), Setup("gemini", half=True))
    assert "scale" not in other


@pytest.mark.parametrize(
    ("loss", "how", "stored"),
    [
        ("jsd(s.logits <- t.logits)", "top_k = 5", True),
        ("jsd(s.logits <- t.logits)", "top_k = 5\n tail = renormalise", False),
        ("kl(s.logits <- t.logits)", "top_k = 5\n tail = renormalise", True),
        ("mse(s.logits <- t.logits)", "top_k = 5", False),
        ("mse(s.logits <- t.logits)", "top_k = 0", True),
    ],
)
def test_outputs_are_stored_as_the_spec_has_them_stored(loss, how, stored, compiled):
    plan = compiled(f"teacher t {{\n {how}\n}}", loss=loss)
    found = with_cache(plan, Machine(1, 80 * GIB, 80 * GIB), Setup.of(plan))
    assert (found is not None) is stored
    if found is not None:
        text = block(plan, Setup.of(plan), found.setup)
        assert 'cache = "outputs/t"' in text
        again = pasted(compiled, text, loss=loss)
        assert dict(again.runtime)["t.top_k"] == dict(plan.runtime)["t.top_k"]
        assert dict(again.runtime).get("t.tail") == dict(plan.runtime).get("t.tail")


def test_the_folder_of_stored_outputs_is_written_as_a_text(compiled):
    plan = compiled('teacher t {\n placement = cached\n cache = "the \\"best\\" one"\n}')
    assert 'cache = "the \\"best\\" one"' in block(plan, Setup.of(plan), Setup.of(plan))


def test_gradients_are_of_the_adapters_alone_where_there_are_some(compiled):
    """Forward and the gradient of each input: four operations a frozen weight and token, six a trained one."""
    adapted = 'hf("s") {\n  adapter = lora(r = 4, targets = ["q_proj", "v_proj"])\n}'
    one = Machine(1, 80 * GIB, 80 * GIB)
    whole, part = (estimate(compiled("", student=how), one)[0] for how in ('hf("s")', adapted))
    tokens = 8 * 64 * 4
    layers, head, pairs = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2000 * 64, 2 * 2 * 2 * 64 * 64
    adapters = 2 * 2 * 2 * 4 * 64
    frozen = 2 * (2 * (layers + head) + pairs) * tokens
    assert dict(whole.work.flops)["s"] == pytest.approx(1.5 * frozen, rel=0.01)
    assert dict(part.work.flops)["s"] == pytest.approx(frozen + 6 * adapters * tokens, rel=0.01)


def test_the_state_that_chunks_have_in_the_host_is_moved_over_the_link(compiled):
    """Gradients of two bytes go to the host and weights of two come back; a fraction counts a chunk many times."""
    plan = compiled("precision = bf16")
    two = Machine(2, 80 * GIB, 80 * GIB)
    for share in (0.0, 0.1, 0.5, 1.0):
        setup = Setup("gemini", half=True, offload_optim_frac=share, chunk=2**14, reach=2**12)
        stage = estimate(plan, two, setup)[0]
        count = next(model.count for model in stage.models if model.name == "s")
        away = dict(stage.host).get("optimizer", 0) / (12 * count)
        assert share <= away <= 1.0
        assert dict(stage.work.link).get("s optimizer", 0.0) == pytest.approx(4 * count / 2 * away, rel=1e-6)
