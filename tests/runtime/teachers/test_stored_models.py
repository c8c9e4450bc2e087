"""`teacher t = cached("dir")`: no folder of the model anywhere, the same losses, and what is refused."""

import json
import shutil

import pytest
from stored_world import (
    ALL,
    CACHED,
    CLASSIFY,
    LANGUAGE,
    WORDS,
    cache,
    classifiers,
    decoders,
    placed,
    plan,
    run,
    spec,
    table,
    tokenizer,
)

from gkd_dsl.graph.schema import from_json, to_json
from gkd_dsl.meaning.check import check_path
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.stored import read
from gkd_dsl.planning.estimate import estimate
from gkd_dsl.planning.machine import this_machine
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.stages import Run


def alone(folder, text, place="kept", placement="", name="alone.gkd", **words):
    """A spec that knows the teacher by its outputs."""
    return spec(folder, text.replace('hf("t")', f'cached("{place}")'), placement, name, **words)


@pytest.fixture
def folder(tmp_path):
    """A student, rows, and what a teacher gave that is here no more."""
    classifiers(tmp_path)
    cache(spec(tmp_path, CLASSIFY, CACHED, OBJECTIVE=ALL))
    shutil.move(tmp_path / "t", tmp_path.parent / f"{tmp_path.name}-away")
    return tmp_path


def said(path):
    return [(d.code, d.message) for d in check_path(path).diagnostics.errors]


def test_losses_and_metrics_are_those_of_the_model(tmp_path):
    classifiers(tmp_path)
    live = run(spec(tmp_path, CLASSIFY, OBJECTIVE=ALL))
    stored = spec(tmp_path, CLASSIFY, CACHED, OBJECTIVE=ALL, name="stored.gkd")
    cache(stored)
    by_placement = run(stored)
    shutil.rmtree(tmp_path / "t")
    found = run(alone(tmp_path, CLASSIFY, OBJECTIVE=ALL))
    assert found.steps == by_placement.steps
    assert found.metrics == by_placement.metrics
    assert len(found.metrics) == 2
    assert len(found.steps) == len(live.steps) > 0
    for mine, theirs in zip(found.steps, live.steps, strict=True):
        # Features are stored in bf16.
        assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-7)
    # Logits are stored in fp32.
    assert [step["soft"] for step in found.steps[:1]] == pytest.approx([live.steps[0]["soft"]], rel=1e-6)


def test_of_a_language_model_the_largest_logits(tmp_path):
    decoders(tmp_path)
    few = spec(tmp_path, LANGUAGE, placed("placement = cached", 'cache = "few"', "top_k = 5"), LOSS="kl")
    cache(few)
    wanted = run(few).steps
    shutil.rmtree(tmp_path / "t")
    path = alone(tmp_path, LANGUAGE, "few", LOSS="kl")
    assert run(path).steps == wanted
    assert dict(plan(path).runtime)["t.top_k"] == 5
    text = LANGUAGE.replace("LOSS(s.logits <- t.logits, temperature = 2.0)", "mse(s.logits <- t.logits)")
    ((code, message),) = said(alone(tmp_path, text, "few"))
    assert code == "E0430"
    assert "`mse` reads all logits of `t`, and of these the 5 largest are stored" in message
    tail = placed("tail = renormalise")
    ((code, message),) = said(alone(tmp_path, LANGUAGE, "few", tail, LOSS="jsd"))
    assert (code, "not finite" in message) == ("E0430", True)
    assert run(alone(tmp_path, LANGUAGE, "few", tail, LOSS="kl")).steps != wanted


def test_what_is_known_of_it_is_what_was_known(tmp_path):
    classifiers(tmp_path)
    path = spec(tmp_path, CLASSIFY, CACHED, OBJECTIVE=ALL)
    cache(path)
    whole = check_path(path).models["t"].info
    info = read(tmp_path / "kept", "kept").info
    for name in ("family", "architecture", "task", "sizes", "size_fields", "has_pooler", "config"):
        assert getattr(info, name) == getattr(whole, name), name
    assert info.vocabulary.fingerprint == whole.vocabulary.fingerprint
    assert info.path is None


def test_the_folder_of_one_stage_serves_another(folder):
    renamed = CLASSIFY.replace("stage main", "stage other")
    ((code, message),) = said(alone(folder, renamed, OBJECTIVE="soft"))
    assert (code, message) == ("E0437", "no outputs of `t` are stored for stage `other`")
    wanted = run(alone(folder, CLASSIFY, OBJECTIVE="soft")).steps
    assert run(alone(folder, renamed, "kept/main", OBJECTIVE="soft")).steps == wanted


def test_rows_held_out_may_be_there_without_a_metric(folder):
    plain = CLASSIFY.replace("  evaluate agree\n", "")
    assert len(run(alone(folder, plain, OBJECTIVE="soft")).steps) == 12


def test_rows_held_out_that_a_metric_needs_and_that_are_not_there(tmp_path):
    classifiers(tmp_path)
    cache(spec(tmp_path, CLASSIFY.replace("  evaluate agree\n", ""), CACHED, OBJECTIVE="soft"))
    ((code, message),) = said(alone(tmp_path, CLASSIFY, OBJECTIVE="soft"))
    assert code == "E0437"
    assert "no rows held out are stored" in message


def test_a_tensor_that_is_not_stored_is_told_at_its_place(folder):
    text = CLASSIFY.replace("t.hidden[2]", "t.hidden[3]")
    checked = check_path(alone(folder, text, OBJECTIVE=ALL))
    (found,) = checked.diagnostics.errors
    assert (found.code, found.message) == ("E0437", "`t.hidden[3]` is not among the stored outputs")
    assert found.span.text == "t.hidden[3]"
    assert found.notes[0].text == "stored for stage `main`: hidden[2], layer[1].attn.scores, logits"
    # What no stage reads need not be there.
    assert said(alone(folder, text, OBJECTIVE="soft")) == []


def test_names_and_shapes_are_checked_as_of_any_model(folder):
    assert [code for code, _ in said(alone(folder, CLASSIFY.replace("t.hidden[2]", "t.hidden[9]"), OBJECTIVE=ALL))] == [
        "E0204"
    ]
    narrow = CLASSIFY.replace("linear(s.H -> t.H)", "linear(s.H -> 7)")
    assert "E0301" in [code for code, _ in said(alone(folder, narrow, OBJECTIVE=ALL))]


def test_another_tokenizer_is_refused_by_the_check(folder):
    tokenizer(WORDS[::-1]).save_pretrained(folder / "s")
    ((code, message),) = said(alone(folder, CLASSIFY, OBJECTIVE="soft"))
    assert (code, message) == ("E0321", "`t` and `s` have different tokenizers")


def test_other_rows_are_refused_by_the_run_with_the_field(folder):
    path = alone(folder, CLASSIFY, OBJECTIVE="soft")
    run(path)
    table(folder, 20, seed=1)
    with pytest.raises(RunError, match=r"E0808.*data set is .* there and .* here"):
        run(path)
    table(folder, 20)
    with pytest.raises(RunError, match="data set is"):
        run(alone(folder, CLASSIFY.replace("batch_size", "max_length = 6\n  batch_size"), OBJECTIVE="soft"))


@pytest.mark.parametrize(
    ("before", "after", "code", "message"),
    [
        ('cached("kept")', 'cached("kpt")', "E0437", "there is no folder kpt"),
        ('cached("kept")', 'cached("s")', "E0437", "the folder s has no stored outputs"),
        ('cached("kept")', "cached()", "E0508", "`cached` takes the folder of stored outputs, and nothing else"),
        ('cached("kept")', 'cached("kept", top_k = 3)', "E0508", "`cached` takes the folder of stored outputs, and nothing else"),
        ('cached("kept")', "cached(3)", "E0508", "`cached` takes the folder of stored outputs, not a number"),
        ("teacher t =", "student t =", "E0437", "`t` is a student, and of it only outputs are stored"),
        ('random_init("s")', "truncated(t, layers = [0])", "E0437", "`truncated` starts from a model, and of `t` only outputs are stored"),
        ('random_init("s")', "random_init(t)", "E0437", "`random_init` starts from a model, and of `t` only outputs are stored"),
        ("  minimize soft", "  train t, s\n  minimize soft", "E0430", "the outputs of `t` cannot be stored: stage `main` trains `t`"),
    ],
)  # fmt: skip
def test_what_the_check_says(folder, before, after, code, message):
    path = alone(folder, CLASSIFY, OBJECTIVE="soft")
    path.write_text(path.read_text().replace(before, after))
    assert (code, message) in said(path)


@pytest.mark.parametrize("setting", ["placement = offload", "cache = auto", 'cache = "kept"', "top_k = 3"])
def test_it_has_no_other_place(folder, setting):
    found = said(alone(folder, CLASSIFY, placement=placed(setting), OBJECTIVE="soft"))
    assert [code for code, _ in found] == ["E0437"]


def test_a_manifest_of_before_does_not_describe_its_model(folder):
    path = folder / "kept" / "main" / "manifest.json"
    data = json.loads(path.read_text())
    del data["model"], data["taps"]
    path.write_text(json.dumps(data))
    ((code, message),) = said(alone(folder, CLASSIFY, OBJECTIVE="soft"))
    assert code == "E0437"
    assert "kept/main/manifest.json does not describe its model" in message
    shutil.move(folder.parent / f"{folder.name}-away", folder / "t")
    # With the model's folder at hand it is read as before.
    assert len(run(spec(folder, CLASSIFY, CACHED, OBJECTIVE=ALL)).steps) == 12


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"model": {}, "parts": {}, "shared": []}'])
def test_a_manifest_that_cannot_be_read(folder, content):
    (folder / "kept" / "main" / "manifest.json").write_text(content)
    ((code, message),) = said(alone(folder, CLASSIFY, OBJECTIVE="soft"))
    assert code == "E0437"
    assert "kept/main/manifest.json cannot be read" in message


def test_stages_of_two_models_are_not_one(folder):
    other = folder / "kept" / "other"
    shutil.copytree(folder / "kept" / "main", other)
    data = json.loads((other / "manifest.json").read_text())
    data["model"]["config"]["layer_norm_eps"] = 0.1
    (other / "manifest.json").write_text(json.dumps(data))
    ((code, message),) = said(alone(folder, CLASSIFY, OBJECTIVE="soft"))
    assert (code, message) == ("E0437", "the folder kept has stored outputs of more than one model")


def test_nothing_is_loaded_drawn_or_counted_that_is_not_there(folder):
    path = alone(folder, CLASSIFY, OBJECTIVE=ALL)
    checked = check_path(path)
    info = checked.models["t"].info
    with pytest.raises(ModelError, match="outputs of a model, and no weights"):
        load(info)
    with pytest.raises(RunError, match="there is no model to run"):
        cache(path)
    again = from_json(to_json(checked.graph))
    assert again.nodes["model/t"]["node"].info == info
    (stage,) = estimate(plan(path), this_machine())
    assert next((m.where, m.device) for m in stage.models if m.name == "t") == ("cached", 0)
    assert set(Run(plan(path), root=folder).run().models) == {"s"}
