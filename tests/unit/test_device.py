"""What a device is good at, by its own name and instructions; how cores are shared among ranks."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zerobert.device import (
    copied_to,
    peak_flops,
    peak_memory_bytes,
    slow_precision,
    threads_of_rank,
    usable_cores,
)

CPU = torch.device("cpu")
FAULTS = """
import resource, sys, torch
from zerobert.device import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for _ in range(30):  # until the heap has room for it
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_tensor_is_copied_to_the_cpu() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    assert torch.equal(copied_to(CPU, tensor), tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_what_the_tensor_was_when_it_was_asked() -> None:
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    source = torch.arange(100_000)
    for _ in range(20):
        busy = busy @ busy.clamp(-1e-2, 1e-2)
    copied = copied_to(device, source)
    source.zero_()
    assert torch.equal(copied.cpu(), torch.arange(100_000))


def test_a_cpu_s_peak_is_not_known() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_a_cpu_s_memory_is_the_most_that_this_process_has_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # 64 MiB more than ever
    after = peak_memory_bytes(torch.device("cpu"))
    assert held.nbytes <= after < before + held.nbytes + 2**26
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= after


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_memory_is_the_most_that_its_tensors_have_held() -> None:
    before = peak_memory_bytes(torch.device("cuda"))
    held = torch.ones(before // 4 + 2**24, device="cuda")
    assert held.nbytes <= peak_memory_bytes(torch.device("cuda")) < before + held.nbytes + 2**26


# Flags of the real machines, cut down to what matters here.
HASWELL = "processor\t: 0\nflags\t\t: fpu sse2 f16c avx2 fma\n\nprocessor\t: 1\n"
COOPER_LAKE = "flags\t\t: avx2 avx512f avx512_bf16 avx512_vnni\n"
SAPPHIRE_RAPIDS = "flags\t\t: avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16\n"
NEOVERSE_N1 = "Features\t: fp asimd fphp asimdhp asimddp\n"
NEOVERSE_V1 = "Features\t: fp asimd fphp asimdhp sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        (HASWELL, {"fp16", "bf16"}),
        (COOPER_LAKE, {"fp16"}),
        (SAPPHIRE_RAPIDS, set()),
        (NEOVERSE_N1, {"bf16"}),
        (NEOVERSE_V1, set()),
        ("nothing that is known\n", set()),
    ],
)
def test_precisions_that_a_cpu_has_no_instructions_for(
    tmp_path: Path, cpuinfo: str, slow: set[str]
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    for precision in ("fp32", "bf16", "fp16"):
        line = slow_precision(CPU, precision, path)
        if precision in slow:
            assert line == (
                f"this CPU has no {precision} instructions: --precision fp32 is many times faster "
                "here"
            )
        else:
            assert line is None
    assert slow_precision(CPU, "bf16", tmp_path / "no file, as on macOS") is None


@pytest.mark.parametrize(
    ("capability", "precision", "other"),
    [
        ((6, 1), "fp16", "fp32"),
        ((6, 1), "bf16", "fp32"),
        ((7, 0), "fp16", None),
        ((7, 5), "bf16", "fp16"),
        ((8, 0), "bf16", None),
        ((9, 0), "bf16", None),
        ((6, 1), "fp32", None),
    ],
)
def test_precisions_that_a_gpu_has_no_units_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, other: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    wanted = f"Tesla T4 has no matrix units for {precision}: --precision {other} is faster here"
    assert slow_precision(torch.device("cuda"), precision) == (wanted if other else None)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 16),
        ({"LOCAL_SIZE": "2"}, 8),  # DeepSpeed's launcher
        ({"LOCAL_SIZE": "5"}, 3),
        ({"LOCAL_SIZE": "32"}, 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({**TORCHRUN, "OMP_NUM_THREADS": "1"}, 8),
        ({**TORCHRUN, "OMP_NUM_THREADS": "4"}, None),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, 16),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_threads_of_a_rank(environment: dict[str, str], threads: int | None) -> None:
    assert threads_of_rank(environment, 16) == threads


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000", 64), ("150000 100000", 1), ("20000 100000", 1)]
)
def test_a_container_s_share_of_time_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, most: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert usable_cores(tmp_path / "cpu.max") == most
    assert usable_cores(tmp_path / "none") == 64


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_memory_of_freed_tensors_is_used_again(repository: Path) -> None:
    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS, way]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    pages = 10 * 2**26 // resource.getpagesize()
    assert faults("keep") < pages / 10
    assert faults("as it is") > pages / 2  # or the line before tests nothing
