"""Passes: what they read, what counts in them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from meaning_help import GOLDEN, SHORT, STUDENT, TEACHER, check, codes, good, inputs, node, parts, spec, stage
from meaning_help import LINES as LINES_OF_TEXT

from gkd_dsl.graph.nodes import AddToTap, ForwardNode, ReplaceBlock, SwapTap
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.passes import _attends
from gkd_dsl.models.describe import describe

LINES = "loss hard = cross_entropy(s.logits, batch.labels)\n"
MINIMISED = stage("minimize hard")
TWO = TEACHER + SHORT


def forward(checked, key: str) -> ForwardNode:
    found = node(checked, key)
    assert isinstance(found, ForwardNode)
    return found


def plan_of(checked, name: str = "main"):
    return next(found for found in compile_plan(checked.graph).stages if found.name == name)


def test_a_pass_over_other_texts_counts_their_tokens() -> None:
    body = "pass x = s(roll(batch))\npass y = t(roll(batch))\nloss hard = mse(x.layer[0].out <- y.layer[2].out)\n"
    checked = good(spec(body + MINIMISED, TWO))
    (loss,) = parts(checked, "hard")
    assert loss.endswith("valid=valid_tokens(x=roll(x=batch/attention_mask)))")
    (entry,) = plan_of(checked).counted
    assert node(checked, entry.valid).op == "valid_tokens"  # type: ignore[attr-defined]
    assert [f.shift for f in plan_of(checked).forwards] == [1, 1]


def test_a_loss_over_both_texts_counts_where_both_have_a_token() -> None:
    body = "pass x = s(roll(batch))\nloss hard = mse(x.layer[0].out <- t.layer[2].out)\n"
    (loss,) = parts(good(spec(body + MINIMISED, TWO)), "hard")
    both = "and(a=valid_tokens(x=batch/attention_mask), b=valid_tokens(x=roll(x=batch/attention_mask)))"
    assert loss.endswith(f"valid={both})")


def test_a_causal_pass_shifts_the_labels_and_the_mask_of_its_own_texts() -> None:
    body = "pass x = s(roll(batch))\nloss hard = cross_entropy(x.logits, roll(batch).labels)\n"
    models = 'student s = hf("models/qwen_small")\n' + LINES_OF_TEXT
    (loss,) = parts(good(spec(body + MINIMISED, models, "")), "hard")
    assert "next_token(x=roll(x=batch/labels))" in loss
    assert "next_token(x=valid_tokens(x=roll(x=batch/attention_mask)))" in loss
    assert "x=batch/attention_mask)" not in loss.replace("roll(x=batch/attention_mask)", "")


def test_rolled_twice_is_by_two_and_each_roll_is_made_once() -> None:
    body = (
        "pass x = s(roll(roll(batch)))\npass y = s(roll(batch, by = 2))\n"
        "loss hard = mse(x.layer[0].out <- detach(y.layer[1].out))\n"
    )
    checked = good(spec(body + MINIMISED, TWO))
    assert inputs(checked, "x/forward")["input_ids"] == inputs(checked, "y/forward")["input_ids"]
    assert forward(checked, "x/forward").shift == 2


def test_equal_passes_of_a_teacher_are_one_and_those_of_a_student_are_not() -> None:
    body = (
        "pass a = t(roll(batch))\npass b = t(roll(batch))\npass c = s\npass d = s\n"
        "loss hard = mse(c.layer[0].out <- a.layer[2].out) + mse(d.layer[1].out <- b.layer[5].out)\n"
    )
    plan = plan_of(good(spec(body + MINIMISED, TWO)))
    assert sorted(f.key for f in plan.forwards) == ["a/forward", "c/forward", "d/forward"]


def test_the_changes_of_a_pass_in_their_order() -> None:
    body = """
let spans = random_spans(batch.attention_mask, share = 30%)
pass o = t(roll(batch))
pass x = s {
  replace layer[-1] with t.layer[[3, 5]] when stage.progress >= 0.5
  swap embed from o.hidden[0] at spans
  swap layer[1].in from o.layer[2].out
  add hidden[3] = 0.5 * s.layer[0].out
}
loss hard = cross_entropy(x.logits, batch.labels)
"""
    checked = good(spec(body + MINIMISED, TWO))
    first, second, third, last = forward(checked, "x/forward").changes
    assert isinstance(first, ReplaceBlock)
    assert (first.index, first.model, first.layers, str(first.when)) == (3, "t", (3, 5), "(stage.progress >= 0.5)")
    assert isinstance(second, SwapTap)
    assert isinstance(third, SwapTap)
    assert isinstance(last, AddToTap)
    assert [str(change.path) for change in (second, third, last)] == ["hidden[0]", "hidden[1]", "hidden[3]"]
    held = inputs(checked, "x/forward")
    assert held["replace.0"] == "model/t"
    assert held["swap.1.source"] == "o/hidden.0"
    assert held["swap.1.at"] == "op/random_spans.1"
    assert held["swap.2.source"] == "o/hidden.3"
    assert "swap.2.at" not in held


def test_a_condition_that_never_holds_changes_nothing() -> None:
    body = "pass x = s { replace layer[0] with t.layer[0] when coin(0) }\nloss hard = cross_entropy(x.logits, batch.labels)\n"
    assert forward(good(spec(body + MINIMISED, TWO)), "x/forward").changes == ()


def test_a_lender_is_a_model_of_the_stage_and_is_not_run() -> None:
    body = "pass x = s { replace layer[0] with t.layer[0] }\nloss hard = cross_entropy(x.logits, batch.labels)\n"
    plan = plan_of(good(spec(body + MINIMISED, TWO)))
    assert [m.name for m in plan.models] == ["s", "t"]
    assert [f.model for f in plan.forwards] == ["s"]


def test_a_pass_belongs_to_its_stage() -> None:
    body = stage("pass x = s { grad = keep }\nloss own = cross_entropy(x.logits, batch.labels)\nminimize own")
    alone = 'student s = hf("models/student")\n'
    assert "main/x/forward" in good(spec(body, alone)).graph


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("pass x = hard", "E0247"),
        ("pass x = s(batch.labels)", "E0247"),
        ("pass x = s(batch, batch)", "E0247"),
        ("pass y = s\npass x = y", "E0247"),
        ("pass x = s { replace layer[0] with s.layer[1] }", "E0247"),
        ("pass x = s { replace hidden[0] with t.layer[1] }", "E0247"),
        ("pass x = s { replace layer[0 ..< 2] with t.layer[1] }", "E0247"),
        ("pass x = s { replace layer[0] with t.layer[1] when 0.5 }", "E0260"),
        ("pass x = s { swap layer[0].attn.q from t.layer[0].attn.q }", "E0247"),
        ("pass x = s { swap layer[0].out from t.layer[0].mlp }", "E0247"),
        ("pass x = s { swap layer[0].out from l2norm(t.layer[0].out) }", "E0247"),
        ("pass x = s { swap hidden[0] from t.hidden[0] at batch.input_ids }", "E0247"),
        ("pass x = s { swap hidden[0] from t.hidden[0] at batch.labels == 1 }", "E0247"),
        ("pass x = s { swap hidden[0] from t.hidden[0] at t.logits > 0.5 }", "E0247"),
        ("let h = t.final\npass x = s { swap hidden[0] from t.hidden[0] at h[0] > 0 }", "E0247"),
        (
            "let h = t.final\npass x = s { swap hidden[0] from t.hidden[0] at (h[0] > 0) & (batch.input_ids != 0) }",
            "E0247",
        ),
        ("pass x = s { swap hidden[0] from x.hidden[0] }", "E0242"),
        ("pass x = s { add embed = 1.0 }", "E0247"),
        ("pass x = s { replace layer[i] with t.layer[i] for i in 0 ..< 0 }", "E0219"),
        ("pass x = s { replace layer[i] with t.layer[i] for i in s.N }", "E0217"),
        ("pass x = s { add embed = s.logits }", "E0247"),
        ("let h = s.final\npass x = s { add embed = h[0] }", "E0247"),
        ("pass x = s { add layer[0].mlp = s.layer[0].out }", "E0247"),
        ("pass x = s { grad = drop }", "E0402"),
        ("pass x = s { noise = 1 }", "E0408"),
        ("pass x = s\nlet g = gradient(hard)", "E0235"),
        ("pass x = s\nlet g = gradient(hard, by = x.embed)", "E0234"),
        ("pass x = s\nlet g = gradient(hard, at = x.embed)", "E0272"),
        ("pass x = s\nlet g = gradient(hard, at = l2norm(s.embed))", "E0272"),
        ("pass x = s\nlet g = gradient(mse(s.hidden[1] <- t.hidden[1]), at = s.hidden[2])", "E0272"),
        ("pass x = s\nlet g = gradient(mse(detach(s.logits) <- t.logits), at = s.embed)", "E0272"),
        ("pass x = s\nlet d = draw(2.5)", "E0404"),
        ("pass x = s\nlet d = draw(0)", "E0403"),
        ("pass x = s\nlet y = s(roll(batch))", "E0228"),
    ],
)
def test_what_a_pass_cannot_be(line: str, code: str) -> None:
    found = check(spec(f"{LINES}{line}\n{MINIMISED}", TWO))
    assert [c for c in codes(found) if not c.startswith("W")] == [code]


@pytest.mark.parametrize(
    ("family", "differs"),
    [
        ('random_init("models/teacher", num_attention_heads = 8)', "heads"),
        ('hf("models/llama")', "family"),
        ('hf("models/student")', "width"),
    ],
)
def test_blocks_that_do_not_fit_are_told_what_differs(family: str, differs: str) -> None:
    models = TEACHER + f"student s = {family}\n"
    body = (
        "pass x = s { replace layer[0] with t.layer[1] }\nloss hard = mse(x.layer[0].out <- detach(s.layer[0].out))\n"
    )
    found = check(spec(body + MINIMISED, models))
    (error,) = [d for d in found.diagnostics if d.code == "E0270"]
    assert differs in str(error.labels)


def test_a_tap_inside_a_replaced_block_is_refused_by_path_and_by_module() -> None:
    for tap in ("layer[1].attn.probs", "layer[1].mlp", 'module("bert.encoder.layer.1.attention").out'):
        body = f"pass x = s {{ replace layer[1] with t.layer[1] }}\nlet a = x.{tap}\n"
        found = check(spec(LINES + body + MINIMISED, TWO))
        assert "E0271" in codes(found), tap
    body = "pass x = s { replace layer[1] with t.layer[1] }\nloss hard = mse(x.layer[0].mlp <- t.layer[0].mlp)\n"
    good(spec(body + MINIMISED, TWO))


def test_a_gradient_through_another_pass_and_at_a_tap_of_the_objective() -> None:
    body = """
loss soft(m: model) = kl(m.logits <- t.logits)
let g = gradient(soft(s), at = s.hidden[2])
pass x = s { add hidden[2] = l2norm(g) }
pass y = s { add hidden[2] = l2norm(gradient(soft(x), at = x.hidden[1])) }
loss hard = soft(s) + soft(y)
"""
    checked = good(spec(body + MINIMISED, TWO))
    gradients = [key for key in checked.graph if key.startswith("op/gradient")]
    assert sorted(inputs(checked, key)["at"] for key in gradients) == ["s/hidden.2", "x/hidden.1"]


@pytest.mark.parametrize("types", [True, 3, "full_attention", {"a": 1}, [], ["full_attention"], [None, None, None]])
def test_a_list_of_layer_types_that_is_none_is_no_reason_to_fail(types: object) -> None:
    info = describe(str(GOLDEN / "models/qwen_small"))
    assert isinstance(_attends(replace(info, config={**info.config, "layer_types": types}), 2), str)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
}
QWEN = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
BERT = {**LLAMA, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
KINDS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}


@pytest.mark.parametrize(
    ("ours", "theirs", "blocks", "said"),
    [
        (LLAMA, LLAMA, (0, 1), None),
        (LLAMA, {**LLAMA, "rope_theta": 5e5}, (0, 0), "`rope_theta`"),
        (LLAMA, {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, (0, 0), "positions are rotated"),
        (LLAMA, {**LLAMA, "rope_theta": 1e4}, (0, 0), None),
        (
            {**LLAMA, "rope_theta": 5e5},
            {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            (0, 0),
            None,
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            (0, 0),
            None,
        ),
        (LLAMA, {**LLAMA, "num_key_value_heads": 2}, (0, 0), "key heads"),
        (LLAMA, {**LLAMA, "head_dim": 8}, (0, 0), "width of a head"),
        (LLAMA, {**QWEN}, (0, 0), "family"),
        (BERT, {**BERT, "is_decoder": True, "architectures": ["BertLMHeadModel"]}, (0, 0), "what comes before"),
        ({**QWEN, **KINDS}, {**QWEN, **KINDS}, (0, 0), None),
        ({**QWEN, **KINDS}, {**QWEN, **KINDS}, (0, 1), "block 1 has another window"),
        ({**QWEN, **KINDS}, {**QWEN, **KINDS, "sliding_window": 4}, (1, 1), "block 1 has another window"),
        ({**QWEN, **KINDS}, {**QWEN, **KINDS, "sliding_window": 4}, (0, 0), None),
    ],
)
def test_blocks_that_compute_something_else_in_the_place_of_others(
    tmp_path, ours: dict, theirs: dict, blocks: tuple[int, int], said: str | None
) -> None:
    for name, config in (("s", ours), ("t", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = f'teacher t = hf("{tmp_path}/t")\nstudent s = hf("{tmp_path}/s")\n'
    body = f"pass x = s {{ replace layer[{blocks[0]}] with t.layer[{blocks[1]}] }}\n"
    body += "loss hard = cross_entropy(x.logits, batch.labels)\n"
    found = [d for d in check(spec(body + MINIMISED, models, LINES_OF_TEXT)).diagnostics if d.severity == "error"]
    assert [d.code for d in found] == ([] if said is None else ["E0270"])
    assert said is None or any(said in label.text for label in found[0].labels)


def test_a_teacher_runs_once_for_each_choice_of_texts() -> None:
    body = "pass y = t(roll(batch))\npass same = t(roll(batch))\npass z = t(roll(batch, by = 2))\npass w = t(batch)\n"
    body += "loss hard = " + " + ".join(
        f"mse(s.layer[0].out <- {name}.layer[2].out)" for name in ("t", "w", "y", "same", "z")
    )
    checked = check(spec(body + "\n" + MINIMISED, TWO))
    assert [d.code for d in checked.diagnostics if d.severity == "error"] == []
    forwards = [found for found in plan_of(checked).forwards if found.model == "t"]
    assert sorted(found.shift for found in forwards) == [0, 1, 2]


def test_a_swap_takes_tensors_of_one_width() -> None:
    body = "pass x = s { swap hidden[1] from t.hidden[1] }\nloss hard = cross_entropy(x.logits, batch.labels)\n"
    assert codes(check(spec(body + MINIMISED, TEACHER + STUDENT))) == ["E0247"]
