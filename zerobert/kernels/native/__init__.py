"""The kernels of a CPU in C, which share threads with torch: attention, layer norm and GELU.

They are built at their first use; `refusal` says why they can't serve where they can't. Tensors are
contiguous but where it is said, in fp32 or bf16, and on the CPU.
"""

import ctypes
import functools
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from zerobert import compiled

LIBRARY = compiled.Library(
    name="kernels",
    folder=Path(__file__).resolve().parent,
    sources=("attention.c", "gelu.c", "layer_norm.c"),
    # By the standard's letter a product and a sum would be two instructions.
    flags=("-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    is_for_this_cpu=True,
)
DTYPES = (torch.float32, torch.bfloat16)
# The gradients of weights and biases are added up in so many parts, whatever the threads.
_NUM_PARTS = 32
_MAPS = Path("/proc/self/maps")


class _AttentionShape(ctypes.Structure):
    """`Shape` of attention.c."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("threshold", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
    )


class _NormShape(ctypes.Structure):
    """`Shape` of layer_norm.c."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("has_bf16_weights", ctypes.c_int64),
        ("threshold", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("eps", ctypes.c_double),
    )


class _GeluShape(ctypes.Structure):
    """`Shape` of gelu.c."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("has_bf16_bias", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
    )


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    try:
        ctypes.CDLL(_openmp_of_torch(), ctypes.RTLD_GLOBAL)
        library = compiled.load(LIBRARY)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return compiled.reason(error)
    pointers = (ctypes.c_void_p,)
    shapes = {"attention": _AttentionShape, "layer_norm": _NormShape, "gelu": _GeluShape}
    counts = {"attention": (5, 8), "layer_norm": (9, 10), "gelu": (3, 5)}
    for name, shape in shapes.items():
        for way, count in zip(("forward", "backward"), counts[name], strict=True):
            function = getattr(library, f"{name}_{way}")
            function.argtypes = [ctypes.POINTER(shape), *pointers * count]
            function.restype = ctypes.c_int64
    return library


def _openmp_of_torch() -> str:
    """The library of threads that torch has loaded: a second one would fight it for the cores.

    Raises:
        OSError: there is none, or this is not Linux.
    """
    if sys.platform != "linux":
        raise OSError("compiled for Linux only")
    lines = _MAPS.read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line.rpartition("/")[2]}
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in paths if Path(path).name.startswith(names)]
    if not found:
        raise OSError("torch is built without OpenMP")
    torch_folder = str(Path(torch.__file__).parent)
    # scikit-learn's wheels bring one too.
    return max(found, key=lambda path: (path.startswith(torch_folder), path))


def refusal() -> str | None:
    """Why the compiled kernels can't serve on this machine; None where they can."""
    library = _library()
    return library if isinstance(library, str) else None


def _call(name: str, shape: ctypes.Structure, *tensors: Tensor | None) -> None:
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if not getattr(library, name)(ctypes.byref(shape), *addresses):
        raise MemoryError(f"no memory for {name}")


def attention_forward(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, starts: Tensor, longest: int, drop: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Mixed values TND, and for the way back the logarithms of the softmax's sums, TN in fp32.

    Args:
        q_TND, k_TND, v_TND: tokens may be further apart, by as much in all three.
        starts: int32 [rows + 1], each row's first token, and the last one's end.
        longest: tokens of a row, at most.
        drop: of 65,536 weights so many are dropped; and a seed.
    """
    shape = _attention_shape(q_TND, starts, longest, drop)
    out_TND = _over_rows(q_TND, starts)
    log_sums_TN = torch.empty(q_TND.shape[:2])
    _call("attention_forward", shape, q_TND, k_TND, v_TND, out_TND, log_sums_TN)
    return out_TND, log_sums_TN


def attention_backward(
    forward: tuple[Tensor, Tensor, Tensor, Tensor],
    starts: Tensor,
    longest: int,
    drop: tuple[int, int],
    out_grad_TND: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values.

    Args:
        forward: queries, keys, values, and the last of what `attention_forward` made of them.
    """
    shape = _attention_shape(forward[0], starts, longest, drop)
    q_grad, k_grad, v_grad = (_over_rows(forward[0], starts) for _ in range(3))
    _call("attention_backward", shape, *forward, out_grad_TND, q_grad, k_grad, v_grad)
    return q_grad, k_grad, v_grad


def _attention_shape(
    q_TND: Tensor, starts: Tensor, longest: int, drop: tuple[int, int]
) -> _AttentionShape:
    return _AttentionShape(
        starts.data_ptr(),
        len(starts) - 1,
        *q_TND.shape[1:],
        longest,
        q_TND.stride(0),
        q_TND.dtype == torch.bfloat16,
        *drop,
        torch.get_num_threads(),
    )


def _over_rows(like_TND: Tensor, starts: Tensor) -> Tensor:
    """A tensor for what is computed of rows; tokens that are in none have zeros."""
    out_TND = like_TND.new_empty(like_TND.shape)
    out_TND[int(starts[-1]) :] = 0
    return out_TND


def layer_norm_forward(
    branch_XH: Tensor,
    offset_H: Tensor | None,
    residual_XH: Tensor | None,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    drop: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised rows XH; what was normalised, XH, its means and the inverses of its standard
    deviations, X in fp32.

    Args:
        offset_H: added to the branch before values are dropped.
    """
    shape = _norm_shape(branch_XH, weight_H, eps, drop)
    is_sum = offset_H is not None or residual_XH is not None or drop[0] > 0
    sums_XH = torch.empty_like(branch_XH) if is_sum else None
    out_XH = torch.empty_like(branch_XH)
    means_X, inverses_X = torch.empty(2, *branch_XH.shape[:-1])
    inputs = (branch_XH, offset_H, residual_XH, weight_H, bias_H)
    _call("layer_norm_forward", shape, *inputs, sums_XH, out_XH, means_X, inverses_X)
    return out_XH, branch_XH if sums_XH is None else sums_XH, means_X, inverses_X


def layer_norm_backward(
    forward: tuple[Tensor, Tensor, Tensor],
    weight_H: Tensor,
    eps: float,
    drop: tuple[int, int],
    out_grad_XH: Tensor,
    *,
    has_offset: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of branch, offset, residual, weight and bias.

    Args:
        forward: the last three of what `layer_norm_forward` returned.
    """
    shape = _norm_shape(out_grad_XH, weight_H, eps, drop)
    sum_grad_XH = torch.empty_like(out_grad_XH) if has_residual or not drop[0] else None
    branch_grad_XH = torch.empty_like(out_grad_XH) if drop[0] else None
    parts = torch.empty(3 if has_offset else 2, _NUM_PARTS, len(weight_H))
    sums_XH, means_X, inverses_X = forward
    tensors = (out_grad_XH, sums_XH, weight_H, means_X, inverses_X, sum_grad_XH, branch_grad_XH)
    _call("layer_norm_backward", shape, *tensors, *parts, *(() if has_offset else (None,)))
    weight_grad_H, bias_grad_H, *offset_grad_H = parts.sum(1).to(weight_H.dtype)
    branch = sum_grad_XH if branch_grad_XH is None else branch_grad_XH
    assert branch is not None
    return (
        branch,
        offset_grad_H[0] if has_offset else None,
        sum_grad_XH if has_residual else None,
        weight_grad_H,
        bias_grad_H,
    )


def _norm_shape(like_XH: Tensor, weight_H: Tensor, eps: float, drop: tuple[int, int]) -> _NormShape:
    width = like_XH.shape[-1]
    return _NormShape(
        like_XH.numel() // width,
        width,
        like_XH.dtype == torch.bfloat16,
        weight_H.dtype == torch.bfloat16,
        *drop,
        _NUM_PARTS,
        torch.get_num_threads(),
        eps,
    )


def gelu_forward(wide_XI: Tensor, bias_I: Tensor) -> Tensor:
    """The GELU of values and a bias, XI."""
    out_XI = torch.empty_like(wide_XI)
    _call("gelu_forward", _gelu_shape(wide_XI, bias_I), wide_XI, bias_I, out_XI)
    return out_XI


def gelu_backward(wide_XI: Tensor, bias_I: Tensor, out_grad_XI: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of values and bias."""
    wide_grad_XI = torch.empty_like(wide_XI)
    parts = torch.empty(_NUM_PARTS, len(bias_I))
    tensors = (out_grad_XI, wide_XI, bias_I, wide_grad_XI, parts)
    _call("gelu_backward", _gelu_shape(wide_XI, bias_I), *tensors)
    return wide_grad_XI, parts.sum(0).to(bias_I.dtype)


def _gelu_shape(wide_XI: Tensor, bias_I: Tensor) -> _GeluShape:
    return _GeluShape(
        wide_XI.numel() // len(bias_I),
        len(bias_I),
        wide_XI.dtype == torch.bfloat16,
        bias_I.dtype == torch.bfloat16,
        _NUM_PARTS,
        torch.get_num_threads(),
    )
