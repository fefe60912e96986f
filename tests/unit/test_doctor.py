"""What the doctor says about packages; the machine itself is what it is."""

import importlib.metadata
from pathlib import PurePosixPath

import pytest

from zerobert import doctor
from zerobert.errors import MissingDependencyError


def test_nothing_to_say_about_optional_packages_that_are_there() -> None:
    lines = doctor.advice(lambda name: None if name == "apex" else "1.0", has_gpu=False)
    assert not [line for line in lines if "is not installed" in line or "apex" in line]


def test_what_is_missing_comes_with_its_command() -> None:
    lines = doctor.advice(lambda name: None)
    assert [line for line in lines if line.endswith("pip install datasets")]
    on_gpu = doctor.advice(lambda name: None, has_gpu=True)
    assert [line for line in on_gpu if "pip install flash-attn" in line]
    assert [line for line in on_gpu if "github.com/NVIDIA/apex" in line]
    assert not [line for line in doctor.advice(lambda name: None, has_gpu=False) if "apex" in line]


def test_a_machine_without_a_c_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("C compiler" in line for line in doctor.advice())
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "'")
    assert any("apt-get install gcc" in line for line in doctor.advice())


def test_an_apex_that_is_not_nvidias_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [PurePosixPath("apex/__init__.py"), PurePosixPath("apex/models.py")]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: foreign)
    assert any("pip uninstall apex" in line for line in doctor.advice(lambda name: "0.9"))
    nvidia = [PurePosixPath(f"apex/{name}/__init__.py") for name in ("optimizers", "normalization")]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: nvidia)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    assert not any("apex" in line for line in doctor.advice(lambda name: "0.1"))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (line,) = (line for line in doctor.advice(lambda name: "0.1") if "apex" in line)
    assert "without its CUDA extensions" in line
    assert "APEX_CUDA_EXT=1" in line


def test_the_machine_names_its_packages() -> None:
    rows = dict(doctor.machine())
    assert rows["torch"] == importlib.metadata.version("torch")
    assert "CPU cores" in rows


def test_what_must_be_there_is_told_with_the_command_that_installs_it() -> None:
    assert {"torch", "deepspeed", "h5py", "huggingface_hub"} <= set(doctor.required())
    doctor.check_required()
    there = {"torch": "2.13", "numpy": "2.0"}
    with pytest.raises(MissingDependencyError, match=r"has no deepspeed, .*pip install deepspeed "):
        doctor.check_required(there.get)
