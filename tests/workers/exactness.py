"""Train small models under DeepSpeed and measure how far they are from float64 references.

argv: a JSON file with cases, and the file that rank 0 writes its findings to. A case has a `name`,
`ds` (DeepSpeed's keys), `optimizer` (the JSON section) and optionally `kernels` (theirs),
`micro_samples` (sequences of a micro-step), `naive`, for a LAMB that takes ZeRO's flat shard for
one tensor, `factor`, for a loss that is wrong by it, or `overflows`, for a loss scale that is too
large at first. Of each case is measured

    gradient: the relative error of the first step's gradient, against a float64 model's;
    summed: in 16 bits, its relative error against the exact sum of what the micro-steps made;
    given: the largest relative error of a tensor over four steps, the reference being given the
        gradients that DeepSpeed made;
    norm: the largest relative error of the gradient norm that is logged;
    trained: the largest error of a weight after ten steps, against a float64 model that trains on
        the same global batches in one process;
    spread: in 16 bits, the mean error of a weight, in units of that which rounding alone makes: in
        a single process that keeps 16-bit weights, too.
"""

import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from tests.optimizer_references import ReferenceAdamW, ReferenceLamb
from zerobert import distributed, zero
from zerobert.config import BertConfig
from zerobert.engine import Engine, init_distributed, leave_distributed
from zerobert.kernels import Kernels
from zerobert.model import BertForPreTraining
from zerobert.optim import Lamb, build_optimizer, optimizer_config
from zerobert.served import precision

# Sizes that share no factor with the number of ranks: tensors are cut in odd places.
CONFIG = BertConfig(
    vocab_size=53,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=21,
    max_position_embeddings=17,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
ROWS = 24  # of a global batch: 2, 3 or 4 ranks cut it
ACCUMULATION = 2
GIVEN_STEPS, TRAINED_STEPS = 4, 10
MOST_STEPS = 12  # with those that an overflow skips
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Batch = dict[str, Tensor]
Case = dict[str, Any]


def new_model(kernels: Kernels | None = None) -> BertForPreTraining:
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG, kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.bert.embeddings.word_embeddings.weight[CONFIG.vocab_size :] = 0  # padding
    return model


def global_batches(steps: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {
            "input_ids": torch.randint(1, 53, (ROWS, 16), generator=generator),
            "input_mask": torch.ones(ROWS, 16, dtype=torch.long),
            "segment_ids": torch.zeros(ROWS, 16, dtype=torch.long),
            "masked_lm_positions": torch.tensor([[1, 5], [2, 0]]).repeat(ROWS // 2, 1),
            "masked_lm_ids": torch.randint(1, 53, (ROWS, 2), generator=generator),
            "next_sentence_labels": torch.randint(0, 2, (ROWS,), generator=generator),
        }


def parts(batch: Batch, number: int) -> list[Batch]:
    """A global batch in equal consecutive parts."""
    size = ROWS // number
    return [
        {name: x[i * size : (i + 1) * size] for name, x in batch.items()} for i in range(number)
    ]


def loss_of(model: Callable[..., Any], batch: Batch, device: torch.device | None = None) -> Tensor:
    """A part's share of the global batch's loss."""
    losses = model(**{name: x.to(device) for name, x in batch.items()})
    loss: Tensor = (losses.mlm_loss_sum + losses.nsp_loss_sum) / (2 * ROWS)
    return loss


def new_reference(weights: dict[str, Tensor], case: Case) -> ReferenceLamb | ReferenceAdamW:
    options = dict(case["optimizer"]["params"])
    options.setdefault("weight_decay", 0.01)
    kind = ReferenceLamb if case["optimizer"]["type"] == "Lamb" else ReferenceAdamW
    return kind(weights, **options)


def norm_of(gradients: dict[str, Tensor]) -> float:
    norms = [gradient.double().norm() for gradient in gradients.values()]
    return float(torch.stack(norms).norm())


def clipped(gradients: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    limit = case["ds"].get("gradient_clipping", 0.0)
    share = min(1.0, limit / norm_of(gradients)) if limit else 1.0
    return {name: gradient.double() * share for name, gradient in gradients.items()}


def gradients_alone(
    model: BertForPreTraining, batch: Batch, num_parts: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """What one process makes of a global batch, its parts added up in float64."""
    total: dict[str, Tensor] = {}
    model.train()
    for part in parts(batch, num_parts):
        model.zero_grad()
        (loss_of(model, part) * scale).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, 0) + parameter.grad.double() / scale
    return total


def error_of(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    differences = {name: g - wanted[name][: len(g)] for name, g in gradients.items()}
    return norm_of(differences) / norm_of(wanted)


def trained_alone(case: Case, dtype: torch.dtype, num_parts: int) -> dict[str, Tensor]:
    """The weights that one process ends with: float64 masters, model and gradients in `dtype`."""
    model = new_model().to(dtype)
    reference = new_reference(new_model().state_dict(), case)
    scale = 2.0**8 if dtype == torch.float16 else 1.0
    model.train()
    for batch in global_batches(TRAINED_STEPS):
        total: dict[str, Tensor] = {}
        for part in parts(batch, num_parts):
            model.zero_grad()
            (loss_of(model, part) * scale).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad[: len(reference.start[name])]
                total[name] = total[name] + gradient if name in total else gradient
        reference.step(clipped({name: t.double() / scale for name, t in total.items()}, case))
        model.load_state_dict(reference.weights)
    return reference.weights


def whole_gradient(parameter: torch.nn.Parameter, engine: Engine) -> Tensor:
    """The step's gradient over ranks and micro-steps, whole on every rank."""
    sharded = hasattr(parameter, "_dp_group") or hasattr(parameter, "ds_id")
    gradient = safe_get_full_grad(parameter) if sharded else parameter.grad
    assert gradient is not None
    return gradient.cpu().double() / engine.loss_scale


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """The fp32 weights without padding, on every rank, of what the ranks would save."""
    rows = engine.snapshot().rows
    return {name: weight[: rows[name]] for name, weight in whole(engine, "weights").items()}


def whole(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Every parameter's weights or one of its moments, of what the ranks would save."""
    snapshot = engine.snapshot()
    mine = [(piece.name, piece.offset, piece.values[kind]) for piece in snapshot.pieces]
    of_ranks: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(of_ranks, mine)
    tensors = {name: torch.full(tuple(shape), torch.nan) for name, shape in snapshot.shapes.items()}
    for name, offset, values in itertools.chain.from_iterable(of_ranks):
        tensors[name].view(-1)[offset : offset + len(values)] = values
    return tensors


def micro_steps(case: Case) -> int:
    """Micro-steps of a global batch, on all ranks together."""
    if "micro_samples" in case:
        return ROWS // int(case["micro_samples"])
    return ACCUMULATION * distributed.world_size()


def start(case: Case) -> tuple[Engine, torch.optim.Optimizer]:
    kernels = Kernels(**case.get("kernels", {}))
    model = new_model(kernels)
    optimizer = build_optimizer(model, optimizer_config(case["optimizer"], "case"), kernels.lamb)
    ds = {
        "train_micro_batch_size_per_gpu": ROWS // micro_steps(case),
        "gradient_accumulation_steps": micro_steps(case) // distributed.world_size(),
        "train_batch_size": ROWS,
        "gradient_clipping": 0.0,
        **copy.deepcopy(case["ds"]),
    }
    engine = Engine(model, optimizer, ds)
    engine.train()
    return engine, optimizer


def given(case: Case) -> dict[str, float]:
    """The errors of the first gradient, and the largest relative errors of a tensor, given the same
    gradients, and of their norm.
    """
    engine, _ = start(case)
    found: dict[str, float] = {}
    dtype = DTYPES[precision(case["ds"])]
    lr = case["optimizer"]["params"]["lr"]
    reference = new_reference(whole_weights(engine), case)
    gradients: dict[str, Tensor] = {}
    worst = worst_norm = 0.0
    is_clipped = False

    def capture(*_: object) -> None:
        if not gradients:
            for name, parameter in engine.module.named_parameters():
                whole, size = whole_gradient(parameter, engine), len(reference.start[name])
                assert not whole[size:].any()  # rows that pad the vocabulary
                gradients[name] = whole[:size]

    # BF16_Optimizer has the gradients of all ranks no earlier than when it steps, and clips them
    # there; the others let go of them.
    wrapper = engine._engine.optimizer
    reads_late = type(wrapper).__name__ == "BF16_Optimizer"
    if reads_late:
        step = wrapper.step

        def capture_and_step(*args: object) -> None:
            capture()
            step(*args)

        wrapper.step = capture_and_step
    rank, ranks = distributed.rank(), distributed.world_size()
    for batch in global_batches(MOST_STEPS):
        skipped = engine.skipped_steps
        for micro in parts(batch, micro_steps(case))[rank::ranks]:
            loss = loss_of(engine.forward, micro, engine.device)
            engine.backward(loss * case.get("factor", 1.0))
            if not reads_late and engine.at_boundary:
                capture()
            engine.step(lr)
        if engine.skipped_steps == skipped:
            if reference.t == 0:
                exact = gradients_alone(new_model().double(), batch, 1)
                found["gradient"] = error_of(gradients, exact)
            if reference.t == 0 and dtype != torch.float32:
                scale = engine.loss_scale
                rounded = gradients_alone(new_model().to(dtype), batch, micro_steps(case), scale)
                found["summed"] = error_of(gradients, rounded)
            reference.step(clipped(gradients, case))
            norm = norm_of(gradients)
            is_clipped |= norm > case["ds"].get("gradient_clipping", math.inf)
            worst_norm = max(worst_norm, abs(engine.grad_norm / norm - 1))
        gradients.clear()
        for name, weight in whole_weights(engine).items():
            wanted = reference.weights[name]
            error = float((weight.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))
            worst = worst if error <= worst else error  # which keeps what is no number
        if reference.t == GIVEN_STEPS:
            break
    assert reference.t == GIVEN_STEPS
    assert (engine.skipped_steps > 0) == bool(case.get("overflows"))
    assert is_clipped == ("gradient_clipping" in case["ds"])
    assert (
        max(float((w - reference.start[name]).norm()) for name, w in reference.weights.items())
        > 1e-2
    )
    engine.close()
    return {**found, "given": worst, "norm": worst_norm}


def trained(case: Case) -> dict[str, Tensor]:
    """The weights after ten steps under DeepSpeed."""
    engine, _ = start(case)
    rank, ranks = distributed.rank(), distributed.world_size()
    for batch in global_batches(TRAINED_STEPS):
        for micro in parts(batch, micro_steps(case))[rank::ranks]:
            engine.backward(loss_of(engine.forward, micro, engine.device))
            engine.step(case["optimizer"]["params"]["lr"])
    state = whole_weights(engine)
    engine.close()
    return state


def distance(state: dict[str, Tensor], wanted: dict[str, Tensor], names: list[str]) -> float:
    """The mean error of a weight: the largest is a matter of luck, for where a first gradient is
    near zero, rounding decides on the direction of a whole step.
    """
    errors = [(state[name].double() - wanted[name]).abs().flatten() for name in names]
    return float(torch.cat(errors).mean())


def measure(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {"name": case["name"], **given(case)}
    if any(name in case for name in ("naive", "overflows", "factor")):
        return found
    exact = trained_alone(case, torch.float64, 1)
    state = trained(case)
    dtype = DTYPES[precision(case["ds"])]
    # The gradient of the keys' bias is zero but for rounding: what 16 bits or NVLAMB make of it is
    # noise, which no weight but itself feels.
    is_noise = dtype != torch.float32 or case["optimizer"]["params"].get("use_nvlamb", False)
    names = [name for name in exact if not (is_noise and name.endswith("key.bias"))]
    found["trained"] = max(
        float((state[name].double() - exact[name]).abs().max()) for name in names
    )
    if dtype != torch.float32:
        rounded = trained_alone(case, dtype, micro_steps(case))
        found["spread"] = distance(state, exact, names) / distance(rounded, exact, names)
    return found


def main() -> None:
    cases, findings = sys.argv[1:]
    init_distributed()
    # What computes fp16 slowly computes it rightly.
    get_accelerator().is_fp16_supported = lambda: True
    found = []
    layout = Lamb._layout
    for case in json.loads(Path(cases).read_text()):
        Lamb._layout = as_one_tensor if case.get("naive") else layout  # type: ignore[method-assign]
        print(f"{time.strftime('%X')} {case['name']}", file=sys.stderr, flush=True)
        found.append(measure(case))
        if distributed.is_main():  # however far it comes
            Path(findings).write_text(json.dumps(found))
    leave_distributed()


def as_one_tensor(self: Lamb, name: str, tensors: list[Tensor]) -> zero.Layout:
    """What every LAMB does that does not know ZeRO."""
    segments = [(zero.Segment(index=i, start=0, length=t.numel()),) for i, t in enumerate(tensors)]
    owners = torch.arange(len(tensors))
    return zero.Layout(
        segments=tuple(segments), owners=owners, num_parameters=len(tensors), process_group=None
    )


if __name__ == "__main__":
    main()
