"""What is known of the devices that training runs on, and how many threads a rank uses of a CPU."""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

# Dense 16-bit matrix peak in FLOP/s, from the makers' data sheets; the first name that is a
# whole word of the device's wins: an A10G is no A10, an RTX A1000 no A100.
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("L40S", 362e12),
    ("A100", 312e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
# Any of a CPU's own names for instructions that compute in a precision: x86's, then Arm's.
_CPU_INSTRUCTIONS = {
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
}
# The first compute capability of NVIDIA's whose matrix units take a precision.
_GPU_CAPABILITY = {"fp16": (7, 0), "bf16": (8, 0)}
_CPUINFO = Path("/proc/cpuinfo")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def this_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def copied_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU's memory on a device.

    A GPU takes it from pinned memory when its turn comes: a copy from other memory would wait until
    all that was asked of the GPU before is done, and the GPU then for what is asked next. Not tried
    on one yet.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_flops(device: torch.device) -> float | None:
    """A device's peak rate in 16-bit matrix products, FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: a GPU's tensors, or all of it on the CPU.

    What it says of a GPU has not been tried on one.

    Source: getrusage(2): `ru_maxrss` is in KiB, on macOS in bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def slow_precision(device: torch.device, precision: str, cpuinfo: Path = _CPUINFO) -> str | None:
    """Why a device is slow in `fp16` or `bf16` and what to ask for; None where it is not, or where
    that is not known.
    """
    if precision not in _CPU_INSTRUCTIONS:
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _GPU_CAPABILITY[precision]:
            return None
        name = torch.cuda.get_device_name(device)
        other = "fp16" if capability >= _GPU_CAPABILITY["fp16"] else "fp32"
        return f"{name} has no matrix units for {precision}: --precision {other} is faster here"
    if device.type != "cpu" or not cpuinfo.is_file():
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    if found is None or not _CPU_INSTRUCTIONS[precision].isdisjoint(found[1].split()):
        return None
    return f"this CPU has no {precision} instructions: --precision fp32 is many times faster here"


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """The cores that this process may run on, and no more than a container's share of time."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota, period = cpu_max.read_text().split() if cpu_max.is_file() else ("max", "1")
    return cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))


def threads_of_rank(environment: Mapping[str, str], cores: int) -> int | None:
    """A rank's share of this machine's cores; None where the user has set `OMP_NUM_THREADS`."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1")))
    asked = environment.get("OMP_NUM_THREADS")
    # torchrun sets 1 for several ranks where the user has set nothing.
    is_torchrun_s = asked == "1" and ranks > 1 and "TORCHELASTIC_RUN_ID" in environment
    return max(1, cores // ranks) if asked is None or is_torchrun_s else None


def set_threads() -> None:
    """Share this machine's cores among its ranks, unless the user has decided."""
    threads = threads_of_rank(os.environ, usable_cores())
    if threads is not None:
        torch.set_num_threads(threads)


def keep_memory(*, keep: bool = True) -> None:
    """Have this process use the memory of freed tensors again.

    glibc gives that of large ones back to the system, which fills it with zeros at its next use: a
    tenth of a training step on CPU. With another C library nothing is changed.

    Args:
        keep: False for glibc's own ways, as they are once large tensors have been freed.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if keep:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
    else:
        mallopt(_M_MMAP_MAX, 65_536)
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**26)
