"""Teachers whose blocks come one by one: the same losses bit for bit, and never all blocks at once."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_world import ALL, CLASSIFY, LANGUAGE, V, classifiers, decoders, placed, run, spec
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan, TapPlan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.models.describe import describe
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.models.load import build, load
from gkd_dsl.runtime.teachers.disk import on_disk
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers, in_host_memory
from gkd_dsl.types import BATCH, LENGTH, Dim, TensorType

CPU = torch.device("cpu")


def streamed(folder, name, place):
    info = describe(str(folder / name))
    node = ModelNode(f"model/{name}", name, "teacher", info)
    if place == "offload":
        return StreamedTeachers(node, load(info), CPU, in_host_memory)
    model, saved, files = on_disk(info, name)
    return StreamedTeachers(node, model, CPU, lambda key, like: files.tensor(saved[key], like.dtype))


def forward_of(*paths, stop=None, grad=False):
    type = TensorType("float", (BATCH, LENGTH, Dim("H", None)))
    return ForwardPlan("t/forward", "t", grad, tuple(TapPlan(path.key, path, type) for path in paths), stop)


def inputs(rows=3, length=7):
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_a_run_is_the_same_bit_for_bit(tmp_path, place):
    folder = classifiers(tmp_path)
    live = run(spec(folder, CLASSIFY, OBJECTIVE=ALL))
    found = run(spec(folder, CLASSIFY, placed(f"placement = {place}"), OBJECTIVE=ALL))
    assert found.steps == live.steps
    assert found.metrics == live.metrics


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_a_language_model_too(tmp_path, place):
    folder = decoders(tmp_path)
    live = run(spec(folder, LANGUAGE, LOSS="kl"))
    assert run(spec(folder, LANGUAGE, placed(f"placement = {place}"), LOSS="kl")).steps == live.steps


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_outputs_are_stored_from_it(tmp_path, place):
    folder = classifiers(tmp_path)
    from gkd_dsl.runtime.run_folder import RunFolder

    made = []
    for number, how in enumerate((place, "resident")):
        path = spec(folder, CLASSIFY, placed(f"placement = {how}", "cache = auto"), OBJECTIVE=ALL)
        made.append(run(path, RunFolder.create("x", out=folder / f"run{number}")).steps)
    assert made[0] == made[1]


def gpt2(folder):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=40, n_embd=24, n_layer=3, n_head=2, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder / "g")


@pytest.mark.parametrize("place", ["offload", "disk"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_taps_of_every_kind(tmp_path, place, kind):
    folder = {"bert": classifiers, "llama": decoders, "gpt2": gpt2}[kind]
    folder(tmp_path)
    name = "g" if kind == "gpt2" else "t"
    paths = [TapPath("hidden", 0), TapPath("hidden", 2), TapPath("layer", 2, "attn.probs"), TapPath("layer", 0, "mlp")]
    paths += [TapPath("logits"), TapPath("layer", 1, "attn.q")]
    info = describe(str(tmp_path / name))
    whole = LiveTeachers([ModelNode(f"model/{name}", "t", "teacher", info)], {"t": load(info)})
    source = streamed(tmp_path, name, place)
    wanted = whole.taps(forward_of(*paths), inputs(), {}, {})
    found = source.taps(forward_of(*paths), inputs(), {}, {})
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert source.held() == 0


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_a_decoder_that_classifies_knows_its_padding(tmp_path, place):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=40, n_embd=24, n_layer=2, n_head=2, num_labels=3, eos_token_id=2,
                        bos_token_id=1)  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "g")
    info = describe(str(tmp_path / "g"))
    live = LiveTeachers([ModelNode("model/g", "t", "teacher", info)], {"t": load(info)})
    forward = forward_of(TapPath("logits"))
    assert torch.equal(*(s.taps(forward, inputs(), {}, {})["logits"] for s in (streamed(tmp_path, "g", place), live)))


@pytest.mark.parametrize("place", ["offload", "disk"])
def test_a_forward_stops_where_nothing_more_is_needed(tmp_path, place):
    folder = classifiers(tmp_path)
    source = streamed(folder, "t", place)
    ran = []
    for number, block in enumerate(source._blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    path = TapPath("hidden", 2)
    source.taps(forward_of(path, stop=path), inputs(), {}, {})
    assert ran == [0, 1]
    assert source.held() == 0
    source.taps(forward_of(TapPath("logits")), inputs(), {}, {})
    assert ran == [0, 1, 0, 1, 2]


def test_of_the_disk_one_block_is_there_at_a_time(tmp_path):
    folder = decoders(tmp_path)
    source = streamed(folder, "t", "disk")
    held = []
    for block in source._blocks:
        block.register_forward_hook(lambda *_: held.append(source.held()))
        block.self_attn.register_forward_hook(lambda *_: held.append(source.held()))
    block = sum(p.nbytes for p in build(describe(str(folder / "t"))).model.layers[0].parameters())
    source.taps(forward_of(TapPath("logits")), inputs(), {}, {})
    assert max(held) == block > 0
    assert all(p.is_meta for layer in source.model.model.layers for p in layer.parameters())


def test_a_weight_of_a_block_is_a_tap(tmp_path):
    folder = decoders(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    path = TapPath("weight", name=name)
    for place in ("offload", "disk"):
        found = streamed(folder, "t", place).taps(forward_of(path, TapPath("logits")), inputs(), {}, {})
        assert torch.equal(found[path.key], load_file(folder / "t" / "model.safetensors")[name])


def test_what_it_cannot_do_is_said(tmp_path):
    folder = classifiers(tmp_path)
    source = streamed(folder, "t", "offload")
    with pytest.raises(RunError, match="streamed"):
        source.blocks("t", [0])
    with pytest.raises(RunError, match="gradient flows through `t`"):
        source.taps(forward_of(TapPath("logits"), grad=True), inputs(), {}, {})
    file = folder / "t" / "model.safetensors"
    tensors = load_file(file)
    del tensors["classifier.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"no weight `classifier.bias`"):
        on_disk(describe(str(folder / "t")), "t")
    file.unlink()
    with pytest.raises(RunError, match=r"no safetensors.*no weights at all"):
        on_disk(describe(str(folder / "t")), "t")
    (folder / "t" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RunError, match=r"no safetensors.*placement = offload"):
        on_disk(describe(str(folder / "t")), "t")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole[:-300], "incomplete metadata.*cut short"),
        (lambda whole: whole[:50], "header.*cut short"),
        (lambda whole: b"", "header.*cut short"),
        (lambda whole: b"\xff" * 5000, "header.*cut short"),
        (lambda whole: b"<html>" * 99, "header.*cut short"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "Git LFS.*git lfs pull"),
    ],
)
def test_a_file_of_weights_that_is_damaged_is_named(tmp_path, change, said):
    folder = classifiers(tmp_path)
    file = folder / "t" / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    info = describe(str(folder / "t"))
    with pytest.raises(RunError, match=f"E0807: the weights of `t` cannot be loaded: .*t/model.safetensors.*{said}"):
        on_disk(info, "t")
    with pytest.raises(ModelError) as caught:
        load(info)
    told = f"{caught.value.reason}; {caught.value.hint}"
    assert re.search(f"cannot be loaded: .*t/model.safetensors.*{said}", told)


def test_several_files_and_another_precision(tmp_path):
    folder = decoders(tmp_path)
    file = folder / "t" / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(file).items()}
    file.unlink()
    names, where = sorted(tensors), {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        part = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / "t" / part, metadata={"format": "pt"})
        where |= dict.fromkeys(chosen, part)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "t" / "model.safetensors.index.json").write_text(json.dumps(index))
    info = describe(str(folder / "t"))
    source, forward = streamed(folder, "t", "disk"), forward_of(TapPath("logits"))
    live = LiveTeachers([ModelNode("model/t", "t", "teacher", info)], {"t": load(info)})
    assert torch.equal(*(each.taps(forward, inputs(), {}, {})["logits"] for each in (source, live)))


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (["placement = offload"], "E0432"),
        (["placement = disk"], "E0432"),
        (["placement = cached", 'cache = "x"'], "E0430"),
        (["placement = resident"], None),
    ],
)
def test_a_lent_block_is_refused_by_the_check(tmp_path, settings, code):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace('random_init("s")', "truncated(t, layers = [0, 1])").replace(
        "loss soft",
        "pass mixed = s(batch) {\n  replace layer[0] with t.layer[0]\n}\nloss lent = mse(mixed.logits <- t.logits)\nloss soft",
    )
    checked = check_path(spec(folder, text, placed(*settings), OBJECTIVE="soft + lent"))
    assert [d.code for d in checked.diagnostics.errors] == ([code] if code else [])
