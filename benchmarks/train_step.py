"""Training steps (forward, backward, AdamW) of BERT: ours beside Hugging Face's and NVIDIA's.

    python benchmarks/train_step.py --size base --dtype bf16 --device cuda

All models have the same weights and get the same batches, in turns within one process. Before
anything is timed their losses and gradients must be equal, without dropout. Ours keeps 16-bit
weights with fp32 masters, as under DeepSpeed; the others train under autocast, as their own
trainers do. Ours uses torch's layer norm but where another one is named; on a CPU it keeps the
memory of freed tensors, as `pretrain` and `finetune` do, and the others have glibc's own ways.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, peers  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.device import keep_memory, peak_flops  # noqa: E402
from zerobert.kernels import Kernels, layer_norm  # noqa: E402
from zerobert.model import BertForPreTraining, training_flops_per_sequence  # noqa: E402
from zerobert.packing import pack  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batch = dict[str, Tensor]
MASKED_SHARE = 0.15
PEERS = ("Hugging Face sdpa", "NVIDIA")
# Relative errors of the loss, of the gradient's norm, and of each tensor's gradient in ours: models
# add up in other orders, and 16 bits have 8 of them.
TOLERANCES = {"fp32": (1e-4, 1e-4, 1e-3), "bf16": (1e-2, 5e-2, 0.2)}
# Of the whole gradient's norm; what is less is rounding, or zero as for the keys' biases.
SMALL_GRADIENT = 1e-2


class Ours(nn.Module):
    """Our model as the training loop drives it."""

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The loss, both parts as means."""
        losses = self.model(**batch)
        num_masked = (batch["masked_lm_positions"] > 0).sum()
        loss: Tensor = losses.mlm_loss_sum / num_masked + losses.nsp_loss_sum / len(
            batch["input_ids"]
        )
        return loss


class Masters:
    """AdamW on fp32 copies of 16-bit weights."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the weights."""
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update both."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None


class Contender:
    """A model with its optimizer, ready to take steps."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, masters: bool, packed: bool
    ) -> None:
        """Train in 16 bits with fp32 masters, or under autocast."""
        self.autocast = None if masters or dtype == torch.float32 else dtype
        self.packed = packed
        self.model = model.to(dtype) if masters else model
        self.optimizer: Any = (
            Masters(self.model)
            if masters and dtype != torch.float32
            else torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        )

    def loss(self, batch: Batch, device: torch.device) -> Tensor:
        """One forward pass, the batch's way to the device included."""
        if self.packed:
            packing = pack(batch["input_mask"])
            batch = {**batch, "places": packing.places_T, "cu_seqlens": packing.cu_seqlens}
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            loss: Tensor = self.model(batch)
        return loss

    def step(self, batches: Sequence[Batch], device: torch.device) -> None:
        """One optimizer step over micro-batches."""
        self.optimizer.zero_grad()
        for batch in batches:
            (self.loss(batch, device) / len(batches)).backward()
        self.optimizer.step()


def make_batch(config: BertConfig, rows: int, seq_length: int, fill: float, seed: int) -> Batch:
    """Rows of random words; their mean length is a share of the sequence, as in real shards most
    are full and some short.
    """
    generator = torch.Generator().manual_seed(seed)
    num_predictions = 20 if seq_length == 128 else 80

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # A share of short rows, of all lengths alike, gives the mean asked for.
    is_short = torch.rand(rows, generator=generator) < 2 * (1 - fill)
    lengths = torch.where(is_short, draw(8, seq_length, rows), seq_length)
    mask = (torch.arange(seq_length) < lengths[:, None]).long()
    num_masked = (lengths * MASKED_SHARE).long().clamp(1, num_predictions)
    order = torch.rand(rows, seq_length, generator=generator)
    order = order.masked_fill(mask == 0, 2).index_fill(1, torch.tensor([0]), 2).argsort(1)
    chosen = order[:, :num_predictions]
    is_asked = torch.arange(num_predictions) < num_masked[:, None]
    positions = chosen.where(is_asked, seq_length).sort(1).values
    positions = positions.where(positions < seq_length, 0)
    return {
        "input_ids": draw(1000, config.vocab_size, rows, seq_length) * mask,
        "input_mask": mask,
        "segment_ids": (torch.arange(seq_length) > lengths[:, None] // 2).long() * mask,
        "masked_lm_positions": positions,
        "masked_lm_ids": draw(1000, config.vocab_size, rows, num_predictions) * (positions > 0),
        "next_sentence_labels": draw(0, 2, rows),
    }


def build(config: BertConfig, arguments: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    """What is compared; each is built when it is asked for."""
    torch.manual_seed(0)
    source = BertForPreTraining(config)
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)

    def ours(**settings: Any) -> Contender:
        model = BertForPreTraining(config, Kernels(**{"layer_norm": "torch", **settings}))
        model.load_state_dict(source.state_dict())
        packed = settings.get("packing", True)
        return Contender(Ours(model).to(device), dtype, masters=True, packed=packed)

    def theirs(make: Callable[[], nn.Module], *, compiled: bool = False) -> Contender:
        model = make().to(device)
        if compiled:
            model.compile()
        return Contender(model, dtype, masters=False, packed=False)

    found: dict[str, Callable[[], Contender]] = {
        "Hugging Face eager": lambda: theirs(lambda: peers.HuggingFaceBert(source, "eager")),
        "Hugging Face sdpa": lambda: theirs(lambda: peers.HuggingFaceBert(source, "sdpa")),
        "NVIDIA": lambda: theirs(lambda: peers.NvidiaBert(source)),
        "zerobert, padded": lambda: ours(packing=False),
        "zerobert": lambda: ours(),
    }
    if device.type == "cuda" and layer_norm.APEX_KERNEL is not None:
        found["zerobert, apex"] = lambda: ours(layer_norm="apex")
    if device.type == "cuda" and layer_norm.HAS_TRITON:
        found["zerobert, triton"] = lambda: ours(layer_norm="triton")
    if arguments.compile:
        found["Hugging Face sdpa, compiled"] = lambda: theirs(
            lambda: peers.HuggingFaceBert(source, "sdpa"), compiled=True
        )
        found["zerobert, compiled"] = lambda: ours(compile=True)
    return found


@contextlib.contextmanager
def noting(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note what a contender fails with: a kernel that does not compile, or memory that runs out,
    must not cost the others' figures.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - Triton's and the compilers' have no other base
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        failed[name] = f"{type(error).__name__}: {lines[0]:.160}"
    if name in failed and torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_equal(config: BertConfig, arguments: argparse.Namespace, failed: dict[str, str]) -> None:
    """All models' losses and gradients without dropout, in fp32 and in the precision and size of
    batch that is timed, held against the first's in fp32; of ours each tensor's gradient too.

    Args:
        failed: contender -> why; those that differ are added.
    """
    plain = dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    exact = argparse.Namespace(**{**vars(arguments), "dtype": "fp32"})
    sizes = {"fp32": 4, arguments.dtype: arguments.micro_batch}
    for dtype, rows in sizes.items():
        timed = argparse.Namespace(**{**vars(arguments), "dtype": dtype})
        batch = make_batch(plain, rows, arguments.seq_length, 0.7, seed=7)
        theirs = ours = None
        for name, make in build(plain, exact).items():
            if name in ("Hugging Face eager", "zerobert, padded"):
                with noting(name, failed):
                    found = gradients_of(make(), batch, torch.device(arguments.device))
                    theirs, ours = theirs or found, found
        for name, make in build(plain, timed).items():
            if theirs is not None and ours is not None and name not in failed:
                with noting(name, failed):
                    got = gradients_of(make(), batch, torch.device(arguments.device))
                    hold_against(got, theirs, ours if name.startswith("zerobert") else None, dtype)


def hold_against(
    got: tuple[float, Batch],
    theirs: tuple[float, Batch],
    ours: tuple[float, Batch] | None,
    dtype: str,
) -> None:
    """Compare a loss and gradients with Hugging Face's, and tensor by tensor with our own.

    Raises:
        ValueError: they differ.
    """
    loss_error, norm_error, tensor_error = TOLERANCES[dtype]
    norms = [
        float(torch.stack(torch._foreach_norm(list(g.values()))).norm()) for _, g in (got, theirs)
    ]
    if not abs(got[0] / theirs[0] - 1) <= loss_error:
        raise ValueError(f"loss {got[0]} in {dtype}, Hugging Face's is {theirs[0]}")
    if not abs(norms[0] / norms[1] - 1) <= norm_error:
        raise ValueError(f"gradient norm {norms[0]} in {dtype}, Hugging Face's is {norms[1]}")
    for name, wanted in ours[1].items() if ours else ():
        size = float(wanted.norm())
        apart = float((got[1][name] - wanted).norm()) / max(size, SMALL_GRADIENT * norms[1])
        if not apart <= tensor_error:
            raise ValueError(f"the gradient of {name} in {dtype} is off by {apart:.2g} of itself")


def gradients_of(contender: Contender, batch: Batch, device: torch.device) -> tuple[float, Batch]:
    """The loss of a batch and its gradients, in fp32 on the CPU."""
    loss = contender.loss(batch, device)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.float().cpu()
        for name, parameter in contender.model.named_parameters()
        if parameter.grad is not None
    }


def matmul_floor_s(
    config: BertConfig, arguments: argparse.Namespace, tokens: int, pairs: int
) -> float:
    """Seconds that the matrix products of a micro-step over so many tokens take, one by one, on
    this device: what is left when all else is free.

    Args:
        pairs: of tokens in the same row. Attention's products are not timed but taken at the mean
            rate of the others, because a fused kernel need not write the scores as a product does.
    """
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    hidden, wide = config.hidden_size, config.intermediate_size
    masked = round(tokens * MASKED_SHARE)
    shapes = [
        *[(tokens, hidden, 3 * hidden), (tokens, hidden, hidden)] * config.num_hidden_layers,
        *[(tokens, hidden, wide), (tokens, wide, hidden)] * config.num_hidden_layers,
        *[(masked, hidden, hidden), (masked, hidden, config.vocab_size)],
    ]

    @functools.cache
    def seconds(rows: int, inner: int, columns: int) -> float:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        return least_s(lambda: left @ right, device)

    multiplied = sum(rows * inner * columns for rows, inner, columns in shapes)
    in_attention = config.num_hidden_layers * 2 * pairs * hidden
    # Backward has two products as large as forward's.
    return 3 * sum(seconds(*shape) for shape in shapes) * (1 + in_attention / multiplied)


def copy_bytes_per_s(device: torch.device) -> float:
    """The rate, read and written bytes together, of copying a tensor that no cache holds."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / least_s(lambda: target.copy_(source), device)


def elementwise_bytes(
    config: BertConfig, arguments: argparse.Namespace, tokens: int, parameters: int
) -> float:
    """Bytes that a step must move outside of matrix products, each op being one kernel.

    An op reads its inputs and writes its outputs once; backward it reads the gradient of what it
    wrote and what it computed that from, and writes the gradients of its inputs. In values of a
    token, forward + backward:

    - attention: 3H + H, then 5H + 3H: queries, keys, values, its output, and their gradients;
    - GELU: I + I, then 2I + I;
    - dropout, addition to the residual and norm, twice a layer: 2H + H, then 3H + 2H, and H more to
      add the gradient of the half of a layer that reads the sum as well;
    - embeddings, summed and normalised: H + H, then 2H + H; the tables count as cached;
    - cross entropy of each masked token: V logits read, V gradients written.

    AdamW, once a step: the gradient read, fp32 weight and both moments read and written, and the
    16-bit weight written. Not counted are statistics, masks, biases and their gradients, adding up
    micro-steps, and what products read and write, which their own time has.
    """
    width = DTYPES[arguments.dtype].itemsize
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 12 * hidden + 5 * wide + 2 * 9 * hidden
    values = tokens * (config.num_hidden_layers * layer + 5 * hidden)
    values += round(tokens * MASKED_SHARE) * 2 * config.vocab_size
    adamw = width + 3 * (4 + 4) + (width if width < 4 else 0)
    return arguments.accumulation * values * width + parameters * adamw


def least_s(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds that some work takes; on a GPU many times in a row, so that launching it
    is not what is timed.
    """
    repeats = 20 if device.type == "cuda" else 1
    times = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / repeats)
    return min(times[2:])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders in turns."""
    device = torch.device(arguments.device)
    config = BertConfig(**SIZES[arguments.size])
    failed: dict[str, str] = {}
    check_equal(config, arguments, failed)
    print(f"losses and gradients are equal, except: {failed or 'none'}", file=sys.stderr)
    contenders: dict[str, Contender] = {}
    for name, make in build(config, arguments).items():
        if name not in failed:
            with noting(name, failed):
                contenders[name] = make()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    samples = arguments.micro_batch * arguments.accumulation
    lengths = []
    for number in range(arguments.rounds + 2):
        batches = [
            make_batch(config, arguments.micro_batch, arguments.seq_length, arguments.fill, seed)
            for seed in range(number * 100, number * 100 + arguments.accumulation)
        ]
        lengths += [batch["input_mask"].sum(1).double() for batch in batches]
        for name in list(contenders):
            with noting(name, failed):
                keep_memory(keep=device.type == "cpu" and name.startswith("zerobert"))
                synchronize(device)
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    contenders[name].step(batches, device)
                synchronize(device)
                times[name].append((time.perf_counter() - started) / arguments.steps)
            if name in failed:
                del contenders[name], times[name]
    if not contenders:
        raise SystemExit(f"nothing ran: {failed}")
    rates = {name: [samples / seconds for seconds in runs[2:]] for name, runs in times.items()}
    tokens = round(torch.stack(lengths).sum(1).mean().item())
    pairs = round(torch.stack(lengths).square().sum(1).mean().item())
    floor_s = matmul_floor_s(config, arguments, tokens, pairs) * arguments.accumulation
    bandwidth = copy_bytes_per_s(device)
    some = next(iter(contenders.values())).model
    parameters = sum(weight.numel() for weight in some.parameters())
    moved = elementwise_bytes(config, arguments, tokens, parameters)
    predictions = 20 if arguments.seq_length == 128 else 80
    flops = training_flops_per_sequence(config, arguments.seq_length, predictions)
    return {
        "samples_per_s": rates,
        "failed": failed,
        "matmul_floor_samples_per_s": samples / floor_s,
        "copy_bytes_per_s": bandwidth,
        "elementwise_bytes": moved,
        "roofline_samples_per_s": samples / (floor_s + moved / bandwidth),
        "flops_per_sequence": flops,
        "peak_flops": peak_flops(device),
    }


def tell(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The table; its ratios are those of the medians."""
    rates = {name: statistics.median(runs) for name, runs in figures["samples_per_s"].items()}
    floor, peak = figures["matmul_floor_samples_per_s"], figures["peak_flops"]
    roofline = figures["roofline_samples_per_s"]
    rows = []
    for name, runs in figures["samples_per_s"].items():
        mfu = f"{rates[name] * figures['flops_per_sequence'] / peak:.1%}" if peak else "-"
        rows.append(
            (
                name,
                measure.spread(runs),
                *(
                    f"{measure.ratio(runs, figures['samples_per_s'][peer]):.2f}"
                    if peer in rates
                    else "-"
                    for peer in PEERS
                ),
                f"{rates[name] / floor:.0%}",
                f"{rates[name] / roofline:.0%}",
                mfu,
            )
        )
    header = (
        *("", "samples/s", "x HF sdpa", "x NVIDIA"),
        *("of the matmul floor", "of the roofline", "MFU"),
    )
    title = (
        f"## {arguments.size}, {arguments.dtype}, {arguments.micro_batch} x "
        f"{arguments.accumulation} rows of {arguments.seq_length}, {arguments.fill:.0%} filled"
    )
    note = (
        f"The matrix products of the tokens alone, one by one, would allow {floor:.2f} samples/s. "
        f"A copy runs at {figures['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written; all else "
        f"moves at least {figures['elementwise_bytes'] / 1e9:.2f} GB a step, counted as in "
        f"`elementwise_bytes`. One after the other, both allow {roofline:.2f} samples/s: the "
        "roofline. MFU counts padding as work, for all alike."
    )
    lost = "".join(f"\n\n{name} failed: {why}." for name, why in figures["failed"].items())
    return f"{title}\n\n{measure.table(header, rows)}\n\n{note}{lost}"


def main(words: Sequence[str] | None = None) -> None:
    """Run one or more sizes, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", nargs="+", choices=list(SIZES), default=["mini", "base"])
    add("--dtype", choices=list(DTYPES), default="fp32")
    add("--seq_length", type=int, choices=[128, 512], default=128)
    add(
        "--fill",
        type=float,
        nargs="+",
        default=[0.9],
        help="mean share of a row that is no padding",
    )
    add("--micro_batch", type=int, default=8)
    add("--accumulation", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=1, help="steps in a row of each contender")
    add("--compile", action="store_true", help="torch.compile as well")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", default="cpu", help="a word for the report's name")
    add("--quick", action="store_true", help="the smallest model, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.rounds = ["tiny"], 1
    sections, figures = [], {}
    for size in arguments.size:
        for fill in arguments.fill:
            one = argparse.Namespace(**{**vars(arguments), "size": size, "fill": fill})
            found = run(one)
            said = tell(found, one)
            print(f"{said}\n", flush=True)
            sections.append(said)
            figures[f"{size} {fill}"] = found
    flags = " ".join(sys.argv[1:] if words is None else words)
    path = measure.write_report(
        "train_step",
        title="Training step",
        command=f"python benchmarks/train_step.py {flags}".strip(),
        sections=[f"torch {torch.__version__}, {torch.get_num_threads()} threads.", *sections],
        figures=figures,
        slug=f"{arguments.hardware}_{arguments.dtype}_{arguments.seq_length}",
    )
    print(f"-> {path}")
    if any(found["failed"] for found in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
