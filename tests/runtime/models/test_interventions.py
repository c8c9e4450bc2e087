"""Changed forwards against forwards put together by hand, in every family."""

import copy

import pytest
import torch
from tiny_models import FAMILY_NAMES

from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.checkpointing import set_checkpointing
from gkd_dsl.runtime.models.interventions import Edits, swapped

HIDDEN = [TapPath("hidden", k) for k in range(4)]
MASKS = ["right", "left"]


def twins(make, family, **options):
    """Two models of one config with other blocks, but equal embeddings and final norm."""
    s, t = make(family, seed=1, **options), make(family, seed=2, **options)
    blocks = t.family.blocks
    mixed = {name: value for name, value in t.model.state_dict().items() if f"{blocks}." not in name}
    s.model.load_state_dict({**s.model.state_dict(), **mixed})
    s.model.eval(), t.model.eval()
    return s, t


def hidden(tiny, inputs, changes=None, paths=HIDDEN, stop=None):
    found = tiny.tapper.run(inputs, paths, stop, changes)
    return [found[path] for path in paths]


def same(got, expected, mask, **options):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a * mask.unsqueeze(-1), b * mask.unsqueeze(-1), **options)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_blocks_replaced_give_the_other_model(make, batch, family, side):
    s, t = twins(make, family)
    inputs = batch(side)
    changes = Edits({i: tuple(t.tapper.blocks([i])) for i in range(3)})
    paths = [*HIDDEN, TapPath("final")]
    got, plain = hidden(s, inputs, changes, paths), hidden(s, inputs, paths=paths)
    same(got, hidden(t, inputs, paths=paths), inputs["attention_mask"], rtol=0, atol=0)
    assert not torch.equal(plain[1], got[1])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_block_stands_for_two(make, batch, family):
    # Blocks of one kind of attention: the checker refuses to mix windows.
    s, t = twins(make, family, **({"use_sliding_window": False} if family.startswith("qwen") else {}))
    inputs = batch()
    got = hidden(s, inputs, Edits({0: tuple(t.tapper.blocks([0, 1]))}))
    same(got[:2], [hidden(t, inputs)[k] for k in (0, 2)], inputs["attention_mask"], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("ours", "theirs"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_masks_have_the_form_that_the_blocks_read(make, batch, family, ours, theirs):
    """A boolean mask added to scores, or an additive one read as true, would let padding in or let all through."""
    s, t = twins(make, family)
    inputs = batch()
    expected = hidden(t, inputs)
    s.model.set_attn_implementation(ours)
    t.model.set_attn_implementation(theirs)
    changes = Edits({i: tuple(t.tapper.blocks([i])) for i in range(3)})
    same(hidden(s, inputs, changes), expected, inputs["attention_mask"], rtol=1e-4, atol=2e-5)
    assert t.model.config._attn_implementation == theirs


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_blocks_of_another_precision(make, batch, family):
    """A model in bf16 lends a block to one in fp32, whose residual stream stays in fp32."""
    s, t = twins(make, family)
    inputs, changes = batch(), Edits({1: tuple(t.tapper.blocks([1]))})
    exact = hidden(s, inputs, changes)
    t.model.to(torch.bfloat16)
    found = hidden(s, inputs, changes)
    assert {value.dtype for value in found} == {torch.float32}
    same(found, exact, inputs["attention_mask"], rtol=0.05, atol=0.05 * exact[2].abs().max().item())
    assert not torch.equal(found[3], exact[3])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_scores_beside_a_replaced_block(make, batch, family):
    s, t = twins(make, family)
    inputs, scores = batch(), TapPath("layer", 1, "attn.scores")
    changes = Edits({0: tuple(t.tapper.blocks([0]))})
    got, after = hidden(s, inputs, changes, [scores, TapPath("hidden", 2)])
    # Block 1 of the student over what block 0 of the teacher gives: the teacher with the student's block 1.
    other = copy.deepcopy(t)
    other.blocks[1].load_state_dict(s.blocks[1].state_dict())
    expected, last = hidden(other, inputs, paths=[scores, TapPath("hidden", 2)])
    mask = inputs["attention_mask"]
    pairs = mask[:, None, :, None] * mask[:, None, None]
    torch.testing.assert_close(got * pairs, expected * pairs, rtol=1e-4, atol=2e-5)
    same([after], [last], mask, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_gradient_goes_through_and_stops_at_the_borrowed_parameters(make, batch, family):
    s, t = twins(make, family)
    inputs = batch()
    t.model.requires_grad_(True)
    t.model.train()
    changes = Edits({1: tuple(t.tapper.blocks([1]))})
    hidden(s, inputs, changes)[3].square().mean().backward()
    assert all(parameter.grad is None for parameter in t.model.parameters())
    assert all(module.training for module in t.model.modules())
    by_block = [[p.grad for p in block.parameters()] for block in s.blocks]
    assert all(g is None for g in by_block[1])
    assert all(g is not None for g in by_block[2])
    first = [g for g in by_block[0] if g is not None]
    assert first
    # The same by hand: a model whose block 1 is the other's.
    whole = copy.deepcopy(s)
    whole.model.zero_grad()
    whole.blocks[1].load_state_dict(t.blocks[1].state_dict())
    hidden(whole, inputs)[3].square().mean().backward()
    for got, expected in zip(by_block[0], [p.grad for p in whole.blocks[0].parameters()], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("index", range(4))
def test_a_changed_tensor_is_tapped_changed_and_flows_on(make, batch, family, index):
    s, t = twins(make, family)
    inputs = batch()
    source = hidden(t, inputs)[index].detach() + 1
    got = hidden(s, inputs, Edits(tensors={HIDDEN[index]: (lambda value: swapped(value, source, None),)}))
    plain = hidden(s, inputs)
    for k in range(index):
        assert torch.equal(got[k], plain[k])
    assert torch.equal(got[index], source)
    if index < 3:
        assert not torch.equal(got[3], plain[3])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_last_residual_of_another_gives_its_logits(make, batch, family):
    """The whole residual stream is swapped, not the branch behind a norm."""
    task = "masked_lm" if "masked_lm" in make(family).family.classes else "causal_lm"
    s = make(family, task, seed=1)
    s.model.eval()
    inputs, other = batch(), batch()
    other["input_ids"] = other["input_ids"].flip(0) * 0 + torch.where(
        inputs["attention_mask"] > 0, (inputs["input_ids"] + 5) % 30 + 3, 0
    )
    logits, last = TapPath("logits"), TapPath("hidden", 3)
    found = s.tapper.run(other, [logits, last])
    changes = Edits(tensors={last: (lambda value: swapped(value, found[last], None),)})
    assert torch.equal(s.tapper.run(inputs, [logits], None, changes)[logits], found[logits])


def test_positions_that_are_swapped():
    value, source = torch.zeros(2, 4, 3), torch.arange(24.0).reshape(2, 4, 3)
    at = torch.tensor([[True, False, False, True], [False, False, True, False]])
    got = swapped(value, source, at)
    assert torch.equal(got[0, 0], source[0, 0])
    assert torch.equal(got[1, 2], source[1, 2])
    assert got[0, 1].eq(0).all()
    index = torch.tensor([[-1, 3, 0, -1], [2, -1, -1, -1]])
    got = swapped(value, source, index)
    for b in range(2):
        for position in range(4):
            wanted = source[b, index[b, position]] if index[b, position] >= 0 else value[b, position]
            assert torch.equal(got[b, position], wanted)
    assert value.eq(0).all()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_forward_that_stops_early_and_leaves_the_model_as_it_was(make, batch, family):
    s, t = twins(make, family)
    inputs = batch()
    before = {name: id(type(module)) for name, module in s.model.named_modules()}
    calls = []
    handle = s.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    changes = Edits({0: tuple(t.tapper.blocks([0]))}, {HIDDEN[1]: (lambda value: value + 1,)})
    (got,) = hidden(s, inputs, changes, [HIDDEN[1]], HIDDEN[1])
    handle.remove()
    assert not calls
    torch.testing.assert_close(got, hidden(t, inputs)[1] + 1)
    assert {name: id(type(module)) for name, module in s.model.named_modules()} == before
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in s.model.modules())
    assert torch.equal(hidden(s, inputs)[3], s.tapper.run(inputs, HIDDEN)[HIDDEN[3]])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_changes_nothing(make, batch, family):
    found = []
    for on in (False, True):
        s, t = twins(make, family)
        inputs = batch()
        set_checkpointing(s.model, on)
        s.model.train()
        changes = Edits({1: tuple(t.tapper.blocks([1]))}, {HIDDEN[1]: (lambda value: value * 2,)})
        torch.manual_seed(0)
        out = hidden(s, inputs, changes)[3]
        out.square().mean().backward()
        found.append((out.detach(), [p.grad for p in s.blocks[0].parameters()]))
        assert all(getattr(block, "gradient_checkpointing", False) == on for block in s.blocks)
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b)
