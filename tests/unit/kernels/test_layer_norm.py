"""Layer normalisation's implementations against each other."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zerobert.kernels import dropout, layer_norm


def results_of(name: str, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(48, eps=1e-12)
    with torch.no_grad():
        norm.weight.add_(torch.randn(48))
        norm.bias.add_(torch.randn(48))
    x, residual, shares = torch.randn(3, 3, 5, 48).to(device)
    norm, x, residual = norm.to(device), x.requires_grad_(), residual.requires_grad_()
    alone = layer_norm.IMPLEMENTATIONS[name](x, norm)
    joined = layer_norm.IMPLEMENTATIONS[name](x, norm, residual)
    inputs = [x, residual, norm.weight, norm.bias]
    grads = torch.autograd.grad((alone * shares + joined * shares.square()).sum(), inputs)
    return [part.cpu() for part in (alone, joined, *grads)]


def test_torch_agrees_in_value_and_gradient() -> None:
    torch.testing.assert_close(results_of("torch", "cpu"), results_of("plain", "cpu"))


def test_a_branch_is_dropped_out_before_it_joins_the_residual() -> None:
    norm, (x, residual) = nn.LayerNorm(48), torch.randn(2, 3, 5, 48)
    torch.manual_seed(1)
    wanted = layer_norm.torch_native(residual + dropout.drop(x, 0.3), norm)
    for implementation in (layer_norm.torch_native, layer_norm.plain):
        torch.manual_seed(1)
        torch.testing.assert_close(implementation(x, norm, residual, 0.3), wanted)


@pytest.mark.gpu
def test_apex_agrees_on_a_gpu() -> None:
    if not torch.cuda.is_available() or layer_norm.APEX_KERNEL is None:
        pytest.skip("no CUDA device with NVIDIA's apex")
    torch.testing.assert_close(
        results_of("apex", "cuda"), results_of("plain", "cpu"), atol=1e-4, rtol=1e-4
    )


def test_16_bits_are_summed_in_32() -> None:
    norm = nn.LayerNorm(768).bfloat16()
    x = (torch.randn(4, 768) + 100).bfloat16()
    wanted = layer_norm.plain(x.float(), nn.LayerNorm(768))
    got = layer_norm.plain(x, norm)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, atol=0.02, rtol=0.02)


needs_triton = pytest.mark.skipif(not layer_norm.HAS_TRITON, reason="triton is not installed")


@needs_triton
def test_tritons_kernels_in_its_interpreter(repository: Path) -> None:
    tests = Path(__file__).with_name("test_layer_norm_triton.py")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout


@needs_triton
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("threshold", [0, 6554])
def test_tritons_kernels_compile_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str, threshold: int
) -> None:
    """The interpreter takes what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zerobert.kernels import layer_norm_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(layer_norm_triton, kernel)
    settings = layer_norm_triton._settings(768, threshold, torch.empty(0))
    num_warps = settings.pop("num_warps")
    is_fp32 = ("mean_ptr", "inverse_ptr", "weight_parts_ptr", "bias_parts_ptr")
    signature = dict.fromkeys(function.arg_names, "*bf16")
    signature |= dict.fromkeys(set(is_fp32) & signature.keys(), "*fp32")
    scalars = {"eps": "fp32", "num_rows": "i32", "seed": "i64"}
    signature |= {name: kind for name, kind in scalars.items() if name in signature}
    signature |= dict.fromkeys(settings, "constexpr")
    constants: dict[Any, Any] = {
        (function.arg_names.index(name),): value for name, value in settings.items()
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps},
    )
    assert "sm_90" in compiled.asm["ptx"]
