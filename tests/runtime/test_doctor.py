"""The doctor finds what is there, and says what to do about what is not."""

import importlib.metadata as metadata
import shutil
from collections import namedtuple

import pytest
import torch

from gkd_dsl.runtime import doctor
from gkd_dsl.runtime.doctor import Finding, diagnose


def named(name):
    return next(finding for finding in diagnose() if finding.name == name)


def test_a_sound_machine():
    findings = diagnose()
    names = [finding.name for finding in findings]
    for name in (
        "python",
        "torch",
        "transformers",
        "datasets",
        "lark",
        "bf16",
        "disk space",
        "hub cache",
        "colossalai",
    ):
        assert names.count(name) == 1
    assert all(isinstance(finding, Finding) and finding.detail for finding in findings)
    assert all(finding.ok or finding.fix for finding in findings)
    assert next(finding for finding in findings if finding.name == "torch").ok
    assert torch.__version__ in named("torch").detail


@pytest.mark.parametrize(
    ("version", "detail", "fix"),
    [
        ("4.1.0", "4.1.0 (<6,>=5.0)", 'pip install "transformers<6,>=5.0"'),
        (None, "not installed, <6,>=5.0 is needed", "pip install"),
    ],
)
def test_versions_out_of_range(monkeypatch, version, detail, fix):
    real = metadata.version

    def other(name):
        if name != "transformers":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", other)
    found = named("transformers")
    assert not found.ok
    assert found.detail == detail
    assert fix in found.fix


def test_a_full_disk_and_folders_that_cannot_be_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5_000_000))
    found = named("disk space")
    assert not found.ok
    assert found.detail == "0.0 GB free here"

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = named("working folder")
    assert not found.ok
    assert "Permission denied" in found.detail
    assert not named("hub cache").ok


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("GKD_CACHE", str(blocked))
    found = named("data cache")
    assert not found.ok
    assert "GKD_CACHE" in found.fix
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "fine"))
    assert named("data cache") == Finding("data cache", True, str(tmp_path / "fine" / "data"))


def test_offline_mode_and_threads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in named("offline mode").detail
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    found = named("cpu threads")
    assert not found.ok
    assert "OMP_NUM_THREADS=" in found.fix


def test_a_look_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    found = named("devices")
    assert not found.ok
    assert "driver too old" in found.detail
    assert named("disk space")


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert named("gpu 0").detail == "Some GPU, 1.0 of 2.0 GiB free"
    assert "emulated" in named("bf16").detail


def test_a_gpu_that_this_torch_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert named("gpu") == Finding("gpu", True, "none is seen; runs go on the CPU")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = named("gpu")
    assert not found.ok
    assert "built without CUDA" in found.detail
    assert "install a CUDA build" in found.fix
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert named("gpu").ok
    assert "runs go on the CPU" in named("gpu").detail


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 12))
    found = doctor._python()[0]
    assert not found.ok
    assert "3.11" in found.fix


@pytest.mark.parametrize(
    ("version", "there", "ok", "detail", "fix"),
    [
        (None, (), True, "not installed; optional", None),
        ("0.5.0", ("psutil", "accelerate", "peft", "einops"), False, "galore_torch, bitsandbytes missing",
         "pip install --no-deps galore_torch bitsandbytes"),
        ("0.4.9", doctor._BESIDE, False, "0.4.9; 0.5.0 is what was tried", "pip install --no-deps colossalai==0.5.0"),
        ("0.5.0", doctor._BESIDE, True, "0.5.0, for the gemini backend", None),
    ],
)  # fmt: skip
def test_colossalai_and_what_it_needs(monkeypatch, version, there, ok, detail, fix):
    from gkd_dsl.runtime.backends import gemini

    known = {*there, *(("colossalai",) if version else ())}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name in known else None)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    monkeypatch.setattr(gemini, "kernels", lambda: "some kernel")
    found = doctor._colossalai()
    assert (found[0].ok, found[0].fix) == (ok, fix)
    assert detail in found[0].detail
    assert (Finding("gemini's AdamW", True, "some kernel") in found) == bool(version and there == doctor._BESIDE)
