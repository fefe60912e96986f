"""Training steps (forward, backward, AdamW) of BERT: ours beside Hugging Face's and NVIDIA's.

    python benchmarks/train_step.py --size base --dtype bf16 --device cuda

All models have the same weights and get the same batches, in turns within one process. Before
anything is timed their losses and the gradient of each tensor must be equal, without dropout. A
turn begins with a step that is not timed: in it compilers see the shapes of the batches, and caches
and memory come back from others, as in training they never left. The report is written again after
each round. Ours keeps 16-bit weights with fp32 masters, as under DeepSpeed; the others train under
autocast, as their own trainers do. On a GPU ours uses torch's layer norm but where another one is
named; on a CPU it keeps the memory of freed tensors, as `pretrain` and `finetune` do, and the
others have glibc's own ways.
"""

import argparse
import dataclasses
import math
import re
import statistics
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, peers  # noqa: E402
from zerobert.config import SIZES, BertConfig  # noqa: E402
from zerobert.device import copied_to, keep_memory, peak_flops  # noqa: E402
from zerobert.kernels import Kernels, layer_norm  # noqa: E402
from zerobert.model import BertForPreTraining, training_flops_per_sequence  # noqa: E402
from zerobert.packing import pack  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batch = dict[str, Tensor]
MASKED_SHARE = 0.15
PEERS = ("Hugging Face sdpa", "NVIDIA")
REFERENCE = "Hugging Face eager"  # what all others must equal
# Relative errors of the loss, of the gradient's norm, and of each tensor's gradient: models add up
# in other orders, and 16 bits have 8 of them.
TOLERANCES = {"fp32": (1e-4, 1e-4, 1e-3), "bf16": (1e-2, 5e-2, 0.2)}
CHECKED_AS_TIMED = r"compiled$|attention=(varlen|flash)\b"
MOST_CHECKED_ROWS = 16  # in fp32 a GPU has no memory for many rows of all words' logits
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
        gradients = [torch.empty_like(master) for master in self.masters]
        torch._foreach_copy_(gradients, [weight.grad for weight in self.weights])
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
        for master in self.masters:
            master.grad = None  # as much memory as the weights, while others take their turns

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None


class Contender:
    """A model with its optimizer, ready to take steps."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, masters: bool, num_shapes: int | None
    ) -> None:
        """Train in 16 bits with fp32 masters, or under autocast.

        Args:
            num_shapes: of packed batches; None for padded ones.
        """
        self.autocast = None if masters or dtype == torch.float32 else dtype
        self.num_shapes = num_shapes
        self.model = model.to(dtype) if masters else model
        self.optimizer: Any = (
            Masters(self.model)
            if masters and dtype != torch.float32
            else torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        )

    def loss(self, batch: Batch, device: torch.device) -> Tensor:
        """One forward pass, the batch's way to the device included."""
        if self.num_shapes is not None:
            packing = pack(batch["input_mask"], self.num_shapes)
            batch = {**batch, "places": packing.places_T, "cu_seqlens": packing.cu_seqlens}
        batch = {name: copied_to(device, tensor) for name, tensor in batch.items()}
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
    """What can be compared, compilers last; each is built when it is asked for."""
    torch.manual_seed(0)
    source = BertForPreTraining(config)
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)

    def ours(**settings: Any) -> Contender:
        plain_norm = {"layer_norm": "torch"} if device.type == "cuda" else {}
        kernels = Kernels(**{**plain_norm, **settings})
        model = BertForPreTraining(config, kernels)
        model.load_state_dict(source.state_dict())
        return Contender(Ours(model).to(device), dtype, masters=True, num_shapes=kernels.num_shapes)

    def theirs(make: Callable[[], nn.Module], *, compiled: bool = False) -> Contender:
        model = make().to(device)
        if compiled:
            model.compile()
        return Contender(model, dtype, masters=False, num_shapes=None)

    found: dict[str, Callable[[], Contender]] = {
        REFERENCE: lambda: theirs(lambda: peers.HuggingFaceBert(source, "eager")),
        "Hugging Face sdpa": lambda: theirs(lambda: peers.HuggingFaceBert(source, "sdpa")),
        "NVIDIA": lambda: theirs(lambda: peers.NvidiaBert(source)),
        "zerobert, padded": lambda: ours(packing=False),
        "zerobert": lambda: ours(),
    }
    if device.type == "cuda" and layer_norm.APEX_KERNEL is not None:
        found["zerobert, apex"] = lambda: ours(layer_norm="apex")
    if device.type == "cuda" and layer_norm.HAS_TRITON:
        found["zerobert, triton"] = lambda: ours(layer_norm="triton")
    for settings in arguments.kernels:
        words = " ".join(f"{key}={value}".lower() for key, value in settings)
        compiled = ", compiled" if dict(settings).get("compile") else ""
        found[f"zerobert, {words}{compiled}"] = lambda settings=settings: ours(**dict(settings))
    if arguments.compile:
        found["Hugging Face sdpa, compiled"] = lambda: theirs(
            lambda: peers.HuggingFaceBert(source, "sdpa"), compiled=True
        )
        found["zerobert, compiled"] = lambda: ours(compile=True)
    return dict(sorted(found.items(), key=lambda pair: pair[0].endswith("compiled")))


def chosen(config: BertConfig, arguments: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    """Those of them that `--only` names.

    Raises:
        SystemExit: it names one that there is not.
    """
    found = build(config, arguments)
    if unknown := set(arguments.only or ()) - found.keys():
        raise SystemExit(f"--only {sorted(unknown)}: there are {list(found)}")
    return {name: make for name, make in found.items() if name in (arguments.only or found)}


def kernel_setting(word: str) -> tuple[str, Any]:
    """A `key=value` of a configuration's `kernels` section.

    Raises:
        argparse.ArgumentTypeError: there is no such key or value.
    """
    key, _, value = word.partition("=")
    kinds = typing.get_type_hints(Kernels)
    kind = kinds.get(key)
    known: dict[str, Any] = (
        {"true": True, "false": False}
        if kind is bool
        else {name: name for name in typing.get_args(kind)}
    )
    if value not in known:
        values = " or ".join(known) or f"a key of {', '.join(kinds)}"
        raise argparse.ArgumentTypeError(f"{word!r} should be {key}=value with {values}")
    return key, known[value]


def check_equal(config: BertConfig, arguments: argparse.Namespace, failed: dict[str, str]) -> None:
    """All models' losses and each tensor's gradient without dropout, in fp32 and in the precision
    that is timed, held against the reference's in fp32.

    Args:
        failed: contender -> why; those that differ are added.
    """
    plain = dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    exact = argparse.Namespace(**{**vars(arguments), "dtype": "fp32"})
    device = torch.device(arguments.device)
    sizes = {"fp32": 4, arguments.dtype: min(arguments.micro_batch, MOST_CHECKED_ROWS)}
    for dtype, rows in sizes.items():
        timed = argparse.Namespace(**{**vars(arguments), "dtype": dtype})
        batch = make_batch(plain, rows, arguments.seq_length, 0.7, seed=7)
        wanted = gradients_of(build(plain, exact)[REFERENCE](), batch, device)
        for name, make in chosen(plain, timed).items():
            # Compilers take minutes, and some kernels know 16 bits alone: checked as it is timed.
            is_due = dtype == arguments.dtype or not re.search(CHECKED_AS_TIMED, name)
            if is_due and name not in failed:
                with measure.noting(name, failed):
                    hold_against(gradients_of(make(), batch, device), wanted, dtype)


def hold_against(got: tuple[float, Batch], wanted: tuple[float, Batch], dtype: str) -> None:
    """Compare a loss and gradients, tensor by tensor, with the reference's.

    Raises:
        ValueError: they differ.
    """
    loss_error, norm_error, tensor_error = TOLERANCES[dtype]
    norms = [
        float(torch.stack(torch._foreach_norm(list(g.values()))).norm()) for _, g in (got, wanted)
    ]
    if not abs(got[0] / wanted[0] - 1) <= loss_error:
        raise ValueError(f"loss {got[0]} in {dtype}, {REFERENCE}'s is {wanted[0]}")
    if not abs(norms[0] / norms[1] - 1) <= norm_error:
        raise ValueError(f"gradient norm {norms[0]} in {dtype}, {REFERENCE}'s is {norms[1]}")
    if got[1].keys() != wanted[1].keys():
        raise ValueError(f"other parameters: {sorted(got[1].keys() ^ wanted[1].keys())}")
    for name, true in wanted[1].items():
        mine = got[1][name][: len(true)]  # without the rows that fill the vocabulary up
        apart = float((mine - true).norm()) / max(float(true.norm()), SMALL_GRADIENT * norms[1])
        if not apart <= tensor_error:
            raise ValueError(f"the gradient of {name} in {dtype} is off by {apart:.2g} of itself")


def gradients_of(contender: Contender, batch: Batch, device: torch.device) -> tuple[float, Batch]:
    """The loss of a batch and its gradients under our names, in fp32 on the CPU."""
    loss = contender.loss(batch, device)
    loss.backward()
    model = contender.model
    names = model.names() if isinstance(model, peers.NvidiaBert) else {}
    return loss.item(), {
        names.get(name, name.removeprefix("model.")): parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def matmuls(config: BertConfig, tokens: int) -> Counter[tuple[int, int, int]]:
    """The matrix products of a forward pass over so many tokens, as rows, inner width and columns,
    with how often each takes place; those of attention are left out.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    masked = round(tokens * MASKED_SHARE)
    return Counter(
        [
            *[(tokens, hidden, 3 * hidden), (tokens, hidden, hidden)] * config.num_hidden_layers,
            *[(tokens, hidden, wide), (tokens, wide, hidden)] * config.num_hidden_layers,
            *[(masked, hidden, hidden), (masked, hidden, config.vocab_size)],
        ]
    )


def matmul_s(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that a matrix product takes on this device."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    return least_s(lambda: left @ right, device)


def matmul_floor_s(
    config: BertConfig, seconds: Mapping[tuple[int, int, int], float], tokens: int, pairs: int
) -> float:
    """Seconds that the matrix products of a micro-step take, one by one: what is left when all
    else is free.

    Args:
        seconds: of each product.
        pairs: of tokens in the same row. Attention's products are not timed but taken at the mean
            rate of the others, because a fused kernel need not write the scores as a product does.
    """
    counts = matmuls(config, tokens)
    multiplied = sum(math.prod(shape) * count for shape, count in counts.items())
    in_attention = config.num_hidden_layers * 2 * pairs * config.hidden_size
    spent_s = sum(seconds[shape] * count for shape, count in counts.items())
    # Backward has two products as large as forward's.
    return 3 * spent_s * (1 + in_attention / multiplied)


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


def limits(
    config: BertConfig, arguments: argparse.Namespace, batches: Sequence[Batch]
) -> dict[str, Any]:
    """What the matrix products and the memory of this device would allow for such batches."""
    device, samples = torch.device(arguments.device), arguments.micro_batch * arguments.accumulation
    lengths = torch.stack([batch["input_mask"].sum(1).double() for batch in batches])
    tokens = round(lengths.sum(1).mean().item())
    pairs = round(lengths.square().sum(1).mean().item())
    seconds = {
        shape: matmul_s(shape, device, DTYPES[arguments.dtype]) for shape in matmuls(config, tokens)
    }
    floor_s = matmul_floor_s(config, seconds, tokens, pairs) * arguments.accumulation
    bandwidth = copy_bytes_per_s(device)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in BertForPreTraining(config).parameters())
    moved = elementwise_bytes(config, arguments, tokens, parameters)
    predictions = 20 if arguments.seq_length == 128 else 80
    return {
        "matmul_tflop_per_s": {
            " x ".join(map(str, shape)): 2e-12 * math.prod(shape) / spent
            for shape, spent in seconds.items()
        },
        "matmul_floor_samples_per_s": samples / floor_s,
        "copy_bytes_per_s": bandwidth,
        "elementwise_bytes": moved,
        "roofline_samples_per_s": samples / (floor_s + moved / bandwidth),
        "flops_per_sequence": training_flops_per_sequence(
            config, arguments.seq_length, predictions
        ),
        "peak_flops": peak_flops(device),
    }


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all contenders in turns, and give what is known after each round."""
    device = torch.device(arguments.device)
    config = BertConfig(**SIZES[arguments.size])
    if arguments.dropout is not None:
        share = arguments.dropout
        config = dataclasses.replace(
            config, hidden_dropout_prob=share, attention_probs_dropout_prob=share
        )
    shape = (arguments.micro_batch, arguments.seq_length, arguments.fill)
    rounds = [
        [make_batch(config, *shape, 100 * number + i) for i in range(arguments.accumulation)]
        for number in range(arguments.rounds)
    ]
    failed: dict[str, str] = {}
    check_equal(config, arguments, failed)
    print(f"losses and gradients are equal, except: {failed or 'none'}", file=sys.stderr)
    found = {
        **limits(config, arguments, [batch for batches in rounds for batch in batches]),
        "failed": failed,
    }
    contenders: dict[str, Contender] = {}
    for name, make in chosen(config, arguments).items():
        if name not in failed:
            with measure.noting(name, failed):
                contenders[name] = make()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    samples = arguments.micro_batch * arguments.accumulation
    for batches in rounds:
        for name in list(contenders):
            with measure.noting(name, failed):
                keep_memory(keep=device.type == "cpu" and name.startswith("zerobert"))
                contenders[name].step(batches, device)
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
        rates = {name: [samples / seconds for seconds in runs] for name, runs in times.items()}
        yield {"samples_per_s": rates, **found}


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
        + (f", dropout {arguments.dropout:g}" if arguments.dropout is not None else "")
    )
    products = measure.table(
        ("product", "TFLOP/s"),
        [(shape, f"{rate:.3g}") for shape, rate in figures["matmul_tflop_per_s"].items()],
    )
    note = (
        f"The matrix products of the tokens alone, one by one, would allow {floor:.2f} samples/s. "
        f"A copy runs at {figures['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written; all else "
        f"moves at least {figures['elementwise_bytes'] / 1e9:.2f} GB a step, counted as in "
        f"`elementwise_bytes`. One after the other, both allow {roofline:.2f} samples/s: the "
        "roofline. MFU counts padding as work, for all alike."
    )
    lost = measure.tell_failed(figures["failed"])
    return f"{title}\n\n{measure.table(header, rows)}\n\n{note}\n\n{products}{lost}"


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
    add("--dropout", type=float, help="default: the model's own")
    add(
        "--kernels",
        type=kernel_setting,
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="ours with these `kernels` of a configuration as well; may be given several times",
    )
    add("--compile", action="store_true", help="torch.compile as well")
    add("--only", nargs="+", metavar="NAME", help="time these contenders alone")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--hardware", default="cpu", help="a word for the report's name")
    add("--quick", action="store_true", help="the smallest model, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.size, arguments.rounds = ["tiny"], 1
    sections: dict[str, str] = {}
    figures: dict[str, Any] = {}
    for size in arguments.size:
        for fill in arguments.fill:
            one = argparse.Namespace(**{**vars(arguments), "size": size, "fill": fill})
            for found in run(one):
                sections[f"{size} {fill}"] = tell(found, one)
                figures[f"{size} {fill}"] = found
                path = measure.write_report(
                    "train_step",
                    title="Training step",
                    command=measure.command("train_step.py", words),
                    sections=list(sections.values()),
                    figures=figures,
                    slug=f"{arguments.hardware}_{arguments.dtype}_{arguments.seq_length}",
                    arguments=arguments,
                )
            print(f"{sections[f'{size} {fill}']}\n", flush=True)
    print(f"-> {path}")
    if any(found["failed"] for found in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
