"""What a pretraining step takes on GPUs that are not at hand: time, memory, and what limits it.

Nothing is simulated: operations, bytes and messages are counted and divided by rates. Each rate is
a data sheet's, times the share of it that was reached where it was measured. docs/scaling.md
writes the model down and holds it against published runs.

Symbols: S sequence, H hidden, N heads, P predictions, V vocabulary, L layers.
"""

import dataclasses
import math

from zerobert.config import BertConfig
from zerobert.errors import ConfigError
from zerobert.model import training_flops_per_sequence

# Of the peak, in products of BERT's own shapes: on one H100 measured rates of products and copies
# bound base 128, base 512, large 128, large 512 at 6,350, 1,520, 2,040 and 490 sequences/s, which
# beside the traffic counted here leaves 0.63, 0.63, 0.65 and 0.66 to the products. (8192 x 8192 x
# 8192 reached 798 TFLOP/s of 989 there, copies 3.0 TB/s of 3.35.)
MATMUL_SHARE = 0.64
BANDWIDTH_SHARE = 0.90
# Not measured: what NCCL reaches of a link's rate in large messages.
LINK_SHARE = 0.80
# Of a device's memory; allocators round up and fragment, libraries and NCCL hold some.
USABLE_MEMORY = 0.9
# Bytes that the backward pass needs of a token, a layer and a hidden value, with attention fused.
# Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1: 34 s b h.
_KEPT_BYTES = 34
_CHECKPOINTED_BYTES = 2  # the input of a layer alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in its maker's server.

    Attributes:
        matrix_flops: dense 16-bit peak, FLOP/s.
        memory_bytes, bandwidth: of the device, bytes and bytes/s.
        per_machine: GPUs of a machine.
        link: bytes/s each way between a GPU and the others of its machine.
        machine_link: bytes/s each way of all network adapters of a machine.
    """

    matrix_flops: float
    memory_bytes: float
    bandwidth: float
    per_machine: int
    link: float
    machine_link: float


# Source: NVIDIA's data sheets of the DGX-2, DGX A100 80 GB, DGX H100, DGX H200 and DGX B200.
GPUS = {
    "v100": Gpu(
        matrix_flops=125e12,
        memory_bytes=32e9,
        bandwidth=0.9e12,
        per_machine=16,
        link=150e9,
        machine_link=100e9,
    ),
    "a100": Gpu(
        matrix_flops=312e12,
        memory_bytes=80e9,
        bandwidth=2.039e12,
        per_machine=8,
        link=300e9,
        machine_link=200e9,
    ),
    "h100": Gpu(
        matrix_flops=989e12,
        memory_bytes=80e9,
        bandwidth=3.35e12,
        per_machine=8,
        link=450e9,
        machine_link=400e9,
    ),
    "h200": Gpu(
        matrix_flops=989e12,
        memory_bytes=141e9,
        bandwidth=4.8e12,
        per_machine=8,
        link=450e9,
        machine_link=400e9,
    ),
    "b200": Gpu(
        matrix_flops=2250e12,
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
        widths: 16-bit values a token, in units of H.
        scores: 16-bit values of each of the N x S attention scores of a token.
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
        fill: the share of tokens that are no padding; what is left out is not computed.
        optimizer: `Lamb` or `AdamW`.
        overlaps: gradients are sent while the backward pass goes on.
    """

    model: BertConfig
    gpu: Gpu
    num_gpus: int
    global_samples: int
    seq_length: int
    max_predictions: int
    stage: int
    optimizer: str = "Lamb"
    fill: float = 1.0
    overlaps: bool = False
    is_checkpointed: bool = False
    kernels: Kernels = ZEROBERT


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
    """Weights, gradients and the optimizer's state of a GPU, at the run's ZeRO stage.

    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1: 2 + 2 + 12 bytes a parameter.
    """
    shared = run.num_gpus
    weights = 2 / (shared if run.stage >= 3 else 1)
    gradients = 2 / (shared if run.stage >= 2 else 1)
    optimizer = 12 / (shared if run.stage >= 1 else 1)
    return num_parameters(run.model) * (weights + gradients + optimizer)


def sample_bytes(run: Run) -> float:
    """What the backward pass needs of a sequence."""
    model = run.model
    tokens = run.seq_length * run.fill
    a_layer = _CHECKPOINTED_BYTES if run.is_checkpointed else _KEPT_BYTES
    layers = model.num_hidden_layers * a_layer * model.hidden_size * tokens
    one_layer = _KEPT_BYTES * model.hidden_size * tokens if run.is_checkpointed else 0
    scores = 0.0
    if run.kernels.scores:  # 5 a s / h of the same source
        scores = 5 * model.num_attention_heads * run.seq_length * tokens * model.num_hidden_layers
    logits = 6 * run.max_predictions * model.vocab_size
    return layers + one_layer + scores + logits


def largest_micro_batch(run: Run) -> int:
    """The largest divisor of a GPU's share of the batch that its memory holds.

    Raises:
        ConfigError: the batch can't be shared out, or not even one sequence fits.
    """
    share, rest = divmod(run.global_samples, run.num_gpus)
    if rest or not share:
        raise ConfigError(
            f"a global batch of {run.global_samples} can't be shared among {run.num_gpus} GPUs "
            "evenly; change train_batch_size or --num_gpus"
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
    matmul = again * sample_flops(run) / (MATMUL_SHARE * gpu.matrix_flops)
    tokens = run.seq_length * run.fill
    widths = run.kernels.widths * model.hidden_size
    scores = run.kernels.scores * model.num_attention_heads * run.seq_length
    moved = 2 * tokens * model.num_hidden_layers * (widths + scores)
    moved += 2 * 5 * run.max_predictions * model.vocab_size
    bandwidth = BANDWIDTH_SHARE * gpu.bandwidth
    memory = again * moved / bandwidth
    owned = num_parameters(model) / (run.num_gpus if run.stage >= 1 else 1)
    # Reads and writes of fp32 weights, moments and gradient, and the 16-bit weights: LAMB goes over
    # them twice, for the norms come between.
    optimizer = owned * (42 if run.optimizer == "Lamb" else 30) / bandwidth
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
    half = _half_all_reduce_s(run, 2 * num_parameters(run.model))
    backward_s = 2 / 3 * micro_s
    hidden_s = backward_s if run.overlaps else 0.0
    if run.stage <= 1:  # gradients once a step; then they, or the new weights, come back
        return half + max(0.0, half - hidden_s)
    if run.stage == 2:  # gradients go to their owners in every micro-step
        return half + accumulation * max(0.0, half - hidden_s)
    # Stage 3 fetches the weights for each forward and each backward pass too.
    forward_s = micro_s / 3 if run.overlaps else 0.0
    return accumulation * (max(0.0, 2 * half - hidden_s) + max(0.0, half - forward_s))


def _half_all_reduce_s(run: Run, num_bytes: float) -> float:
    """A reduce-scatter or an all-gather: within machines, then between them, both by rings."""
    gpus = min(run.num_gpus, run.gpu.per_machine)
    machines = math.ceil(run.num_gpus / run.gpu.per_machine)
    inside = (gpus - 1) / gpus * num_bytes / (LINK_SHARE * run.gpu.link)
    between = (machines - 1) / machines * num_bytes / (LINK_SHARE * run.gpu.machine_link)
    return inside + between


def mfu(run: Run, step: Step) -> float:
    """The share of the data sheet's peak; padding that is left out counts as computed."""
    flops = run.global_samples * training_flops_per_sequence(
        run.model, run.seq_length, run.max_predictions
    )
    return flops / (step.seconds * run.num_gpus * run.gpu.matrix_flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A run that somebody published, and the model's figure for it.

    Attributes:
        unit: of both figures.
    """

    who: str
    what: str
    unit: str
    published: float
    modelled: float

    @property
    def error(self) -> float:
        """How much more the model says."""
        return self.modelled / self.published - 1


def published_runs() -> list[Published]:
    """Runs that nothing here was fitted on.

    Source: NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md, DGX A100 80 GB;
    DeepSpeed, docs/_tutorials/bert-pretraining.md. Micro-batches are NVIDIA's; DeepSpeed's runs are
    compared by their speed-up over 16 GPUs, for what they were trained on is not public.
    """
    large = BertConfig.from_size({"size": "large", "vocab_size": 30528}, "large")
    rows = []
    for gpus, figure in ((1, 580.0), (8, 4591.0), (256, 138_294.0)):
        run = Run(
            model=large,
            gpu=GPUS["a100"],
            num_gpus=gpus,
            global_samples=8192 * gpus if gpus < 256 else 65536,
            seq_length=128,
            max_predictions=20,
            stage=0,
            kernels=NVIDIA_2020,
        )
        step = time_step(run, micro_samples=256)
        rate = run.global_samples / step.seconds
        rows.append(_row("NVIDIA, A100", f"large 128 on {gpus}", "samples/s", figure, rate))
    for length, masked, figure in ((128, 20, 272.0), (512, 80, 52.0)):
        run = _deepspeed_run(large, 1, length, masked)
        step = time_step(run, micro_samples=64 if length == 128 else 8)
        rate = run.global_samples / step.seconds
        rows.append(_row("DeepSpeed, V100", f"large {length} on 1", "samples/s", figure, rate))
    base = 33 + 13 / 60
    for gpus, hours in ((64, 8 + 41 / 60), (256, 144 / 60), (1024, 44 / 60)):
        seconds = [
            time_step(_deepspeed_run(large, n, 128, 20), micro_samples=64).seconds
            for n in (16, gpus)
        ]
        what = f"large, speed-up from 16 to {gpus}"
        rows.append(_row("DeepSpeed, V100", what, "x", base / hours, seconds[0] / seconds[1]))
    return rows


def _deepspeed_run(model: BertConfig, num_gpus: int, length: int, masked: int) -> Run:
    return Run(
        model=model,
        gpu=GPUS["v100"],
        num_gpus=num_gpus,
        global_samples=65536,
        seq_length=length,
        max_predictions=masked,
        stage=0,
        kernels=DEEPSPEED_2020,
    )


def _row(who: str, what: str, unit: str, published: float, modelled: float) -> Published:
    return Published(who=who, what=what, unit=unit, published=published, modelled=modelled)
