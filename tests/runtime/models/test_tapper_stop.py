"""A forward stops after its last needed tap, and leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from tiny_models import FAMILY_NAMES, Tiny

from gkd_dsl.models.errors import TapError
from gkd_dsl.models.resolve import last_needed, order
from gkd_dsl.models.taps import TapPath


def count_calls(tiny: Tiny):
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
        for i, block in enumerate(tiny.blocks)
    ]
    return calls, handles


STOPS = [
    (TapPath("hidden", 0), []),
    (TapPath("layer", 0, "attn.q"), [0]),
    (TapPath("hidden", 1), [0]),
    (TapPath("layer", 1, "attn.k"), [0, 1]),
    (TapPath("layer", 1, "attn.scores"), [0, 1]),
    (TapPath("layer", 1, "attn.probs"), [0, 1]),
    (TapPath("layer", 1, "attn.out"), [0, 1]),
    (TapPath("layer", 1, "mlp"), [0, 1]),
    (TapPath("hidden", 3), [0, 1, 2]),
    (TapPath("final"), [0, 1, 2]),
    (TapPath("cls"), [0, 1, 2]),
]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("stop", "blocks"), STOPS, ids=[str(stop) for stop, _ in STOPS])
def test_stops_at_the_tap_and_gives_the_same(make, batch, close, family, stop, blocks):
    tiny = make(family, "classification")
    inputs = batch()
    paths = [path for path, _ in STOPS if order(path) <= order(stop)]
    if any(path.kind == "cls" for path in paths):
        assert last_needed(paths) == TapPath("cls")
    with torch.no_grad():
        whole = tiny.tapper.run(inputs, paths)
        calls, _ = count_calls(tiny)
        stopped = tiny.tapper.run(inputs, paths, stop_after=stop)
    assert calls == blocks
    for path in paths:
        assert torch.equal(stopped[path], whole[path])


def test_the_same_taps_stop_where_they_are_told_each_time(make, batch):
    """Where hooks go is found once for each set of taps, and for each stop."""
    tiny, paths = make("bert"), [TapPath("hidden", 1)]
    calls, _ = count_calls(tiny)
    for stop, blocks in ((None, [0, 1, 2]), (TapPath("hidden", 2), [0, 1]), (paths[0], [0]), (None, [0, 1, 2])):
        tiny.tapper.run(batch(), paths, stop_after=stop)
        assert calls == blocks
        calls.clear()


def test_the_attention_of_the_stop_is_not_finished(make, batch):
    tiny = make("bert")
    done = []
    tiny.blocks[1].attention.output.register_forward_hook(lambda *_: done.append(1))
    scores = TapPath("layer", 1, "attn.scores")
    tiny.tapper.run(batch(), [scores], stop_after=scores)
    assert done == []


def test_the_head_runs_for_logits_only(make, batch):
    tiny = make("llama", "causal_lm")
    calls = []
    tiny.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    tiny.tapper.run(batch(), [TapPath("final"), TapPath("hidden", 2)])
    assert calls == []
    tiny.tapper.run(batch(), [TapPath("logits")], stop_after=TapPath("logits"))
    assert calls == [1]


def test_gradients_of_a_stopped_forward(make, batch):
    tiny = make("bert")
    path = TapPath("hidden", 2)
    tiny.model.zero_grad()
    tiny.tapper.run(batch(), [path], stop_after=path)[path].square().sum().backward()
    stopped = {name: p.grad for name, p in tiny.model.named_parameters()}
    tiny.model.zero_grad()
    hidden = tiny.model(**batch(), output_hidden_states=True).hidden_states[2]
    hidden.square().sum().backward()
    for name, parameter in tiny.model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert stopped[name] is None
        else:
            torch.testing.assert_close(stopped[name], parameter.grad)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("stop", [None, TapPath("layer", 1, "attn.scores")])
def test_nothing_stays_behind(make, batch, tmp_path, stop):
    tiny = make("qwen3", "causal_lm")
    model = tiny.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = [dict(vars(module)) for module in model.modules()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny.tapper.run(batch(), [TapPath("layer", 1, "attn.scores")], stop_after=stop)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert hooks_of(model) == 0
    assert [dict(vars(module)).keys() for module in model.modules()] == [k.keys() for k in kept]
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert "gkd" not in (tmp_path / "config.json").read_text()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failing_forward_leaves_nothing_behind(make, batch):
    tiny = make("bert")
    tiny.blocks[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        tiny.tapper.run(batch(), [TapPath("layer", 1, "attn.scores"), TapPath("hidden", 3)])
    assert hooks_of(tiny.model) == 1
    assert tiny.model.config._attn_implementation == "sdpa"


def test_a_tap_is_freed_with_its_last_reference(make, batch):
    tiny = make("bert")
    paths = [TapPath("hidden", 1), TapPath("layer", 1, "attn.scores")]
    gc.disable()
    try:
        with torch.no_grad():
            taps = tiny.tapper.run(batch(), paths, stop_after=paths[1])
        watched = [weakref.ref(tensor) for tensor in taps.values()]
        del taps
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_taps_are_references(make, batch):
    tiny = make("bert")
    seen = []
    tiny.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    path = TapPath("hidden", 1)
    assert tiny.tapper.run(batch(), [path])[path] is seen[0]


def test_a_tap_beyond_the_stop_is_an_error(make, batch):
    tiny = make("bert")
    with pytest.raises(TapError, match=r"ends before `hidden\[3\]`"):
        tiny.tapper.run(batch(), [TapPath("hidden", 3)], stop_after=TapPath("hidden", 1))
    assert hooks_of(tiny.model) == 0
