"""Runs that others published, and what the model of cost says of them; it was fitted on none.

Source: NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md, "Training performance
results" of the DGX A100 80 GB and of the DGX-1 with 32 GB; DeepSpeed,
docs/_tutorials/bert-pretraining.md.
"""

import dataclasses

from pretrain.cost import DEEPSPEED_2020, GPUS, NVIDIA_2020, Gpu, Run, time_step
from zerobert.config import BertConfig

# What DeepSpeed's tutorial trained on: 403 M sequences of 128 and "18-22M" of 512.
_DEEPSPEED_SAMPLES = {128: 403e6, 512: 20e6}
_DEEPSPEED_BATCHES = {128: 65536, 512: 32768}
_PREDICTIONS = {128: 20, 512: 80}
_LARGE = BertConfig.from_size({"size": "large", "vocab_size": 30528}, "large")
# NVIDIA's V100s are of a DGX-1: eight GPUs a machine.
_DGX1 = dataclasses.replace(GPUS["v100"], per_machine=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A run that somebody published, and the model's figures for it.

    Attributes:
        unit: of the three figures.
        roofline: what the model says at an efficiency of 1.
        planned: what it says at the efficiency that a plan reckons with.
    """

    who: str
    what: str
    unit: str
    published: float
    roofline: float
    planned: float

    @property
    def errors(self) -> tuple[float, float]:
        """How much more the roofline and the plan say; of a time, how much less."""
        if self.unit == "h":
            return self.published / self.roofline - 1, self.published / self.planned - 1
        return self.roofline / self.published - 1, self.planned / self.published - 1


def published_runs() -> list[Published]:
    """Every figure of the two sources that was at hand, none left out."""
    a100, v100 = ("NVIDIA, A100", GPUS["a100"]), ("NVIDIA, V100", _DGX1)
    rates = [
        _nvidia(*a100, length, num_gpus, precision, figure)
        for length, num_gpus, precision, figure in (
            (128, 1, "fp16", 580.0),
            (128, 8, "fp16", 4591.0),
            (128, 256, "fp16", 138_294.0),
            (512, 1, "fp16", 210.0),
            (512, 8, "fp16", 1657.0),
            (128, 1, "tf32", 317.0),
            (512, 1, "tf32", 110.0),
        )
    ]
    rates += [
        _nvidia(*v100, length, num_gpus, "fp16", figure)
        for length, num_gpus, figure in (
            (128, 1, 224.0),
            (128, 8, 1746.0),
            (512, 1, 75.0),
            (512, 8, 586.0),
        )
    ]
    for length, figure in ((128, 272.0), (512, 52.0)):
        what = f"{length} on 1"
        rates.append(_rate("DeepSpeed, V100", what, figure, _deepspeed(1, length)))
    times = ((16, 33 + 13 / 60), (64, 8 + 41 / 60), (256, 144 / 60), (1024, 44 / 60))
    return rates + [_training(num_gpus, hours) for num_gpus, hours in times]


def _nvidia(
    who: str, gpu: Gpu, length: int, num_gpus: int, precision: str, figure: float
) -> Published:
    # A step's sequences: on one machine some thousands a GPU, on 256 GPUs NVIDIA's phase 1.
    each = 8192 if length == 128 else 4096
    run = Run(
        model=_LARGE,
        gpu=gpu,
        num_gpus=num_gpus,
        global_samples=min(65536, each * num_gpus),
        seq_length=length,
        max_predictions=_PREDICTIONS[length],
        stage=0,
        precision=precision,
        kernels=NVIDIA_2020,
    )
    name = f"{length} on {num_gpus}" + (", TF32" if precision == "tf32" else "")
    return _rate(who, name, figure, run)


def _deepspeed(num_gpus: int, length: int) -> Run:
    return Run(
        model=_LARGE,
        gpu=GPUS["v100"],
        num_gpus=num_gpus,
        global_samples=_DEEPSPEED_BATCHES[length],
        seq_length=length,
        max_predictions=_PREDICTIONS[length],
        stage=0,
        kernels=DEEPSPEED_2020,
    )


def _seconds(run: Run, efficiency: float) -> float:
    """A step of it; micro-batches change nothing, for no message is hidden behind one."""
    return time_step(dataclasses.replace(run, efficiency=efficiency), micro_samples=8).seconds


def _rate(who: str, what: str, figure: float, run: Run) -> Published:
    roofline, planned = (run.global_samples / _seconds(run, x) for x in (1.0, run.efficiency))
    return Published(
        who=who,
        what=what,
        unit="sequences/s",
        published=figure,
        roofline=roofline,
        planned=planned,
    )


def _training(num_gpus: int, figure: float) -> Published:
    """DeepSpeed's whole training, of which it published the hours."""

    def hours(efficiency: float | None) -> float:
        phases = {length: _deepspeed(num_gpus, length) for length in _DEEPSPEED_SAMPLES}
        return sum(
            _DEEPSPEED_SAMPLES[length]
            / run.global_samples
            * _seconds(run, run.efficiency if efficiency is None else efficiency)
            / 3600
            for length, run in phases.items()
        )

    return Published(
        who="DeepSpeed, V100",
        what=f"all of it on {num_gpus:,}",
        unit="h",
        published=figure,
        roofline=hours(1.0),
        planned=hours(None),
    )
