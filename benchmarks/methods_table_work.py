"""The work of the methods table, each piece of it a task for a worker process: a teacher, or a method with a seed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import methods_table_data as data
import methods_table_specs as specs
import torch
import transformers
from methods_table_specs import BASELINE, Made, Settings

import gkd_dsl
from gkd_dsl import library
from gkd_dsl.diagnostics import SpecError
from gkd_dsl.diagnostics.render import render_text
from gkd_dsl.models.locate import locate
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.session import Outcome

TEACHERS = ("teacher", "second", "small", "language")


def begin(threads: int) -> None:
    """Set a worker process up."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["KINETO_LOG_LEVEL"] = "99"  # The profiler that counts memory announces itself.
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("gkd_dsl").setLevel(logging.ERROR)
    torch.set_num_threads(threads)


def start(settings: Settings, work: Path) -> None:
    """The encoder as the student starts from it: without the pooler, which a language model has not either.

    So the students of all methods start equal: blocks of the encoder, a new pooler and a new head, drawn by the seed.
    """
    folder, stamp = work / "models" / "start", work / "models" / "encoder"
    if (folder / "config.json").is_file() and stamp.is_file() and stamp.read_text() == settings.encoder:
        return
    place = locate(settings.encoder, offline=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_pretrained(place, dtype=torch.float32)
    _save(model, place, folder)
    stamp.write_text(settings.encoder)


def _save(model: transformers.PreTrainedModel, place: Path, folder: Path) -> None:
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    model.save_pretrained(making)
    transformers.AutoTokenizer.from_pretrained(place).save_pretrained(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def train_teacher(settings: Settings, work: Path, what: str, seed: int) -> dict[str, Any]:
    """Train a teacher into `models/<seed>/<what>`; its accuracy, and its predictions beside it."""
    folder = work / "models" / str(seed) / what
    about = folder / "about.json"
    key = settings.key()
    if about.is_file() and json.loads(about.read_text())["key"] == key:
        return json.loads(about.read_text())
    started = time.perf_counter()
    scratch = work / "teachers" / f"{what}-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    spec = specs.teacher(settings, what, seed, scratch)
    outcome = gkd_dsl.load(spec).run(out=scratch / "run", measure=False)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"teacher": what, "seed": seed, "key": key}
    if what != "language":
        texts, labels = data.held_out(work / "data")
        said = data.predictions(*_loaded(outcome, "t"), texts, settings.max_length)
        found |= {"accuracy": data.share(said, labels), "predictions": said}
    else:
        _student_language(settings, work, outcome, seed)
    shutil.copytree(outcome.exports["t"], folder)
    found["loss"] = _last_loss(scratch / "run")
    found["seconds"] = time.perf_counter() - started
    about.write_text(json.dumps(found))
    shutil.rmtree(scratch / "run" / "checkpoints", ignore_errors=True)
    shutil.rmtree(scratch / "run" / "export", ignore_errors=True)
    return found


def _student_language(settings: Settings, work: Path, outcome: Outcome, seed: int) -> None:
    """The student's start as a language model: the encoder, which has no such head, with the head of the teacher."""
    assert outcome.result is not None
    teacher = outcome.result.models["t"]
    place = locate(settings.encoder, offline=True)
    model = transformers.AutoModelForMaskedLM.from_pretrained(place, dtype=torch.float32)
    body = f"{model.base_model_prefix}."
    tied = {value.data_ptr() for value in model.base_model.state_dict().values()}
    own = model.state_dict()
    with torch.no_grad():
        for name, value in teacher.state_dict().items():
            if not name.startswith(body) and own[name].data_ptr() not in tied:
                own[name].copy_(value)
    _save(model, place, work / "models" / str(seed) / "start")


def _loaded(outcome: Outcome, name: str) -> tuple[Any, Any]:
    """A model of a finished run, and its tokenizer."""
    assert outcome.result is not None
    return outcome.result.models[name], transformers.AutoTokenizer.from_pretrained(outcome.exports[name])


def key_of(settings: Settings, name: str, weights: str = "") -> str:
    """What a stored row depends on, but for the code: settings, data, the method's file, and arguments to it."""
    text = library.method_text(name) if name != BASELINE else ""
    return hashlib.sha256(f"{settings.key()}/{text}{weights}".encode()).hexdigest()[:16]


def made(settings: Settings, work: Path, name: str, seed: int, weights: str | None = None) -> Made:
    """The spec of a method or of the baseline, in the folder of its run; one that is given `weights`, in its own."""
    folder = work / "runs" / f"{name.replace(' ', '_')}-{seed}"
    if weights is not None:
        folder = folder.with_name(f"{folder.name}-{key_of(settings, name, weights)}")
    if name == BASELINE:
        return specs.baseline(settings, seed, folder)
    return specs.method(settings, name, seed, folder, weights=weights or "")


def run_method(
    settings: Settings, work: Path, name: str, seed: int, key: str, weights: str | None = None
) -> dict[str, Any]:
    """Run a method with a seed, and measure its student. What goes wrong is in the row, as `error`."""
    row: dict[str, Any] = {"method": name, "seed": seed, "key": key}
    started = time.perf_counter()
    try:
        spec = made(settings, work, name, seed, weights)
        outcome = _run(spec.path, key)
        texts, labels = data.held_out(work / "data")
        said = data.predictions(*_loaded(outcome, "s"), texts, settings.max_length)
        loss = _last_loss(spec.path.parent / "run")
        if not all(math.isfinite(value) for value in loss.values()):
            raise ValueError(f"a loss is not finite: {loss}")
        teacher = json.loads((work / "models" / str(seed) / "teacher" / "about.json").read_text())
        row |= {
            "accuracy": data.share(said, labels),
            "agreement": data.share(said, teacher["predictions"]),
            "stages": [{"name": each.name, "steps": each.steps, "student": each.student} for each in spec.stages],
            "loss": loss,
        }
        for part in ("checkpoints", "export", "tensorboard"):
            shutil.rmtree(spec.path.parent / "run" / part, ignore_errors=True)
    except SpecError as error:
        row["error"] = render_text(error.diagnostics, color=False)
    except Exception as error:  # a row that fails is reported with the others, and does not end them
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = time.perf_counter() - started
    return row


def _run(path: Path, key: str) -> Outcome:
    """Run a spec, or go on with a run of it that was ended."""
    folder, stamp = path.parent / "run", path.parent / "key"
    spec = gkd_dsl.load(path)
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == key:
        try:
            return spec.run(out=folder, resume=True, measure=False)
        except RunError:
            pass  # It ended before it could be gone on with, or was finished and emptied.
    shutil.rmtree(folder, ignore_errors=True)
    stamp.write_text(key)
    return spec.run(out=folder, measure=False)


def _last_loss(folder: Path) -> Mapping[str, float]:
    """The loss of the last step of each stage."""
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record and "stage" in record:
            found[record["stage"]] = float(record["loss"])
    return found
