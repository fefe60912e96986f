"""Fast paths, each in its own file beside the plain-torch twin that a test holds it against.

`Kernels` is the JSON's `"kernels"` section: `auto` chooses by device and precision, a name insists.
What was chosen, and why, is printed at the start of a run and by `bash launch.sh doctor`.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from zerobert.errors import ConfigError, MissingDependencyError
from zerobert.kernels import attention, cross_entropy, gelu, lamb, layer_norm, native, trial
from zerobert.page import Table, format_table

_16_BITS = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation each op uses; none of them changes what is computed.

    Attributes:
        packing: leave padding out of all but attention, and out of that too where it can.
        activation_checkpointing: keep each layer's input only and compute the rest again in the
            backward pass: a third more time for a fraction of the memory.
        compile: hand the layers to torch.compile.
    """

    attention: Literal["auto", "plain", "sdpa", "flash", "varlen", "native"] = "auto"
    projections: Literal["auto", "separate", "fused"] = "auto"
    layer_norm: Literal["auto", "torch", "apex", "triton", "native"] = "auto"
    gelu: Literal["auto", "torch", "native"] = "auto"
    cross_entropy: Literal["auto", "plain", "chunked"] = "auto"
    lamb: Literal["auto", "plain", "blocked", "triton", "apex"] = "auto"
    packing: bool = True
    activation_checkpointing: bool = False
    compile: bool = False

    @property
    def num_shapes(self) -> int | None:
        """How many numbers of tokens packed batches may have; None where padding is computed."""
        from zerobert.packing import NUM_SHAPES  # which imports this package

        return NUM_SHAPES if self.packing else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation that an op uses, and why no other."""

    op: str
    chosen: str
    reason: str


def choose(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dropout_p: float,
    head_width: int = 64,
    hidden_size: int = 768,
) -> dict[str, Choice]:
    """What each op uses. On a GPU, kernels that torch does not vouch for are tried out first.

    Args:
        dtype: what the products are computed in.
        dropout_p: of the attention weights.

    Raises:
        ConfigError: an implementation is asked for that can't serve.
        MissingDependencyError: its package is missing.
    """
    choices = [
        _attention(kernels, device, dtype, dropout_p, head_width),
        _projections(kernels, device),
        _layer_norm(kernels, device, dtype, hidden_size),
        _gelu(kernels, device, dtype),
        _dropout(device),
        _cross_entropy(kernels, device, dtype),
        _lamb(kernels, device),
        Choice(
            op="padding",
            chosen="left out" if kernels.packing else "computed",
            reason="kernels.packing",
        ),
        Choice(
            op="torch.compile",
            chosen="layers" if kernels.compile else "off",
            reason="kernels.compile",
        ),
    ]
    return {choice.op: choice for choice in choices}


def format_choices(choices: Iterable[Choice]) -> str:
    """A table of what each op uses."""
    rows = [(choice.op, choice.chosen, choice.reason) for choice in choices]
    return format_table(Table(title="Kernels", header=("op", "used", "why"), rows=rows))


class Ops(NamedTuple):
    """The implementations that a model calls."""

    attend: attention.Attention
    fuses_projections: bool
    normalize: layer_norm.LayerNorm
    gelu: gelu.Gelu
    cross_entropy: cross_entropy.LinearCrossEntropy


@functools.cache
def select(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dropout_p: float,
    head_width: int,
    hidden_size: int,
) -> Ops:
    """The implementations themselves; see `choose`."""
    chosen = choose(
        *(kernels, device, dtype),
        dropout_p=dropout_p,
        head_width=head_width,
        hidden_size=hidden_size,
    )
    return Ops(
        attention.IMPLEMENTATIONS[chosen["attention"].chosen],
        chosen["projections"].chosen == "fused",
        layer_norm.IMPLEMENTATIONS[chosen["layer norm"].chosen],
        gelu.IMPLEMENTATIONS[chosen["GELU"].chosen],
        cross_entropy.IMPLEMENTATIONS[chosen["cross entropy"].chosen],
    )


_ASKED = "asked for in the configuration"


def _attention(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, dropout_p: float, head_width: int
) -> Choice:
    asked = kernels.attention
    if asked != "auto":
        refusal = asked in ("flash", "varlen", "native") and _packed_refusal(
            asked, kernels, device, dtype, dropout_p, head_width
        )
        if refusal:
            raise refusal
        return Choice(op="attention", chosen=asked, reason=_ASKED)
    reasons = []
    for name in ("flash", "varlen") if device.type == "cuda" else ("native",):
        refusal = _packed_refusal(name, kernels, device, dtype, dropout_p, head_width)
        if refusal is None:
            return Choice(op="attention", chosen=name, reason="fused, without padding")
        reasons.append(str(refusal))
    why_not = "; ".join(reasons)
    if device.type == "cuda":
        return Choice(op="attention", chosen="sdpa", reason=f"fused kernel; {why_not}")
    if dtype in _16_BITS:
        reason = f"faster than sdpa in 16 bits on CPU at short lengths; {why_not}"
        return Choice(op="attention", chosen="plain", reason=reason)
    if dropout_p > 0:
        reason = f"on CPU sdpa drops out value by value; sdpa in evaluation; {why_not}"
        return Choice(op="attention", chosen="plain", reason=reason)
    return Choice(op="attention", chosen="sdpa", reason=f"torch's fused CPU kernel; {why_not}")


def _packed_refusal(
    name: str,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    dropout_p: float,
    head_width: int,
) -> ConfigError | MissingDependencyError | None:
    """Why an implementation without padding can't serve."""
    where = f"kernels.attention {name!r}"
    if name == "native":
        refusal = _native_refusal(where, kernels, device, dtype)
        if refusal is not None:
            return refusal
    elif device.type != "cuda" or dtype not in _16_BITS:
        return ConfigError(f"{where} runs in bf16 and fp16 on CUDA only")
    if not kernels.packing:
        return ConfigError(f"{where} needs kernels.packing")
    if name == "flash" and attention.FLASH_KERNEL is None:
        return MissingDependencyError(
            f"{where} needs flash-attn: pip install flash-attn --no-build-isolation"
        )
    if name == "varlen" and attention.VARLEN_KERNEL is None:
        return MissingDependencyError(f"{where} needs a torch that has flash attention")
    if name != "native" and (
        failure := trial.attention_failure(name, device, dtype, head_width, dropout_p)
    ):
        return ConfigError(f"{where} {failure}")
    return None


def _native_refusal(
    where: str, kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> ConfigError | MissingDependencyError | None:
    """Why a kernel in C can't serve."""
    if device.type != "cpu" or dtype not in native.DTYPES:
        return ConfigError(f"{where} runs in fp32 and bf16 on CPU only")
    if kernels.compile:
        return ConfigError(f"{where} can't go with kernels.compile; choose one of them")
    if reason := native.refusal():
        return MissingDependencyError(
            f"{where} can't be built ({reason}); what it needs is a C compiler: apt-get install gcc"
        )
    return None


def _projections(kernels: Kernels, device: torch.device) -> Choice:
    """Of queries, keys and values: three products, or one of three times the width."""
    if kernels.projections != "auto":
        return Choice(op="projections", chosen=kernels.projections, reason=_ASKED)
    if device.type == "cpu":
        reason = "a wider product is no faster on CPU"
        return Choice(op="projections", chosen="separate", reason=reason)
    return Choice(op="projections", chosen="fused", reason="one kernel instead of three")


def _layer_norm(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, hidden_size: int
) -> Choice:
    has_apex = layer_norm.APEX_KERNEL is not None
    if kernels.layer_norm == "apex" and not (has_apex and device.type == "cuda"):
        raise MissingDependencyError(
            "kernels.layer_norm 'apex' needs NVIDIA's apex on CUDA; `bash launch.sh doctor` says "
            "how to build it"
        )
    if kernels.layer_norm == "triton":
        _check_triton(kernels, device)
    refusal = _native_refusal("kernels.layer_norm 'native'", kernels, device, dtype)
    if kernels.layer_norm == "native" and refusal is not None:
        raise refusal
    if (
        device.type == "cuda"
        and kernels.layer_norm in ("apex", "triton")
        and (failure := trial.layer_norm_failure(kernels.layer_norm, device, dtype, hidden_size))
    ):
        raise ConfigError(f"kernels.layer_norm {kernels.layer_norm!r} {failure}")
    if kernels.layer_norm != "auto":
        return Choice(op="layer norm", chosen=kernels.layer_norm, reason=_ASKED)
    if device.type == "cpu":
        if refusal is None:
            reason = "dropout and residual in the same pass"
            return Choice(op="layer norm", chosen="native", reason=reason)
        return Choice(op="layer norm", chosen="torch", reason=f"torch's own kernel; {refusal}")
    chosen, reason = "torch", "torch's own kernel"
    if has_apex:
        failure = trial.layer_norm_failure("apex", device, dtype, hidden_size)
        chosen, reason = (
            ("torch", f"{reason}; apex's {failure}") if failure else ("apex", "fused both ways")
        )
    reason += "; 'triton' would fuse dropout and residual too, but is not measured on a device yet"
    return Choice(op="layer norm", chosen=chosen, reason=reason)


def _check_triton(kernels: Kernels, device: torch.device) -> None:
    where = "kernels.layer_norm 'triton'"
    if kernels.compile:
        raise ConfigError(
            f"{where} can't go with kernels.compile, which fuses the same; choose one of them"
        )
    if not layer_norm.HAS_TRITON:
        raise MissingDependencyError(f"{where} needs triton: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{where} runs on CUDA only, or with TRITON_INTERPRET=1 slowly in Triton's interpreter"
        )


def _gelu(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Choice:
    refusal = _native_refusal("kernels.gelu 'native'", kernels, device, dtype)
    if kernels.gelu == "native" and refusal is not None:
        raise refusal
    if kernels.gelu != "auto":
        return Choice(op="GELU", chosen=kernels.gelu, reason=_ASKED)
    if refusal is None:
        return Choice(op="GELU", chosen="native", reason="bias in the same pass")
    reason = "torch's own kernel" + (f"; {refusal}" if device.type == "cpu" else "")
    return Choice(op="GELU", chosen="torch", reason=reason)


def _dropout(device: torch.device) -> Choice:
    if device.type == "cpu":
        reason = "four decisions from one random number, where bernoulli_ takes one each"
        return Choice(op="dropout", chosen="words", reason=reason)
    return Choice(op="dropout", chosen="torch", reason="fused with its mask")


def _cross_entropy(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Choice:
    if kernels.cross_entropy == "chunked" and dtype == torch.float16:
        raise ConfigError(
            "kernels.cross_entropy 'chunked' makes gradients before the loss is scaled, which fp16 "
            "can't hold; choose 'plain' or bf16"
        )
    if kernels.cross_entropy != "auto":
        return Choice(op="cross entropy", chosen=kernels.cross_entropy, reason=_ASKED)
    if device.type == "cuda" and dtype != torch.float16:
        return Choice(op="cross entropy", chosen="chunked", reason="never holds all logits")
    reason = "as fast as in chunks on CPU" if device.type == "cpu" else "fp16 needs the loss scale"
    return Choice(op="cross entropy", chosen="plain", reason=reason)


def _lamb(kernels: Kernels, device: torch.device) -> Choice:
    chosen, reason = lamb.choose(device, kernels.lamb)
    return Choice(op="LAMB", chosen=chosen, reason=reason)
