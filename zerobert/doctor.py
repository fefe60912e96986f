"""What this machine has, which kernel each op will use and why, what is missing and how to get it.

`bash launch.sh doctor`
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zerobert import compiled
from zerobert.errors import ArgumentParser, MissingDependencyError, run_script

_PACKAGES = ("torch", "deepspeed", "numpy", "h5py", "tokenizers", "safetensors", "wandb")
# What is not required, what it is for, and the command that installs it.
_OPTIONAL = {
    "datasets": ("fine-tuning on data from the hub", "pip install datasets"),
    "transformers": ("the tests that compare with Hugging Face", "pip install transformers"),
}
# What makes a GPU faster; without it torch's own kernels serve.
_ON_GPU = {
    "flash-attn": (
        "attention without padding",
        "pip install flash-attn --no-build-isolation",
    ),
    "apex": (
        "its layer norm; built from NVIDIA's source with nvcc, not from PyPI",
        "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
        "pip install -v --no-build-isolation ./apex",
    ),
}


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None if there is none; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required() -> list[str]:
    """The distributions that nothing works without; none where the project is not a clone."""
    try:
        text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return []
    block = text.partition("\ndependencies = [")[2].partition("]")[0]
    return re.findall(r'"([\w.-]+)', block)


def check_required(find_version: Callable[[str], str | None] = package_version) -> None:
    """Tell what is missing before anything is imported that needs it.

    Raises:
        MissingDependencyError: names all of it, and the command that installs it.
    """
    if lacking := [name for name in required() if find_version(name) is None]:
        names = " ".join(lacking)
        raise MissingDependencyError(
            f"{sys.executable} has no {', '.join(lacking)}: {sys.executable} -m pip install {names}"
        )


def machine() -> list[tuple[str, str]]:
    """Python, packages, cores, memory and devices."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [(name, package_version(name) or "missing") for name in _PACKAGES]
    rows += [("CPU cores", f"{cores}"), ("memory", _memory())]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch can use; everything runs on the CPU"))
    free = shutil.disk_usage(".").free / 2**30
    return [*rows, ("free disk here", f"{free:.0f} GiB")]


def advice(
    find_version: Callable[[str], str | None] = package_version, *, has_gpu: bool | None = None
) -> list[str]:
    """One line for each thing that is missing or that is not what it seems.

    Args:
        has_gpu: whether what speeds up GPUs is of use; by default what torch finds.
    """
    import torch

    is_served = torch.cuda.is_available() if has_gpu is None else has_gpu
    lines = [
        f"{name} is not installed (only for {purpose}): {command}"
        for name, (purpose, command) in {**_OPTIONAL, **(_ON_GPU if is_served else {})}.items()
        if find_version(name) is None
    ]
    if find_version("apex") is not None and not _is_nvidia_apex():
        lines.append(
            "the installed package apex is not NVIDIA's but an unrelated one of that name: "
            "pip uninstall apex"
        )
    elif find_version("apex") is not None and not find_spec("fused_layer_norm_cuda"):
        lines.append(
            "apex is installed without its CUDA extensions and serves nothing: "
            f"{_ON_GPU['apex'][1]}"
        )
    if not compiled.has_compiler():
        lines.append(
            "no C compiler on PATH (data preparation, and training on a CPU, take many times as "
            "long): apt-get install gcc"
        )
    if shutil.which("g++") is None:
        lines.append(
            "g++ is not on PATH (only for torch.compile and DeepSpeed's own CPU ops): "
            "apt-get install g++"
        )
    return lines


def _is_nvidia_apex() -> bool:
    """NVIDIA's apex has these two subpackages; looked up by file, so that nothing is imported."""
    files = importlib.metadata.files("apex") or []
    found = {part for path in files for part in path.parts[1:2]}
    return {"optimizers", "normalization"} <= found


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def main() -> int:
    """Print all of it."""
    parser = ArgumentParser(prog="bash launch.sh doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--required", action="store_true", help="only tell of what must be there")
    args = parser.parse_args()
    check_required()
    if args.required:
        return 0
    import torch

    from zerobert.config import BertConfig
    from zerobert.kernels import Kernels, choose, format_choices

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dropout_p = BertConfig().attention_probs_dropout_prob
    choices = choose(Kernels(), device, dtype, dropout_p=dropout_p)
    print("\n".join(f"{name:<15} {value}" for name, value in machine()))
    print()
    print(format_choices(choices.values()))
    print()
    print("\n".join(advice()) or "Nothing is missing.")
    return 0


if __name__ == "__main__":
    run_script(main)
