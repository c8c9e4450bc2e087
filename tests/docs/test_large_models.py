"""The page on large models: its blocks check and run, its plans are the planner's, its messages are those that are said."""

from __future__ import annotations

import errno
import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from docs_blocks import ROOT, blocks_of
from typer.testing import CliRunner

from gkd_dsl.cli import launch
from gkd_dsl.cli.main import application
from gkd_dsl.diagnostics import catalogue
from gkd_dsl.meaning.check import check_path
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime import memory, processes
from gkd_dsl.runtime.backends.ddp import _device
from gkd_dsl.runtime.errors import RunError, writing
from gkd_dsl.runtime.program import Program
from gkd_dsl.runtime.teachers.cached import FillingTeachers

PAGE = ROOT / "docs" / "large-models.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [
    block
    for block in blocks_of(TEXT, "docs/large-models.md")
    if block.language == "gkd" and "\nruntime {" in f"\n{block.text}"
]
RUNTIMES = [block for block in blocks_of(TEXT, "docs/large-models.md") if block.text.startswith("runtime {")]

WORDS = [f"w{number}" for number in range(40)]
SPEC = """gkd 1
teacher t = hf("t")
student s = hf("s")
data corpus = csv("rows.csv", text = "text")
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
loss next = cross_entropy(s.logits, batch.labels)
stage main for 4 steps {
  minimize 0.9 * soft + 0.1 * next
  batch_size = 4
  accumulate = 2
  max_length = 16
  optim = adamw(lr = 1e-3, warmup = 1 step)
}
"""


@pytest.fixture(scope="module")
def large() -> Iterator[object]:
    sys.path.insert(0, str(ROOT / "docs"))
    yield importlib.import_module("pages_large_models")
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a student, small language models of one tokenizer, and a table."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("large")
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )
    for seed, (name, layers, width) in enumerate((("t", 3, 24), ("s", 2, 16))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=40, initializer_range=0.3,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [" ".join(WORDS[(7 * row + 3 * place) % 40] for place in range(3 + row % 9)) for row in range(36)]
    (folder / "rows.csv").write_text("text\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of its own, which is the working folder."""
    for name in ("t", "s", "rows.csv"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.setenv("GKD_CACHE", str(models / "tokens"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(runtime: str, text: str = SPEC) -> str:
    Path("spec.gkd").write_text(f"{text}\n{runtime}\n")
    return "spec.gkd"


def gkd(*words: str, code: int = 1) -> str:
    """What a command says, that ends with this code."""
    result = CliRunner().invoke(application(), list(words))
    assert result.exit_code == code, result.output
    return result.output


def run(runtime: str = "", text: str = SPEC, code: int = 1) -> str:
    return gkd("run", write(runtime, text), "--offline", "--out", "out", code=code)


# The blocks


def test_there_are_blocks_for_each_step() -> None:
    found = " ".join(block.text for block in RUNTIMES)
    for words in ("device = cpu", "precision = bf16", "checkpoint = true", "placement = offload", "placement = disk",
                  "placement = cached", "backend = ddp", "backend = gemini"):  # fmt: skip
        assert words in found


def test_the_spec_is_that_of_the_example() -> None:
    (spec,) = (block.text for block in blocks_of(TEXT, "page") if block.text.startswith("gkd 1\n"))
    code = [line for line in (ROOT / "examples/large/distil.gkd").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(code)
    assert spec.split() == text[: text.index("\nruntime {")].split()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("teacher", ["10b", "405b"])
def test_a_block_checks_with_the_example(block, teacher, large) -> None:
    with large.example(block.text) as spec:
        assert [d.message for d in check_path(spec, params={"teacher": teacher}).diagnostics] == []


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_blocks_that_a_cpu_can_run_give_the_same_losses(world: Path) -> None:
    """Local, ddp of one, checkpointing, streamed, from disk and stored: one run, to the rounding of bf16."""
    found = {}
    for number, block in enumerate(RUNTIMES):
        if "gemini" in block.text:
            continue
        spec = write(block.text)
        if "placement = cached" in block.text:
            gkd("cache", spec, "--offline", code=0)
        gkd("run", spec, "--offline", "--out", f"out{number}", code=0)
        found[str(block)] = losses(Path(f"out{number}"))
    assert len(found) >= 6
    first = next(iter(found.values()))
    assert len(first) == 4
    for name, values in found.items():
        assert values == pytest.approx(first, rel=2e-2), name


def test_what_a_streaming_run_stored_serves_the_next(world: Path) -> None:
    text = SPEC.replace("for 4 steps", "for 2 epochs").replace("warmup = 1 step", "warmup = 10%")
    spec = write("runtime {\n  teacher t {\n    placement = offload\n    cache = auto\n  }\n}", text)
    gkd("run", spec, "--offline", "--out", "runs/spec", code=0)
    spec = write('runtime {\n  teacher t {\n    placement = cached\n    cache = "runs/spec/teachers/t"\n  }\n}', text)
    gkd("run", spec, "--offline", "--out", "again", code=0)
    assert losses(Path("again")) == losses(Path("runs/spec"))


# Plans and tables


def test_plans_and_tables_are_not_stale(large) -> None:
    assert large.pages()[large.PAGE] == TEXT, "run `python docs/generate.py large-models`"
    assert TEXT.count("<!-- plan of the block above: ") >= 6
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", TEXT)) == set(large.TABLES)


def test_a_quoted_plan_is_that_of_the_command(large) -> None:
    found = re.search(
        r"<!-- plan of the block above: ([^\n]*) -->\n```text\n\$ gkd plan distil.gkd \1\n(.*?)^```", TEXT, re.M | re.S
    )
    runtime = [block for block in RUNTIMES if block.line < TEXT[: found.start()].count("\n")][-1]
    with large.example(runtime.text) as spec:
        code = "import sys; from gkd_dsl.cli.main import main; main(sys.argv[1:])"
        said = subprocess.run(
            [sys.executable, "-c", code, "plan", "distil.gkd", *found[1].split()], cwd=spec.parent,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    assert found[2] == said


def test_a_plan_needs_a_block_above(large) -> None:
    with pytest.raises(ValueError, match="no runtime block stands above"):
        large.written("<!-- plan of the block above: --devices 1 -->\n```text\n```\n")


def test_every_cell_fits_its_machine(large) -> None:
    for machine in (large.EIGHT, large.ONE):
        for teacher in large.TEACHERS:
            for place in large.places():
                found = large.fastest(teacher, machine, place)
                assert found is None or found[1].fits(machine)
                if place == "cached":
                    assert found is not None
                    assert found[0].placed("t") == "cached"
    assert large.fastest("405b", large.ONE, "resident") is None


def test_bytes_of_the_link_by_hand(large) -> None:
    """Every weight inside the blocks of a Llama, two bytes each or four, and two operations a weight and token."""
    for teacher in ("10b", "70b"):
        config = json.loads((ROOT / "examples" / "large" / teacher / "config.json").read_text())
        width, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
        matrices = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
        moved, flops, tokens = large.streamed(teacher)
        # Two vectors of norms in a block stay in fp32.
        each = moved / matrices
        assert each == pytest.approx(2, rel=1e-3) or each == pytest.approx(4, rel=1e-3)
        head = 2 * tokens * config["vocab_size"] * width
        # Attention over 2,048 tokens comes on top.
        assert 1.0 < (flops - head) / (2 * tokens * matrices) < 1.1


def test_bytes_of_stored_logits_are_those_on_the_disk(world: Path, large) -> None:
    write('runtime {\n  teacher t {\n    placement = cached\n    cache = "few"\n    top_k = 5\n  }\n}')
    gkd("cache", "spec.gkd", "--offline", code=0)
    from safetensors.torch import load_file

    shard = load_file(next(Path("few").rglob("shard-*")))
    tokens = int(shard.pop("lengths").sum())
    shard.pop("rows")
    assert sum(value.nbytes for value in shard.values()) == tokens * large.top_bytes("10b", 5)


def test_tokens_of_the_example(large) -> None:
    assert large.tokens_of_the_example() == 1000 * 65_536
    assert "65,536 tokens" in TEXT


def test_the_size_of_logits(large) -> None:
    assert in_bytes(16_384 * 128_256 * 4) == "7.8 GiB"
    assert "The logits of 16,384 tokens over 128,256 words are 7.8 GiB" in TEXT


# Messages


def rows() -> list[tuple[str, str]]:
    """The messages of the tables at the end, with their codes."""
    tables = TEXT[TEXT.index("## Messages, and what to do") :]
    found = []
    for line in tables.splitlines():
        cell = re.match(r"\| (?:`` (.*?) ``|`([^`]*)`)(?: \[([EW]\d+)\]\(\S+\))? \|", line)
        if cell:
            found.append((cell[1] or cell[2], cell[3] or ""))
    return found


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(r"\S.*?".join(re.escape(part) for part in message.split("...")), re.S)


def in_block(*lines: str) -> str:
    return "runtime {\n" + "\n".join(lines) + "\n}"


def teacher(*lines: str) -> str:
    return in_block("teacher t {", *lines, "}")


def stored(folder: str = "kept") -> str:
    return teacher("placement = cached", f'cache = "{folder}"')


def kept() -> Path:
    """Store the teacher's outputs; the folder with the shards."""
    gkd("cache", write(stored()), "--offline", code=0)
    return next(Path("kept").rglob("manifest.json")).parent


def no_memory(monkeypatch) -> str:
    """A step finds no memory, on a machine for which the plan is too large."""

    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "this_machine", lambda: Machine(1, 500_000, 500_000, kind="cpu"))
    monkeypatch.setattr(Program, "run", full)
    return run(in_block("device = cpu"))


def no_memory_in_cache(monkeypatch) -> str:
    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FillingTeachers, "fill", full)
    return gkd("cache", write(stored()), "--offline")


def killed(monkeypatch) -> str:
    def start(arguments, rank, count, port):
        code = "import os, time; os.kill(os.getpid(), 9)" if rank else "import time; time.sleep(60)"
        return launch._Child(rank, subprocess.Popen([sys.executable, "-c", code]), None)

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "_GRACE", 0.1)
    return gkd("run", write(""), "--offline", "--processes", "2")


def other_cache(monkeypatch) -> str:
    kept()
    return run(stored(), SPEC.replace("max_length = 16", "max_length = 8"))


def cut_short(monkeypatch) -> str:
    shard = next(kept().glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return run(stored())


def damaged(monkeypatch) -> str:
    shard = next(kept().glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return run(stored())


def row_missing(monkeypatch) -> str:
    place = kept() / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["shards"] = []
    place.write_text(json.dumps(manifest))
    return run(stored())


def stored_twice(monkeypatch) -> str:
    kept()
    return gkd("cache", "spec.gkd", "--offline")


def no_files(monkeypatch) -> str:
    Path("t").unlink()
    Path("t").mkdir()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = next(Path("s").resolve().parent.glob("t"))
    torch.save(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).state_dict(), "t/pytorch_model.bin")
    AutoConfig.from_pretrained(source).save_pretrained("t")
    AutoTokenizer.from_pretrained(source).save_pretrained("t")
    return run(teacher("placement = disk"))


def without(monkeypatch, module: str, said: Callable[[object], str]) -> str:
    monkeypatch.setitem(sys.modules, module, None)
    return said(monkeypatch)


def variables(monkeypatch, **given: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def port_taken(monkeypatch) -> str:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        variables(
            monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1])
        )
        return run()


def alone(monkeypatch) -> str:
    variables(monkeypatch, WORLD_SIZE="2")
    return run()


def no_gpu_left(monkeypatch) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RunError) as raised:
        _device(torch.device("cuda"), processes.Processes(5, 8, 5))
    return f"error[{raised.value.code}]: {raised.value.message}"


def odd_batch(monkeypatch) -> str:
    plain = processes.Processes(0, 3)
    monkeypatch.setattr(processes.Processes, "here", classmethod(lambda cls: plain))
    monkeypatch.setattr(processes.Processes, "join", lambda self, device: None)
    for name in ("any", "told", "sum", "wait"):
        monkeypatch.setattr(processes.Processes, name, lambda self, value=None: value)
    return run(in_block("backend = ddp", "device = cpu"))


def gone(monkeypatch) -> str:
    from gkd_dsl.runtime.rows import collective

    with pytest.raises(RunError) as raised, collective():
        raise RuntimeError("Connection closed by peer")
    return f"error[{raised.value.code}]: {raised.value.message}"


def not_finite(monkeypatch) -> str:
    from safetensors.torch import load_file, save_file

    place = Path("s").resolve()
    Path("s").unlink()
    shutil.copytree(place, "s")
    weights = load_file("s/model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + float("nan")
    save_file(weights, "s/model.safetensors", metadata={"format": "pt"})
    return run()


def bad_gradient(monkeypatch) -> str:
    from gkd_dsl.runtime.backends.local import LocalBackend

    monkeypatch.setattr(LocalBackend, "_term_at_fault", lambda self, out: "soft")
    return run(text=SPEC.replace("minimize", "minimize 1e30 * soft + 1e30 *"))


def other_spec(monkeypatch) -> str:
    run(code=0)
    write("", SPEC.replace("0.9 * soft", "0.8 * soft"))
    return gkd("run", "spec.gkd", "--offline", "--out", "out", "--resume")


def taken_folder(monkeypatch) -> str:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("x")
    return run()


def disk_full(monkeypatch) -> str:
    with pytest.raises(RunError) as raised, writing("the checkpoint", Path("x")):
        raise OSError(errno.ENOSPC, "No space left on device")
    return f"error[{raised.value.code}]: {raised.value.message}"


def vocabularies(monkeypatch) -> str:
    config = json.loads((Path("s") / "config.json").read_text())
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    return gkd("check", write("", SPEC.replace('hf("t")', 'hf("other")')))


def check(runtime: str, text: str = SPEC) -> Callable[[object], str]:
    return lambda monkeypatch: gkd("check", write(runtime, text))


def ran(runtime: str, text: str = SPEC) -> Callable[[object], str]:
    return lambda monkeypatch: run(runtime, text)


def planned(*words: str) -> Callable[[object], str]:
    return lambda monkeypatch: gkd("plan", write(""), *words, code=0)


TRAINED = SPEC.replace(
    "  minimize 0.9 * soft + 0.1 * next", "  train t\n  minimize cross_entropy(t.logits, batch.labels)"
)
ADAPTED = SPEC.replace('hf("s")', 'hf("s") { adapter = lora(r = 2) }')
PROVOKED: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "too little memory for": no_memory,
    "too little memory to": no_memory_in_cache,
    "does not fit": planned("--device-memory", "100KiB"),
    "No change": planned("--device-memory", "10KiB"),
    "SIGKILL": killed,
    "cannot be stored": check(stored(), TRAINED),
    "no folder holds": check(teacher("placement = cached")),
    "has another place": check(teacher("placement = offload", 'cache = "kept"')),
    "cannot be streamed": check(teacher("placement = offload"), TRAINED),
    "no safetensors": no_files,
    "is made here": ran(teacher("placement = disk"), SPEC.replace('hf("t")', 'random_init("t")')),
    "cannot be fused": check(in_block("fuse_logits = on"), SPEC.replace("kl(", "mse(").replace(", temperature = 2.0", "")),
    "is quantised": check(teacher("placement = offload"), SPEC.replace('hf("t")', 'hf("t") { quantize = torchao("int8_weight_only") }')),
    "needs the library": lambda patch: without(patch, "peft", check("", ADAPTED)),
    "has no LoRA": check(in_block("backend = gemini"), ADAPTED),
    "in Gemini's chunks": check(teacher("placement = gemini")),
    "vocabularies": vocabularies,
    "no stored teacher": ran(stored()),
    "of another run": other_cache,
    "holds a stored": stored_twice,
    "the manifest says": cut_short,
    "is damaged": damaged,
    " rows": row_missing,
    "needs ColossalAI": lambda patch: without(patch, "colossalai", ran(in_block("backend = gemini"))),
    "masters in fp32": check(in_block("backend = gemini", "precision = fp32")),
    "a loss scale": check(in_block("precision = fp16")),
    "AdamW alone": check(in_block("backend = gemini"), SPEC.replace("adamw(lr = 1e-3, warmup = 1 step)", "sgd(lr = 1e-3)")),
    "inside a step": check(
        in_block("backend = gemini"),
        SPEC.replace("stage main", "loss g = mse(gradient(soft, at = s.hidden[1]) <- gradient(next, at = s.hidden[1]))\nstage main")
        .replace("0.1 * next", "0.1 * g"),
    ),
    "is a setting of": check(in_block("offload_optim_frac = 1.0")),
    "no GPU here": ran(in_block("device = cuda")),
    "micro-batches of": odd_batch,
    "has no GPU": no_gpu_left,
    "WORLD_SIZE is set": alone,
    "cannot meet": port_taken,
    "has ended": gone,
    "loss `": not_finite,
    "the gradient of": bad_gradient,
    "is there already": taken_folder,
    "of another spec": other_spec,
    "the disk is full": disk_full,
}  # fmt: skip
# Said where ColossalAI is installed and sees no GPU.
ELSEWHERE = {"`backend = gemini` needs a GPU, and there is none": "runtime/backends/gemini.py"}


@pytest.mark.parametrize("key", PROVOKED)
def test_a_message_is_in_the_table(key: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if key == "no GPU here" and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = PROVOKED[key](monkeypatch)
    assert "Traceback" not in said
    found = [(message, code) for message, code in rows() if key in message and pattern(message).search(said)]
    assert found, said
    for _, code in found[:1]:
        assert not code or f"error[{code}]" in said


def test_every_message_of_the_table_is_provoked() -> None:
    missing = [
        message for message, _ in rows() if message not in ELSEWHERE and not any(key in message for key in PROVOKED)
    ]
    assert missing == []
    assert len(rows()) >= len(PROVOKED)
    for message, file in ELSEWHERE.items():
        assert message in [found for found, _ in rows()]
        assert message in (ROOT / file).read_text()


def test_codes_of_the_table() -> None:
    for _, code in rows():
        assert not code or code in catalogue.codes()
