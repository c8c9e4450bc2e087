"""Runs with quantised teachers: losses by the libraries' own model, stored outputs, and what is refused."""

import json

import pytest
import torch
from stored_world import ALL, CACHED, CLASSIFY, bert, cache, classifiers, placed, plan, run, spec
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BitsAndBytesConfig

from gkd_dsl.meaning.check import check_path
from gkd_dsl.planning.estimate import estimate
from gkd_dsl.planning.machine import this_machine
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.export import ExportError
from gkd_dsl.runtime.reopen import export_run
from gkd_dsl.runtime.stages import Run

INT8 = 'teacher t = hf("t") {\n  quantize = bitsandbytes(load_in_8bit = true)\n}'
NF4 = 'teacher t = hf("t") {\n  quantize = bitsandbytes(load_in_4bit = true, bnb_4bit_quant_type = nf4)\n}'
ROWS = 'teacher t = hf("t") {\n  quantize = torchao("int8_weight_only")\n}'
PLAIN = 'teacher t = hf("t")'


@pytest.fixture
def folder(tmp_path):
    classifiers(tmp_path)
    torch.manual_seed(0)
    BertForSequenceClassification(bert(3, 64)).save_pretrained(tmp_path / "t")
    return tmp_path


def quantised(folder, how, placement="", name="spec.gkd", text=CLASSIFY, objective=ALL):
    return spec(folder, text.replace(PLAIN, how), placement, name, OBJECTIVE=objective)


def losses(found):
    return [step["loss"] for step in found.steps]


@pytest.mark.parametrize("how", [INT8, NF4, ROWS])
def test_losses_are_those_of_the_librarys_model(folder, how):
    path = quantised(folder, how)
    found = losses(run(path))
    plain = losses(run(spec(folder, CLASSIFY, OBJECTIVE=ALL, name="plain.gkd")))
    assert found != plain
    assert found == pytest.approx(plain, rel=0.3)
    if how == INT8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "t", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        made = Run(plan(spec(folder, CLASSIFY, OBJECTIVE=ALL, name="given.gkd")), root=folder, models={"t": model})
        from stored_world import Losses

        given = Losses()
        made._listeners = (given,)
        made.run()
        assert losses(given) == found


def test_nothing_of_it_is_trained_or_saved(folder):
    result = Run(plan(quantised(folder, INT8)), root=folder).run()
    weights = {n: p for n, p in result.models["t"].named_parameters() if p.dtype == torch.int8}
    assert len(weights) == 3 * 6 + 1
    assert all(p.grad is None for p in result.models["t"].parameters())


@pytest.mark.parametrize("how", [NF4, ROWS, INT8.replace("true", "true, llm_int8_threshold = 0.0")])
def test_stored_outputs_give_the_same_losses(folder, how):
    """Above a threshold 8 bits of bitsandbytes take what stands out in any row of a batch apart, in all of them."""
    live = losses(run(quantised(folder, how, objective="soft")))
    path = quantised(folder, how, CACHED, "cached.gkd", objective="soft")
    cache(path)
    assert losses(run(path)) == pytest.approx(live, rel=1e-3)


def test_the_manifest_says_how_it_was_quantised(folder):
    cache(quantised(folder, INT8, CACHED))
    manifest = json.loads((folder / "kept" / "main" / "manifest.json").read_text())
    assert manifest["identity"]["quantisation"] == "bitsandbytes (load_in_8bit = True)"
    for other in (PLAIN, NF4):
        with pytest.raises(RunError, match=r"quantisation is bitsandbytes .load_in_8bit = True. there and"):
            run(quantised(folder, other, CACHED, "other.gkd"))


def test_a_manifest_of_before_is_of_plain_weights(folder):
    path = quantised(folder, PLAIN, CACHED)
    cache(path)
    manifest = folder / "kept" / "main" / "manifest.json"
    data = json.loads(manifest.read_text())
    assert data["identity"].pop("quantisation") == "none"
    manifest.write_text(json.dumps(data))
    run(path)
    with pytest.raises(RunError, match="quantisation is absent there and bitsandbytes"):
        run(quantised(folder, INT8, CACHED, "other.gkd"))


def said(path):
    return [(d.code, d.message) for d in check_path(path).diagnostics.errors]


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_packed_weights_are_not_streamed(folder, place):
    ((code, message),) = said(quantised(folder, INT8, placed(f"placement = {place}")))
    assert (code, message) == ("E0436", f"`t` is quantised, and `placement = {place}` moves plain weights")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("  minimize OBJECTIVE", "  train t, s, W\n  minimize OBJECTIVE", "stage `main` trains it"),
        ('random_init("s")', "truncated(t, layers = [0, 1])", "`s` is made from its weights"),
        (
            "loss soft",
            "pass mixed = s(batch) {\n  replace layer[0] with t.layer[0]\n}\nloss soft",
            "stage `main` exchanges blocks with another model",
        ),
    ],
)
def test_what_needs_plain_weights_is_refused(folder, before, after, reason):
    text = CLASSIFY.replace(before, after)
    if "mixed" in after:
        text = text.replace('random_init("s")', 'random_init("s", hidden_size = 64)').replace(
            "loss hid", "loss lent = mse(mixed.logits <- t.logits)\nloss hid"
        )
    objective = "lent" if "mixed" in after else "soft"
    ((code, message),) = said(quantised(folder, INT8, text=text, objective=objective))
    assert (code, message) == ("E0436", f"`t` is quantised, and {reason}")


def test_packed_weights_are_not_exported(folder):
    checked = check_path(quantised(folder, INT8))
    with pytest.raises(ExportError, match=r"`t` is quantised, and packed weights are not written; .* load it from t$"):
        export_run(checked, folder / "runs" / "any", "last", folder / "exported", "t")
    assert not (folder / "exported").exists()


def test_a_plan_counts_packed_bytes(folder):
    sizes = {}
    for how in (PLAIN, INT8, NF4):
        (stage,) = estimate(plan(quantised(folder, how)), this_machine())
        sizes[how] = next(model.device for model in stage.models if model.name == "t")
    assert sizes[NF4] < sizes[INT8] < 0.5 * sizes[PLAIN]
