"""Which implementation serves where, and what is refused."""

import pytest
import torch

from zerobert.errors import ConfigError, MissingDependencyError
from zerobert.kernels import (
    Kernels,
    attention,
    choose,
    format_choices,
    layer_norm,
    native,
    trial,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(kernels: Kernels, device: torch.device, dtype: torch.dtype, p: float) -> dict[str, str]:
    found = choose(kernels, device, dtype, dropout_p=p)
    return {op: choice.chosen for op, choice in found.items()}


def test_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "refusal", lambda: None)
    training = chosen(Kernels(), CPU, torch.float32, 0.1)
    assert training == {
        "attention": "native",
        "projections": "separate",
        "layer norm": "native",
        "GELU": "native",
        "dropout": "words",
        "cross entropy": "plain",
        "LAMB": "blocked",
        "padding": "left out",
        "torch.compile": "off",
    }
    assert chosen(Kernels(), CPU, torch.bfloat16, 0.0)["attention"] == "native"
    assert chosen(Kernels(packing=False), CPU, torch.float32, 0.1)["attention"] == "plain"
    assert chosen(Kernels(packing=False), CPU, torch.float32, 0.0)["attention"] == "sdpa"
    assert chosen(Kernels(packing=False), CPU, torch.float32, 0.1)["layer norm"] == "native"
    for kernels, dtype in ((Kernels(compile=True), torch.float32), (Kernels(), torch.float16)):
        found = chosen(kernels, CPU, dtype, 0.1)
        assert (found["attention"], found["layer norm"], found["GELU"]) == ("plain", *["torch"] * 2)


def test_on_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "refusal", lambda: "there is no C compiler")
    assert chosen(Kernels(), CPU, torch.float32, 0.1)["layer norm"] == "torch"
    assert chosen(Kernels(), CPU, torch.float32, 0.1)["attention"] == "plain"
    assert chosen(Kernels(), CPU, torch.float32, 0.0)["attention"] == "sdpa"
    assert chosen(Kernels(), CPU, torch.bfloat16, 0.0)["attention"] == "plain"
    for asked in (
        Kernels(attention="native"),
        Kernels(layer_norm="native"),
        Kernels(gelu="native"),
    ):
        with pytest.raises(MissingDependencyError, match=r"there is no C compiler.*apt-get"):
            choose(asked, CPU, torch.float32, dropout_p=0.1)


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What trials on a GPU find, by the kernel's name; nothing, where a test says nothing else."""
    failures: dict[str, str] = {}
    for name in ("attention_failure", "layer_norm_failure"):
        monkeypatch.setattr(trial, name, lambda kernel, *_: failures.get(kernel))
    return failures


def test_on_cuda_it_depends_on_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, trials: dict[str, str]
) -> None:
    trials["varlen"] = "differs from the plain one"
    monkeypatch.setattr(attention, "FLASH_KERNEL", None)
    monkeypatch.setattr(attention, "VARLEN_KERNEL", object())
    monkeypatch.setattr(layer_norm, "APEX_KERNEL", None)
    found = choose(Kernels(), CUDA, torch.bfloat16, dropout_p=0.1)
    assert found["attention"].chosen == "sdpa"
    assert "pip install flash-attn" in found["attention"].reason
    assert "differs" in found["attention"].reason
    assert found["cross entropy"].chosen == "chunked"
    assert found["projections"].chosen == "fused"
    assert chosen(Kernels(), CUDA, torch.float16, 0.1)["cross entropy"] == "plain"
    del trials["varlen"]
    assert chosen(Kernels(), CUDA, torch.bfloat16, 0.1)["attention"] == "varlen"
    monkeypatch.setattr(attention, "FLASH_KERNEL", object())
    monkeypatch.setattr(layer_norm, "APEX_KERNEL", object())
    everything = chosen(Kernels(), CUDA, torch.bfloat16, 0.1)
    assert (everything["attention"], everything["layer norm"]) == ("flash", "apex")
    assert chosen(Kernels(packing=False), CUDA, torch.bfloat16, 0.1)["attention"] == "sdpa"
    assert chosen(Kernels(), CUDA, torch.float32, 0.1)["attention"] == "sdpa"


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "error", "message"),
    [
        (Kernels(attention="flash"), CPU, torch.bfloat16, ConfigError, "on CUDA only"),
        (
            *(Kernels(attention="varlen", packing=False), CUDA, torch.bfloat16),
            *(ConfigError, r"needs kernels\.packing"),
        ),
        (Kernels(layer_norm="apex"), CPU, torch.float32, MissingDependencyError, "apex"),
        (Kernels(layer_norm="triton"), CPU, torch.float32, ConfigError, "TRITON_INTERPRET=1"),
        (
            *(Kernels(layer_norm="triton", compile=True), CUDA, torch.bfloat16),
            *(ConfigError, r"can't go with kernels\.compile"),
        ),
        (Kernels(cross_entropy="chunked"), CUDA, torch.float16, ConfigError, "loss is scaled"),
        (Kernels(attention="native"), CUDA, torch.float32, ConfigError, "on CPU only"),
        (Kernels(layer_norm="native"), CPU, torch.float16, ConfigError, "fp32 and bf16"),
        (Kernels(gelu="native"), CUDA, torch.float32, ConfigError, "on CPU only"),
        (
            *(Kernels(layer_norm="native", compile=True), CPU, torch.float32),
            *(ConfigError, r"can't go with kernels\.compile"),
        ),
        (
            *(Kernels(attention="native", packing=False), CPU, torch.float32),
            *(ConfigError, r"needs kernels\.packing"),
        ),
    ],
)
def test_what_cannot_serve_is_refused_by_name(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_norm, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        choose(kernels, device, dtype, dropout_p=0.1)


def test_a_kernel_that_fails_its_trial_is_not_used(
    monkeypatch: pytest.MonkeyPatch, trials: dict[str, str]
) -> None:
    for module, name in ((attention, "FLASH_KERNEL"), (layer_norm, "APEX_KERNEL")):
        monkeypatch.setattr(module, name, object())
    monkeypatch.setattr(layer_norm, "HAS_TRITON", True)
    trials.update(flash="fails on this device", varlen="fails", apex="differs", triton="differs")
    found = choose(Kernels(), CUDA, torch.bfloat16, dropout_p=0.1)
    assert (found["attention"].chosen, found["layer norm"].chosen) == ("sdpa", "torch")
    assert "kernels.attention 'flash' fails on this device" in found["attention"].reason
    assert "apex's differs" in found["layer norm"].reason
    for asked in (Kernels(attention="flash"), Kernels(layer_norm="triton")):
        with pytest.raises(ConfigError, match=r"fails on this device|differs"):
            choose(asked, CUDA, torch.bfloat16, dropout_p=0.1)


def test_tritons_layer_norm_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Kernels(layer_norm="triton")
    monkeypatch.setattr(layer_norm, "HAS_TRITON", True)
    assert chosen(asked, CUDA, torch.bfloat16, 0.1)["layer norm"] == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen(asked, CPU, torch.float32, 0.1)["layer norm"] == "triton"
    auto = choose(Kernels(), CUDA, torch.bfloat16, dropout_p=0.1)["layer norm"]
    assert auto.chosen != "triton"
    assert "not measured on a device yet" in auto.reason
    monkeypatch.setattr(layer_norm, "HAS_TRITON", False)
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        choose(asked, CUDA, torch.bfloat16, dropout_p=0.1)


def test_the_table_names_every_op() -> None:
    choices = choose(Kernels(), CPU, torch.float32, dropout_p=0.1)
    shown = format_choices(choices.values())
    assert all(op in shown for op in choices)
