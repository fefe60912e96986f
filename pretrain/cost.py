"""What a pretraining step takes on GPUs that are not at hand: time, memory, and what limits it.

Nothing is simulated: operations, bytes and messages are counted and divided by rates. Each rate is
a data sheet's, times a share of it. docs/scaling.md writes the model down, says where the shares
come from and holds it against published runs.

Symbols: S sequence, H hidden, N heads, P predictions, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pretrain import footprint
from zerobert.config import BertConfig
from zerobert.errors import ConfigError
from zerobert.model import training_flops_per_sequence

# Of the peak, in products of BERT's own shapes. Not measured at them: one H100 ran products of
# 8192 x 8192 x 8192 at 798 TFLOP/s of 989 and copies at 3.0 TB/s of 3.35, and the roofline of these
# two bounds base 128, base 512, large 128 and large 512 at 6,350, 1,520, 2,040 and 490 sequences/s.
# Beside the traffic counted here that leaves 0.63, 0.63, 0.65 and 0.66 to the products.
MATMUL_SHARE = 0.64
BANDWIDTH_SHARE = 0.90
# The share of that roofline that a training reaches. 0.85 is the goal of 5,400, 1,290, 1,730 and
# 420 sequences/s that was set for one H100, no measurement: put a measured one in its place.
EFFICIENCY = 0.85
# Not measured: what NCCL reaches of a link's rate in large messages.
LINK_SHARE = 0.80
# Of a device's memory; allocators round up and fragment, libraries and NCCL hold some.
USABLE_MEMORY = 0.9
# What products are computed in. tf32 is fp32 whose products round their factors to 10 bits.
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in its maker's server.

    Attributes:
        matrix_flops: dense 16-bit peak, FLOP/s.
        tf32_flops: dense peak in TF32; None without matrix units for it, nor for bf16.
        fp32_flops: peak in fp32 proper, which is what torch computes in unless told otherwise.
        memory_bytes, bandwidth: of the device, bytes and bytes/s.
        per_machine: GPUs of a machine.
        link: bytes/s each way between a GPU and the others of its machine.
        machine_link: bytes/s each way of all network adapters of a machine.
    """

    matrix_flops: float
    tf32_flops: float | None
    fp32_flops: float
    memory_bytes: float
    bandwidth: float
    per_machine: int
    link: float
    machine_link: float


# Source: NVIDIA's data sheets of the DGX-2, DGX A100 80 GB, DGX H100, DGX H200 and DGX B200.
GPUS = {
    "v100": Gpu(
        matrix_flops=125e12,
        tf32_flops=None,
        fp32_flops=15.7e12,
        memory_bytes=32e9,
        bandwidth=0.9e12,
        per_machine=16,
        link=150e9,
        machine_link=100e9,
    ),
    "a100": Gpu(
        matrix_flops=312e12,
        tf32_flops=156e12,
        fp32_flops=19.5e12,
        memory_bytes=80e9,
        bandwidth=2.039e12,
        per_machine=8,
        link=300e9,
        machine_link=200e9,
    ),
    "h100": Gpu(
        matrix_flops=989e12,
        tf32_flops=494.5e12,
        fp32_flops=67e12,
        memory_bytes=80e9,
        bandwidth=3.35e12,
        per_machine=8,
        link=450e9,
        machine_link=400e9,
    ),
    "h200": Gpu(
        matrix_flops=989e12,
        tf32_flops=494.5e12,
        fp32_flops=67e12,
        memory_bytes=141e9,
        bandwidth=4.8e12,
        per_machine=8,
        link=450e9,
        machine_link=400e9,
    ),
    "b200": Gpu(
        matrix_flops=2250e12,
        tf32_flops=1125e12,
        fp32_flops=75e12,
        memory_bytes=180e9,
        bandwidth=8.0e12,
        per_machine=8,
        link=900e9,
        machine_link=400e9,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """How much a layer reads and writes beside its matrix products, forward and backward.

    Attributes:
        widths: values a token, in units of H.
        scores: values of each of the N x S attention scores of a token.
    """

    widths: float
    scores: float


# Counted from what each op reads and writes; docs/scaling.md has the counts.
ZEROBERT = Kernels(widths=54, scores=0)
DEEPSPEED_2020 = Kernels(widths=54, scores=14)
NVIDIA_2020 = Kernels(widths=76, scores=18.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training on some GPUs.

    Attributes:
        num_gpus: in all.
        global_samples: sequences an optimizer step.
        precision: one of `PRECISIONS`.
        is_autocast: weights and gradients are kept and sent in fp32, products are in 16 bits.
        efficiency: the share of the GPU's roofline that is reached.
        fill: the share of tokens that are no padding; what is left out is not computed.
        optimizer: `Lamb` or `AdamW`.
        overlaps: gradients are sent while the backward pass goes on.
        zero: the JSON's `zero_optimization`, for the size of DeepSpeed's buffers.
    """

    model: BertConfig
    gpu: Gpu
    num_gpus: int
    global_samples: int
    seq_length: int
    max_predictions: int
    stage: int
    precision: str = "fp16"
    is_autocast: bool = False
    efficiency: float = EFFICIENCY
    optimizer: str = "Lamb"
    fill: float = 1.0
    overlaps: bool = False
    zero: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_checkpointed: bool = False
    kernels: Kernels = ZEROBERT

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def weights(self) -> str:
        """What weights are kept in, and they and the gradients sent."""
        return "fp32" if self.is_autocast or self.width == 4 else self.precision

    @property
    def peak_flops(self) -> float:
        """The data sheet's rate of products in the run's precision.

        Raises:
            ConfigError: the GPU has no units for it.
        """
        if self.precision in ("tf32", "bf16") and self.gpu.tf32_flops is None:
            raise ConfigError(
                f"--gpu: this one has no matrix units for {self.precision}; choose --precision "
                "fp16 or fp32, or another GPU"
            )
        tf32 = self.gpu.tf32_flops or 0.0
        rates = {"fp32": self.gpu.fp32_flops, "tf32": tf32}
        return rates.get(self.precision, self.gpu.matrix_flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step of a run, in seconds; `communication_s` is what nothing hides."""

    micro_samples: int
    accumulation_steps: int
    matmul_s: float
    memory_s: float
    optimizer_s: float
    communication_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matmul_s + self.memory_s + self.optimizer_s + self.communication_s

    @property
    def limit(self) -> str:
        """What the step is longest at."""
        parts = {
            "matrix products": self.matmul_s,
            "memory traffic": self.memory_s,
            "the optimizer": self.optimizer_s,
            "communication": self.communication_s,
        }
        return max(parts, key=lambda name: parts[name])


def num_parameters(model: BertConfig) -> int:
    """With the heads of pretraining, the decoder tied."""
    H, I = model.hidden_size, model.intermediate_size  # noqa: E741
    tables = model.vocab_size + model.max_position_embeddings + model.type_vocab_size
    layer = 4 * (H * H + H) + 2 * H * I + I + H + 4 * H
    heads = (H * H + H) + (H * H + H + 2 * H + model.vocab_size) + (2 * H + 2)
    return tables * H + 2 * H + model.num_hidden_layers * layer + heads


def state_bytes(run: Run) -> float:
    """Weights, gradients and the optimizer's state of a GPU, at the run's ZeRO stage."""
    return footprint.state_bytes(
        num_parameters(run.model),
        precision=run.weights,
        stage=run.stage,
        ranks=run.num_gpus,
        zero=run.zero,
    )


def sample_bytes(run: Run) -> float:
    """What the backward pass needs of a sequence."""
    tokens = run.seq_length * run.fill
    return footprint.activation_bytes(
        run.model,
        num_tokens=tokens,
        max_predictions=run.max_predictions,
        width=run.width,
        is_checkpointed=run.is_checkpointed,
        kept_scores=run.seq_length * tokens if run.kernels.scores else 0,
    )


def largest_micro_batch(run: Run) -> int:
    """The largest divisor of a GPU's share of the batch that its memory holds.

    Raises:
        ConfigError: the batch can't be shared out, or not even one sequence fits.
    """
    share, rest = divmod(run.global_samples, run.num_gpus)
    if rest or not share:
        raise ConfigError(
            f"--num_gpus {run.num_gpus} can't share a global batch of {run.global_samples:,} "
            f"evenly; choose {_counts_that_divide(run)}, or another train_batch_size"
        )
    room = USABLE_MEMORY * run.gpu.memory_bytes - state_bytes(run)
    fitting = [n for n in range(1, share + 1) if share % n == 0 and n * sample_bytes(run) <= room]
    if not fitting:
        raise ConfigError(
            f"ZeRO stage {run.stage}: weights, gradients and optimizer take "
            f"{state_bytes(run) / 1e9:.1f} GB of {run.gpu.memory_bytes / 1e9:.0f}, a sequence "
            f"{sample_bytes(run) / 1e9:.2f}: not one fits; choose a higher stage or activation "
            "checkpointing"
        )
    return max(fitting)


def _counts_that_divide(run: Run) -> str:
    """The nearest numbers of GPUs that share the batch evenly."""
    asked, batch = run.num_gpus, run.global_samples
    fewer = next(n for n in range(min(asked, batch), 0, -1) if batch % n == 0)
    more = next((n for n in range(asked + 1, batch + 1) if batch % n == 0), None)
    return f"{fewer}" if more is None else f"{fewer} or {more}"


def sample_flops(run: Run) -> float:
    """Matrix products of a sequence, by the formula that MFU is told by."""
    return run.fill * training_flops_per_sequence(run.model, run.seq_length, run.max_predictions)


def time_step(run: Run, micro_samples: int | None = None) -> Step:
    """An optimizer step.

    Args:
        micro_samples: None for the largest that fits.

    Raises:
        ConfigError: see `largest_micro_batch`.
    """
    gpu, model = run.gpu, run.model
    micro = micro_samples or largest_micro_batch(run)
    share = run.global_samples / run.num_gpus
    again = 4 / 3 if run.is_checkpointed else 1.0  # the forward pass is computed twice
    matmul = again * sample_flops(run) / (run.efficiency * MATMUL_SHARE * run.peak_flops)
    tokens = run.seq_length * run.fill
    widths = run.kernels.widths * model.hidden_size
    scores = run.kernels.scores * model.num_attention_heads * run.seq_length
    moved = run.width * tokens * model.num_hidden_layers * (widths + scores)
    moved += run.width * 5 * run.max_predictions * model.vocab_size
    bandwidth = run.efficiency * BANDWIDTH_SHARE * gpu.bandwidth
    memory = again * moved / bandwidth
    owned = num_parameters(model) / (run.num_gpus if run.stage >= 1 else 1)
    # Reads and writes of fp32 weights, moments and gradient, and the 16-bit weights: LAMB goes over
    # them twice, for the norms come between.
    touched = (40 if run.optimizer == "Lamb" else 28) + (2 if run.weights != "fp32" else 0)
    optimizer = owned * touched / bandwidth
    accumulation = math.ceil(share / micro)
    micro_s = micro * (matmul + memory)
    return Step(
        micro_samples=micro,
        accumulation_steps=accumulation,
        matmul_s=share * matmul,
        memory_s=share * memory,
        optimizer_s=optimizer,
        communication_s=_exposed_communication(run, accumulation, micro_s),
    )


def _exposed_communication(run: Run, accumulation: int, micro_s: float) -> float:
    """Seconds of messages a step that the backward pass does not hide."""
    parameters = num_parameters(run.model)
    weight_bytes = 4 if run.weights == "fp32" else 2
    # In bf16 gradients are added up, and up to stage 1 sent, in fp32.
    grad_bytes = 4 if run.weights == "bf16" and run.stage <= 1 else weight_bytes
    sent = _half_all_reduce_s(run, grad_bytes * parameters)
    fetched = _half_all_reduce_s(run, weight_bytes * parameters)
    backward_s = 2 / 3 * micro_s
    hidden_s = backward_s if run.overlaps else 0.0
    if run.stage == 0:  # gradients once a step, to all
        return sent + max(0.0, sent - hidden_s)
    if run.stage == 1:  # gradients once a step, to their owners; then the new weights come back
        return fetched + max(0.0, sent - hidden_s)
    if run.stage == 2:  # gradients go to their owners in every micro-step
        return fetched + accumulation * max(0.0, sent - hidden_s)
    # Stage 3 fetches the weights for each forward and each backward pass too.
    forward_s = micro_s / 3 if run.overlaps else 0.0
    return accumulation * (max(0.0, fetched + sent - hidden_s) + max(0.0, fetched - forward_s))


def _half_all_reduce_s(run: Run, num_bytes: float) -> float:
    """A reduce-scatter or an all-gather: within machines, then between them, both by rings."""
    gpus = min(run.num_gpus, run.gpu.per_machine)
    machines = math.ceil(run.num_gpus / run.gpu.per_machine)
    inside = (gpus - 1) / gpus * num_bytes / (LINK_SHARE * run.gpu.link)
    between = (machines - 1) / machines * num_bytes / (LINK_SHARE * run.gpu.machine_link)
    return inside + between


def mfu(run: Run, step: Step) -> float:
    """The share of the data sheet's peak in the precision; padding left out counts as computed."""
    flops = run.global_samples * training_flops_per_sequence(
        run.model, run.seq_length, run.max_predictions
    )
    return flops / (step.seconds * run.num_gpus * run.peak_flops)
