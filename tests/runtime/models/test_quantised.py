"""Quantised models: what transformers itself makes of the same arguments, near the plain weights, and refusals."""

import sys

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan, TapPlan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.taps import TapPath
from gkd_dsl.planning.parameters import parameters as counted
from gkd_dsl.planning.quantised import weight_bytes
from gkd_dsl.runtime.compare import parameters
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.types import BATCH, TensorType

NF4 = 'bitsandbytes(load_in_4bit = true, bnb_4bit_quant_type = "nf4", bnb_4bit_compute_dtype = bfloat16)'
DOUBLE = "bitsandbytes(load_in_4bit = true, bnb_4bit_use_double_quant = true)"
INT8 = "bitsandbytes(load_in_8bit = true)"
ROWS = 'torchao("int8_weight_only")'
GROUPS = 'torchao("int8_weight_only", group_size = 32)'
FLOAT8 = 'torchao("float8_weight_only", granularity = per_tensor)'
BOTH = 'torchao("Int8DynamicActivationInt8WeightConfig")'
HOW = [NF4, DOUBLE, INT8, ROWS, GROUPS, FLOAT8, BOTH]
CASES = [(name, how) for name in ("bert", "llama", "gpt2") for how in HOW if name != "gpt2" or "torchao" not in how]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    small = {"vocab_size": 45, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 128, "max_position_embeddings": 40, "initializer_range": 0.1}
    BertForSequenceClassification(BertConfig(num_labels=3, **small, **more)).save_pretrained(found / "bert")
    llama = LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, **small, **more)
    LlamaForCausalLM(llama).save_pretrained(found / "llama")
    gpt2 = GPT2Config(vocab_size=45, n_embd=64, n_layer=2, n_head=2, n_positions=40, initializer_range=0.1)
    GPT2LMHeadModel(gpt2).save_pretrained(found / "gpt2")
    return found


def checked(folder, quantize, name="bert", more=""):
    return check_text(f'gkd 1\nteacher t = hf("{name}") {{\n  quantize = {quantize}\n{more}}}\n', root=folder)


def info_of(folder, quantize, name="bert"):
    found = checked(folder, quantize, name)
    assert {d.code for d in found.diagnostics.errors} <= {"E0418"}
    assert len(found.later) == 0
    return found.models["t"].info


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 45, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(folder, name, how):
    """The same by transformers and the libraries alone."""
    head = {"bert": ["classifier"]}.get(name, ["lm_head"])
    if "bitsandbytes" in how:
        args = {"load_in_8bit": True} if how == INT8 else {"load_in_4bit": True}
        if how == NF4:
            args |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        if how == DOUBLE:
            args |= {"bnb_4bit_use_double_quant": True}
        config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=head, **args)
    else:
        from torchao import quantization as ao

        scheme = {
            ROWS: lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
            GROUPS: lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32), set_inductor_config=False),
            FLOAT8: lambda: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor(), set_inductor_config=False),
            BOTH: lambda: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        }[how]()
        config = transformers.TorchAoConfig(scheme, modules_to_not_convert=head)
    kind = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder / name, quantization_config=config, dtype=torch.float32, device_map="cpu").eval()


def taps(model, info):
    paths = [TapPath("hidden", 1), TapPath("hidden", 2), TapPath("logits")]
    plans = tuple(TapPlan(path.key, path, TensorType("float", (BATCH,))) for path in paths)
    forward = ForwardPlan("t/forward", "t", False, plans, None)
    source = LiveTeachers([ModelNode("model/t", "t", "teacher", info)], {"t": model})
    return source.taps(forward, inputs(), {}, {})


@pytest.mark.parametrize(("name", "how"), CASES)
def test_taps_are_those_of_the_libraries(folder, name, how):
    info = info_of(folder, how, name)
    found = taps(load(info), info)
    wanted = by_hand(folder, name, how)
    with torch.no_grad():
        out = wanted(**inputs(), output_hidden_states=True)
    assert torch.equal(found["logits"], out.logits)
    assert torch.equal(found["hidden.1"], out.hidden_states[1])
    plain_info = info_of_plain(folder, name)
    plain = taps(load(plain_info), plain_info)
    valid = inputs()["attention_mask"].bool()
    for key, value in plain.items():
        mine = found[key] if key == "logits" and name == "bert" else found[key][valid]
        theirs = value if key == "logits" and name == "bert" else value[valid]
        off = float((mine - theirs).norm() / theirs.norm())
        # 4 bits have 16 levels and 8 bits 256: relative errors of about 1/10 and 1/100 in a product.
        assert 0 < off < (0.4 if "4bit" in how else 0.1 if how == FLOAT8 else 0.05), (key, off)


def info_of_plain(folder, name):
    return check_text(f'gkd 1\nteacher t = hf("{name}")\n', root=folder).models["t"].info


def held(model):
    """The bytes of all tensors that a model's weights are kept in."""
    found = {}

    def add(tensor):
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()

    for parameter in model.parameters():
        add(parameter)
        state = getattr(parameter, "quant_state", None)
        for scales in (state, state.state2 if state is not None and state.nested else None):
            if scales is not None:
                found[scales.absmax.data_ptr()] = scales.absmax.nbytes
        if getattr(parameter, "SCB", None) is not None:
            add(parameter.SCB)
    return sum(found.values())


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_plan_counts_the_bytes_that_are_held(folder, name, how):
    info = info_of(folder, how, name)
    model = load(info)
    assert weight_bytes(info) == held(model)
    # Before and after the first forward, for which some CPUs pack the weights anew.
    for _ in range(2):
        assert parameters(model) == counted(info).count
        taps(model, info)
    assert weight_bytes(info) < 0.5 * weight_bytes(info_of_plain(folder, name))


def test_a_model_that_was_saved_quantised(folder):
    info = info_of(folder, INT8)
    load(info).save_pretrained(folder / "saved")
    saved = info_of_plain(folder, "saved")
    assert (saved.quantised.library, saved.quantised.bits) == ("bitsandbytes", 8)
    again = load(saved)
    assert {p.dtype for n, p in again.named_parameters() if "query.weight" in n} == {torch.int8}
    mine, theirs = taps(again, saved), taps(load(info), info)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert "E0436" in {d.code for d in checked(folder, INT8, "saved").diagnostics.errors}


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("bnb(bits = 4)", "E0436", "`bnb` is no library that quantises"),
        ("4", "E0436", "`4` is no library"),
        ("bitsandbytes()", "E0436", "asked for no bits"),
        ("bitsandbytes(load_in_4bit = true, load_in_8bit = true)", "E0436", "both 4 and 8"),
        ("bitsandbytes(load_in_8bit = true, bnb_4bit_quant_type = nf4)", "E0436", "is for 4 bits"),
        ("bitsandbytes(load_in_4bit = true, llm_int8_threshold = 3.0)", "E0436", "is for 8 bits"),
        ("bitsandbytes(load_in_4bit = true, bnb_4bit_quant_type = nf5)", "E0402", "one of nf4, fp4"),
        ("bitsandbytes(load_in_4bit = 1)", "E0404", "takes true or false"),
        ("bitsandbytes(load_in_8bit = true, llm_int8_skip_modules = [1])", "E0404", "a list of texts"),
        ("bitsandbytes(load_in_4bits = true)", "E0234", "no argument `load_in_4bits`"),
        ("bitsandbytes(load_in_4bit = true, load_in_4bit = true)", "E0241", "given twice"),
        ("torchao()", "E0436", "takes a scheme first"),
        ('torchao("int3_weight_only")', "E0436", "no scheme `int3_weight_only`"),
        ('torchao("int8_weight_only", group_size = 0)', "E0404", "a whole number from 1"),
        ('torchao("int8_weight_only", group_size = 48)', "E0436", "does not divide H = 64"),
        ('torchao("int8_weight_only", group_size = 32, granularity = per_row)', "E0436", "granularity of its own"),
        ('torchao("float8_weight_only", group_size = 32)', "E0234", "no argument `group_size`"),
    ],
)
def test_what_the_check_says_of_arguments(folder, how, code, message):
    found = [d for d in checked(folder, how).diagnostics.errors if d.code != "E0418"]
    assert [d.code for d in found] == [code]
    assert message in found[0].message
    assert found[0].span is not None


def test_torchao_does_not_know_the_layers_of_gpt2(folder):
    assert "E0436" in {d.code for d in checked(folder, ROWS, "gpt2").diagnostics.errors}


def test_not_beside_what_needs_plain_weights(folder, tmp_path):
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = checked(folder, INT8, more='  adapter = peft("lora")\n').diagnostics.errors
    assert "E0436" in {d.code for d in found} or "E0435" in {d.code for d in found}
    text = 'gkd 1\nteacher t = random_init("bert") {\n  quantize = bitsandbytes(load_in_8bit = true)\n}\n'
    assert "E0436" in {d.code for d in check_text(text, root=folder).diagnostics.errors}


@pytest.mark.parametrize(("how", "library"), [(INT8, "bitsandbytes"), (ROWS, "torchao"), (NF4, "accelerate")])
def test_a_library_that_is_not_installed(folder, monkeypatch, how, library):
    from gkd_dsl.meaning import libraries

    there = libraries.find_spec
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == library else there(name))
    (found,) = [d for d in checked(folder, how).diagnostics.errors if d.code == "E0435"]
    assert library in found.message
    assert 'pip install "gkd-dsl[' in found.notes[0].text
    monkeypatch.undo()
    info = info_of(folder, how)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelError, match="cannot be imported") as caught:
        load(info)
    assert caught.value.hint.startswith('pip install "gkd-dsl[')


def test_what_a_scheme_cannot_do_here_is_said(folder):
    with pytest.raises(ModelError, match=r"torchao cannot quantise .* so here"):
        load(info_of(folder, 'torchao("int4_weight_only", group_size = 32)'))


def test_rows_that_a_cpu_cannot_pack(folder, monkeypatch):
    from bitsandbytes.nn import modules

    info = info_of(folder, "bitsandbytes(load_in_4bit = true, llm_int8_skip_modules = [])")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    with pytest.raises(ModelError, match=r"classifier of .* has 3 outputs") as caught:
        load(info)
    assert 'llm_int8_skip_modules = ["classifier"]' in caught.value.hint


def test_nothing_to_quantise(folder):
    how = 'torchao("int8_weight_only", modules_to_not_convert = ["bert"])'
    with pytest.raises(ModelError, match="no layer of"):
        load(info_of(folder, how.replace('"bert"', '"bert", "classifier"')))
