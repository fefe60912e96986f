"""A device's peak is that of its own name, not of one that it contains."""

import pytest
import torch

from zerobert.device import peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
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
