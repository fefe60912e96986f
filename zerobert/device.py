"""What is known of the devices that training runs on."""

import re
import resource
import sys

import torch

# Dense 16-bit matrix peak in FLOP/s, from the makers' data sheets; the first name that is a
# whole word of the device's wins: an A10G is no A10, an RTX A1000 no A100.
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("L40S", 362e12),
    ("A100", 312e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


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
