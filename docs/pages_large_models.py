"""The plans and tables of the page on large models: from the planner, the configs of `examples/large/`, the results.

The page is written by hand but for two kinds of blocks: the text below `<!-- plan of the block above: ... -->`, which
`gkd plan` prints for the example with the runtime block that stands above, and what is between `<!-- table: NAME -->`
and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from gkd_dsl.cli.main import application
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.graph.stored import temperatures
from gkd_dsl.meaning.check import check_path
from gkd_dsl.meaning.settings import PLACEMENT
from gkd_dsl.planning import search
from gkd_dsl.planning.estimate import StageEstimate, estimate
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.units import in_bytes, in_seconds

DOCS = Path(__file__).resolve().parent
LARGE = DOCS.parent / "examples" / "large"
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = "large-models.md"

TEACHERS = ("10b", "70b", "110b", "405b")
EIGHT = Machine(8, 40 * 2**30, 512 * 2**30, between=200e9)
ONE = Machine(1, 80 * 2**30, 512 * 2**30)
# What `gkd cache` keeps of logits over a large vocabulary where nothing else is said.
_TOP_K = 64
_DEVICES = {"cpu": "the CPU", "cuda": "a GPU"}

_PLAN = re.compile(r"(<!-- plan of the block above: ([^\n]*?) -->\n```text\n).*?(^```$)", re.M | re.S)
_OF_MODEL = r"(?:(?:teacher t|student s) = [^\n]*\{\n.*?^\}\n\n?)?"
_BLOCK = re.compile(rf"^```gkd\n({_OF_MODEL}runtime \{{\n.*?^\}}\n)```$", re.M | re.S)
_MODELS = ("teacher t = hf(teacher)\n", 'student s = hf("student")\n')
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(^<!-- end -->$)", re.M | re.S)


def pages() -> dict[str, str]:
    """The page with its plans and tables as they are today."""
    return {PAGE: written((DOCS / PAGE).read_text(encoding="utf-8"))}


def written(text: str) -> str:
    """A page with its plans and tables written anew. Raises ValueError for a plan without a runtime block above it."""

    def plan(found: re.Match[str]) -> str:
        above = _BLOCK.findall(text[: found.start()])
        if not above:
            raise ValueError(f"no runtime block stands above the plan of {found[2]}")
        return f"{found[1]}{planned(above[-1], found[2])}{found[3]}"

    text = _PLAN.sub(plan, text)
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


@cache
def planned(block: str, options: str) -> str:
    """What `gkd plan distil.gkd` prints with these options, for the example with another runtime block."""
    with example(block) as spec:
        result = CliRunner().invoke(application("plan"), ["plan", str(spec), *shlex.split(options)])
        if result.exit_code:
            raise RuntimeError(f"gkd plan {options} ended with {result.exit_code}: {result.output}")
        return f"$ gkd plan distil.gkd {options}\n" + result.stdout.replace(str(spec), spec.name)


@contextmanager
def example(block: str) -> Iterator[Path]:
    """The path of `examples/large/distil.gkd` with another runtime block, beside the configs that it names.

    A declaration of a model before the runtime block stands in for the example's.
    """
    text = (LARGE / "distil.gkd").read_text(encoding="utf-8")
    text = text[: text.index("\nruntime {")]
    model, _, runtime = block.rpartition("runtime {")
    for written in _MODELS if model else ():
        if model.startswith(written.partition(" = ")[0]):
            text = text.replace(written, model)
    with tempfile.TemporaryDirectory() as folder:
        for config in LARGE.glob("*/config.json"):
            (Path(folder) / config.parent.name).symlink_to(config.parent, target_is_directory=True)
        spec = Path(folder) / "distil.gkd"
        spec.write_text(f"{text}\nruntime {{{runtime}", encoding="utf-8")
        yield spec


@cache
def plan_of(teacher: str) -> SpecPlan:
    """The plan of the example with one of its teachers."""
    checked = check_path(LARGE / "distil.gkd", params={"teacher": teacher})
    if not checked.ok:
        raise RuntimeError(f"{LARGE / 'distil.gkd'} does not check")
    return compile_plan(checked.graph, runtime=checked.runtime)


def places() -> list[str]:
    """The placements of a teacher that this version runs, in the order of the table."""
    return [word for word in PLACEMENT["placement"].words if word not in PLACEMENT["placement"].later]


@cache
def fastest(teacher: str, machine: Machine, place: str) -> tuple[Setup, StageEstimate] | None:
    """The fastest setting that fits with the teacher placed so, by the least time of a step; None where none fits."""
    plan = plan_of(teacher)
    current = Setup.of(plan)
    options = [
        setup
        for backend in search._backends(plan, machine, current)
        if place != "gemini" or backend.backend == "gemini"
        for placed in _shares(backend.placing(["t"], place), place)
        for setup in search._smaller(plan, machine, placed)
    ]
    for _, setup in search._ordered(plan, machine, current, options):
        (stage,) = estimate(plan, machine, setup)
        if stage.fits(machine):
            return setup, stage
    return None


def _shares(setup: Setup, place: str) -> list[Setup]:
    """A teacher in chunks is on the devices, or in host memory."""
    return [setup.offloading(["t"], share) for share in (0.0, 1.0)] if place == "gemini" else [setup]


def least(teacher: str, machine: Machine, place: str) -> StageEstimate:
    """What is needed with the teacher placed so where the student is as small as settings make it."""
    plan = plan_of(teacher)
    backend = "gemini" if machine.devices > 1 or place == "gemini" else "local"
    setup = Setup(backend, half=True, checkpoint=True, offload_optim_frac=1.0 if backend == "gemini" else 0.0)
    (stage,) = estimate(plan, machine, setup.placing(["t"], place))
    return stage


def fits(machine: Machine) -> str:
    """A table: teachers, where each may live, and what a step then needs."""
    found = places()
    lines = [f"| teacher | {' | '.join(f'`{place}`' for place in found)} |", f"| --- |{' --- |' * len(found)}"]
    for teacher in TEACHERS:
        cells = [_fit(teacher, machine, place) for place in found]
        lines.append(f"| {teacher.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fit(teacher: str, machine: Machine, place: str) -> str:
    best = fastest(teacher, machine, place)
    if best is None:
        stage = least(teacher, machine, place)
        if stage.device_bytes > machine.device_memory:
            return f"no: {in_bytes(stage.device_bytes)} a device"
        return f"no: {in_bytes(stage.host_bytes)} of the host"
    setup, stage = best
    host = f", host {in_bytes(stage.host_bytes)}" if stage.host_bytes else ""
    return f"**{in_seconds(stage.work.seconds(machine))}**, {setup.backend}, {in_bytes(stage.device_bytes)}{host}"


def link() -> str:
    """A table: what streaming each teacher moves in a forward, and how many tokens hide it."""
    lines = [
        "| teacher | moved in a forward | at 25 GB/s | at 50 GB/s | arithmetic of 16,384 tokens | tokens that hide it |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for teacher in TEACHERS:
        moved, flops, tokens = streamed(teacher)
        seconds = flops * 16384 / tokens / ONE.compute
        hidden = moved / ONE.link / (flops / tokens / ONE.compute)
        cells = [in_bytes(moved), in_seconds(moved / 25e9), in_seconds(moved / 50e9), in_seconds(seconds)]
        lines.append(f"| {teacher.upper()} | {' | '.join(cells)} | {round(hidden, -2):,.0f} |")
    return "\n".join(lines)


def streamed(teacher: str) -> tuple[float, float, int]:
    """Bytes over the link in one forward of a streamed teacher, its operations, and the tokens of these."""
    setup = Setup(half=True, placement=(("t", "offload"),))
    (stage,) = estimate(plan_of(teacher), ONE, setup)
    moved = dict(stage.work.link)["t weights"] / stage.micro
    return moved, dict(stage.work.flops)["t"] / stage.micro, stage.rows * stage.length


def epochs() -> str:
    """A table: least seconds of a step with the teacher run in it and with its outputs read, for both machines."""
    lines = ["| teacher | machine | a step with the teacher | a step from the cache | an epoch takes |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for teacher in TEACHERS:
        for name, machine in (("8 x 40 GiB", EIGHT), ("1 x 80 GiB", ONE)):
            live = [found for place in places() if place != "cached" and (found := fastest(teacher, machine, place))]
            stored = fastest(teacher, machine, "cached")
            if not live or stored is None:
                continue
            slow = min(stage.work.seconds(machine) for _, stage in live)
            fast = stored[1].work.seconds(machine)
            cells = [teacher.upper(), name, in_seconds(slow), in_seconds(fast), f"1/{slow / fast:,.0f} of the time"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def disk() -> str:
    """A table: bytes a token of what `gkd cache` stores, and in all for the tokens of the example."""
    lines = [
        "| stored of a teacher | bytes a token | 10B | 70B | 110B | 405B |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    total = tokens_of_the_example()
    for what, text, size in _KEPT:
        each = [size(teacher) * total for teacher in TEACHERS]
        lines.append(f"| {what} | {text} | {' | '.join(in_bytes(count) for count in each)} |")
    return "\n".join(lines)


def tokens_of_the_example() -> int:
    """Tokens of all steps of the example, every text at its full length."""
    (stage,) = plan_of(TEACHERS[0]).stages
    node = stage.stage
    assert node.duration.unit == "steps"
    return round(node.duration.amount) * node.batch_size * node.accumulate * int(node.max_length or 0)


def _size(teacher: str, name: str) -> int:
    nodes = {node.name: node for node in plan_of(teacher).stages[0].models}
    return int(nodes["t"].info.size(name) or 0)


def top_bytes(teacher: str, count: int = _TOP_K) -> int:
    """Bytes a token of the largest logits: value and id of each, and the mass of the others at each temperature."""
    (stage,) = plan_of(teacher).stages
    return 8 * count + 4 * len(temperatures(stage, "t"))


_KEPT: tuple[tuple[str, str, Callable[[str], int]], ...] = (
    (f"the {_TOP_K} largest logits, with the mass of the others", "8 k and 4 a temperature", top_bytes),
    ("all logits (`top_k = 0`)", "4 V", lambda teacher: 4 * _size(teacher, "V")),
    ("one hidden state", "2 H", lambda teacher: 2 * _size(teacher, "H")),
)


def measured_cache() -> str:
    """What the benchmark of cached teachers found."""
    data = json.loads((RESULTS / "cached_teacher.json").read_text(encoding="utf-8"))
    found = data["data"]
    ratio = found["ratio"]
    return (
        f"Measured on {data['machine']['cores']} cores of a CPU with BERT shapes, 12 layers of 768 into 4 of 312: an "
        f"epoch from the cache took {ratio['median']:.2f} of one with the teacher in memory (quartiles "
        f"{ratio['q1']:.2f} to {ratio['q3']:.2f}), reading and checksums included; stored were "
        f"{found['bytes'] / found['rows'] / 2**10:.0f} KiB a text of 128 tokens, and no loss of the first epoch "
        f"differed by more than {max(found['loss_difference'].values()):.0e} of it "
        "([all of it](benchmarks.md#epochs-from-stored-outputs))."
    )


def measured_plans() -> str:
    """How planned memory stands to measured memory, in every result that there is."""
    found = []
    for path in sorted(RESULTS.glob("plan_accuracy*.json")):
        if path.stem.endswith("-quick"):
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        ratios = [row["ratio"] for row in data["data"]]
        where = "under Gemini" if "gemini" in path.stem else f"on {_DEVICES[data['settings']['device']]}"
        found.append(f"{min(ratios):.2f} to {max(ratios):.2f} of what was counted over {len(ratios)} specs {where}")
    return f"Planned memory was {'; '.join(found)} ([the tables](benchmarks.md#planned-memory-beside-measured-memory))."


def measured_fused() -> str:
    """Memory and time of fused losses beside the plain form, from the benchmarks."""
    lines = [
        "| tokens, vocabulary, width | loss | plain | fused | memory | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    whole = json.loads((RESULTS / "fused_logits.json").read_text(encoding="utf-8"))["data"]
    stored = json.loads((RESULTS / "fused_stored.json").read_text(encoding="utf-8"))["data"]
    shapes = [(found["shape"], found["runs"], "naive", "") for found in whole["shapes"]]
    shapes.append((stored["shape"], stored["runs"], "plain", f", {stored['top_k']} logits stored"))
    for (tokens, vocabulary, width), runs, other, words in shapes:
        for loss in ("kl", "jsd"):
            plain, ours = (runs.get(f"{who}/{loss}") for who in (other, "ours"))
            if not plain or not ours:
                continue
            peaks = [max(run["peak"] for run in runs) for runs in (plain, ours)]
            times = [_middle([t for run in runs for t in run["times"]]) for runs in (plain, ours)]
            lines.append(
                f"| {tokens:,}, {vocabulary:,}, {width:,} | `{loss}`{words} | {in_bytes(peaks[0])} "
                f"| {in_bytes(peaks[1])} | {peaks[1] / peaks[0]:.2f} | {times[1] / times[0]:.2f} |"
            )
    return "\n".join(lines)


def _middle(values: list[float]) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


TABLES: dict[str, Callable[[], str]] = {
    "fits-eight": lambda: fits(EIGHT),
    "fits-one": lambda: fits(ONE),
    "link": link,
    "epochs": epochs,
    "disk": disk,
    "measured-cache": measured_cache,
    "measured-plans": measured_plans,
    "measured-fused": measured_fused,
}
