"""Measure what DeepSpeed alone computes on a small model, beside what it should be.

argv: a scratch folder that all ranks share; rank 0 writes `measured.json` there. Every rank trains
on the same batches, so the average over ranks is what one rank has.
"""

import argparse
import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from zerobert import distributed
from zerobert.engine import init_distributed

LR = 0.1
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


class PlainLamb(torch.optim.Optimizer):
    """LAMB as one writes it without knowing of ZeRO: a trust ratio for each tensor it is given."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(t=0, m=torch.zeros_like(weight), v=torch.zeros_like(weight))
                state["t"] += 1
                state["m"].lerp_(weight.grad, 0.1)
                state["v"].lerp_(weight.grad.square(), 0.001)
                m = state["m"] / (1 - 0.9 ** state["t"])
                v = state["v"] / (1 - 0.999 ** state["t"])
                update = m / (v.sqrt() + 1e-6) + group["weight_decay"] * weight
                weight.sub_(update * (group["lr"] * weight.norm() / update.norm()))


def toy() -> nn.Module:
    # Even sizes: what ZeRO-3 pads the tensors of other sizes with is memory as it was found.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 4))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, biases without."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, **ds: Any) -> Any:
    ranks = distributed.world_size()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4 * ranks,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        **ds,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def loss_of(model: Any, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, wanted = torch.randn(4, 6, generator=generator), torch.randn(4, 4, generator=generator)
    module = getattr(model, "module", model)
    y: Tensor = model(x.to(next(module.parameters()).dtype))
    return (y.float() - wanted).square().mean()


def take_step(engine: Any, step: int, factor: float = 1.0) -> None:
    engine.backward(loss_of(engine, step) * factor)
    engine.step()


def weights(engine: Any) -> list[Tensor]:
    sharded = engine.zero_optimization_stage() > 0
    return [
        (safe_get_full_fp32_param(p) if sharded else p.detach().float()).clone()
        for p in engine.module.parameters()
    ]


def change_by_step(engine: Any, step: int, factor: float = 1.0) -> list[Tensor]:
    before = weights(engine)
    take_step(engine, step, factor)
    return [new - old for new, old in zip(weights(engine), before, strict=True)]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def gradient_norm(at: list[Tensor], step: int, factor: float = 1.0) -> float:
    """The norm of the gradient at some weights, in plain fp32."""
    model = toy()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), at, strict=True):
            parameter.copy_(value)
    (loss_of(model, step) * factor).backward()
    return norm([parameter.grad for parameter in model.parameters()])


def sgd_updates(steps: int, **ds: Any) -> list[float]:
    """Each step's |change of the weights| / (learning rate * |gradient|) under SGD: 1 is right."""
    model = toy()
    engine = engine_of(model, sgd(model), **ds)
    ratios = []
    for step in range(steps):
        wanted = LR * gradient_norm(weights(engine), step)
        ratios.append(norm(change_by_step(engine, step)) / wanted)
    return ratios


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def fp16_update_at_stage_0() -> float:
    return sgd_updates(1, fp16={"enabled": True, "loss_scale": 1024})[0]


def fp16_norm_at_stage_0() -> float:
    """The reported norm / the norm of the gradients that step() found, unscaled: 1 is right."""
    model = toy()
    engine = engine_of(model, sgd(model), fp16={"enabled": True, "loss_scale": 1024})
    engine.backward(loss_of(engine, 0))
    found = norm([parameter.grad.float() for parameter in model.parameters()])
    engine.step()
    return float(engine.get_global_grad_norm()) / (found / 1024)


def first_adamw_update(precision: str) -> float:
    """The first update of AdamW at stage 0, as a multiple of the learning rate: 1 is right."""
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    section = {"enabled": True} | ({"loss_scale": 1} if precision == "fp16" else {})
    engine = engine_of(model, optimizer, **{precision: section})
    change = [tensor.flatten() for tensor in change_by_step(engine, 0)]
    return float(torch.cat(change).abs().median()) / LR


def fp16_updates_as_scale_grows(stage: int) -> list[float]:
    """Updates as `sgd_updates` has them; the scale doubles after every second step or so."""
    dynamic = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    return sgd_updates(6, fp16=dynamic, **zero(stage))


def scale_after_an_overflow(stage: int) -> float:
    """The loss scale after the first of two overflows that lower it / before: 1 is right."""
    model = toy()
    dynamic = {"enabled": True, "initial_scale_power": 30, "hysteresis": 2}
    engine = engine_of(model, sgd(model), fp16=dynamic, **zero(stage))
    before = engine.optimizer.loss_scale
    # What is too large for fp16 at this scale; at stage 0 nobody scales the loss.
    take_step(engine, 0, before)
    assert engine.optimizer.overflow
    return float(engine.optimizer.loss_scale / before)


def autocast_clipped_norm(stage: int) -> float:
    """The norm of what was applied / the norm that was asked for: 1 is right."""
    model = toy()
    engine = engine_of(model, sgd(model), **AUTOCAST, **zero(stage), gradient_clipping=0.05)
    return norm(change_by_step(engine, 0)) / (LR * 0.05)


def autocast_moves_after_overflows(stage: int) -> bool:
    """Whether steps are taken in the end when the first scale, 2^16, is too high."""
    model = toy()
    engine = engine_of(model, sgd(model), **AUTOCAST, **zero(stage))
    before = weights(engine)
    for step in range(20):
        take_step(engine, step, 1000.0)
    return any(not torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True))


def after_universal_load(folder: Path) -> dict[str, list[float]]:
    """Each group's weight decay and count of steps, after one step, a load at ZeRO-3, and one more.

    The groups were made with decays 0.1 and 0.
    """

    def start(**ds: Any) -> Any:
        model = toy()
        return engine_of(model, torch.optim.AdamW(groups(model), lr=LR), **zero(3), **ds)

    saved = start()
    take_step(saved, 0)
    saved.save_checkpoint(str(folder), tag="plain")
    if distributed.is_main():
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder / "plain"),
                output_folder=str(folder / "universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    distributed.barrier()
    loaded = start(checkpoint={"load_universal": True})
    loaded.load_checkpoint(str(folder), tag="universal")
    take_step(loaded, 1)
    adamw = loaded.optimizer.optimizer
    return {
        "weight decays": [float(group["weight_decay"]) for group in adamw.param_groups],
        "step counts": [float(state["step"]) for state in adamw.state.values()],
    }


def round_robin_wrong_weights() -> int:
    """How many tensors `safe_get_full_fp32_param` gets wrong before any step."""
    model = toy()
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    engine = engine_of(model, sgd(model), **zero(1, round_robin_gradients=True))
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter, value)
    return sum(not torch.equal(a, b) for a, b in zip(weights(engine), wanted, strict=True))


def lamb_error(stage: int) -> float:
    """The largest relative error of a tensor against the same LAMB on whole tensors."""
    model = toy()
    alone = copy.deepcopy(model)
    optimizer = PlainLamb(groups(alone), lr=LR)
    engine = engine_of(model, PlainLamb(groups(model), lr=LR), **zero(stage))
    for step in range(10):
        take_step(engine, step)
        loss_of(alone, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return max(
        float((got - wanted).norm() / wanted.norm())
        for got, wanted in zip(weights(engine), alone.parameters(), strict=True)
    )


def default_clipping() -> float:
    """The norm of an SGD update / the learning rate, where clipping is not mentioned at all."""
    model = toy()
    config = {"train_micro_batch_size_per_gpu": 4}
    engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)[0]
    assert gradient_norm(weights(engine), 0, 100.0) > 10
    return norm(change_by_step(engine, 0, 100.0)) / LR


def misspelt_key_is_accepted() -> bool:
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 4, "grad_clippping": 1.0})
    except Exception:  # noqa: BLE001 - whatever a DeepSpeed that refuses will raise
        return False
    return True


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # PyTorch computes in fp16 on any CPU; DeepSpeed asks for fast instructions.
    get_accelerator().is_fp16_supported = lambda: True
    init_distributed()
    # What is measured with these is right where nothing is wrong.
    assert all(abs(ratio - 1) < 0.01 for ratio in sgd_updates(3, **zero(1)))
    measured = {
        "fp16 update at stage 0": fp16_update_at_stage_0(),
        "fp16 norm at stage 0": fp16_norm_at_stage_0(),
        **{f"first {name} update": first_adamw_update(name) for name in ("bf16", "fp16")},
        "universal": after_universal_load(folder),
        "round robin": round_robin_wrong_weights(),
        "default clipping": default_clipping(),
        "misspelt key": misspelt_key_is_accepted(),
        **{f"lamb at stage {stage}": lamb_error(stage) for stage in (0, 1, 2, 3)},
        **{
            f"growing scale at stage {stage}": fp16_updates_as_scale_grows(stage)
            for stage in (1, 2, 3)
        },
        **{f"patience at stage {stage}": scale_after_an_overflow(stage) for stage in (0, 1, 2, 3)},
        "predivided": sgd_updates(
            1, **zero(3, reduce_scatter=False), gradient_predivide_factor=2.0
        )[0],
        "added up": sgd_updates(1, **zero(1), gradient_allreduce_op="sum")[0],
    }
    # Last: DeepSpeed remembers autocast for the rest of the process.
    for stage in (0, 1, 2, 3):
        measured[f"autocast clipping at stage {stage}"] = autocast_clipped_norm(stage)
        measured[f"autocast overflow at stage {stage}"] = autocast_moves_after_overflows(stage)
    if distributed.is_main():
        (folder / "measured.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


main()
