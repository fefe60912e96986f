"""LAMB with exact per-parameter trust ratios under ZeRO, AdamW, and parameter groups."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerobert import zero
from zerobert.config import from_dict
from zerobert.errors import ConfigError

NO_DECAY = ("bias", "LayerNorm.weight")
_LAYER = re.compile(r"\bencoder\.layer\.(\d+)\.")


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Two groups, `decay` and `no_decay`: biases and LayerNorm are not decayed.

    Args:
        layer_decay: split both by depth, and give each group an `lr_factor` for whoever sets the
            rate: 1 for all that is above the encoder's layers, this factor for the last of them,
            its square for the one before, and so on down to the embeddings.

    Source: google-research/bert optimization.py, exclude_from_weight_decay. Layers: Clark et al.
    2020 (arXiv:2003.10555), as its author means them (google-research/electra issue 51): ELECTRA's
    code multiplies all below the head once more, for a pooler that it no longer has.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if name.endswith(NO_DECAY) else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return groups if layer_decay is None else _by_depth(model, groups, layer_decay)


def _by_depth(
    model: nn.Module, groups: list[dict[str, Any]], layer_decay: float
) -> list[dict[str, Any]]:
    """Each group cut by depth: 0 for the embeddings, then the layers, then what is above them."""
    layer_of = {
        parameter: int(found[1]) + 1
        for name, parameter in model.named_parameters()
        if (found := _LAYER.search(name))
    }
    top = max(layer_of.values(), default=0) + 1
    depth_of = {
        parameter: layer_of.get(parameter, 0 if "embeddings." in name else top)
        for name, parameter in model.named_parameters()
    }
    return [
        {
            **group,
            "name": f"{group['name']}_{depth}",
            "params": parameters,
            "lr_factor": layer_decay ** (top - depth),
        }
        for group in groups
        for depth in range(top + 1)
        if (parameters := [p for p in group["params"] if depth_of[p] == depth])
    ]


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019), exact whether its tensors are whole parameters or ZeRO's flat shards.

    The update of a parameter is Adam's direction plus weight decay, scaled by the trust ratio
    |weights| / |update| of that parameter. Under ZeRO a rank holds pieces of parameters: it adds up
    the squares of its pieces, and one all-reduce of two numbers a parameter gives every rank the
    whole norms. Build it on the model's own parameters before ZeRO flattens them.

    Args:
        groups: as `parameter_groups` makes them; each needs a `name` of its own.
        lr: the learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decay of groups that set none; it is part of the update, before the ratio.
        bias_correction: correct the moments for their start at zero.
        use_nvlamb: scale parameters without weight decay too; else their ratio is 1.
        max_coeff: an upper bound of the ratio; None for no bound, as in the paper's experiments.
        min_coeff: a lower bound of the ratio.

    Source: arXiv:1904.00962, algorithm 2; the defaults are those of NVIDIA apex's FusedLAMB.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        use_nvlamb: bool = False,
        max_coeff: float | None = None,
        min_coeff: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "use_nvlamb": use_nvlamb,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(groups, defaults)
        # ZeRO replaces each group's params by its flat shard, and steps one group at a time.
        self._parameters: dict[str, list[nn.Parameter]] = {
            group["name"]: list(group["params"]) for group in self.param_groups
        }
        self._layouts: dict[str, zero.Layout] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; collective under ZeRO.

        Raises:
            ConfigError: the parameters are sharded in a way that can't be served exactly.
        """
        if closure is not None:
            raise ConfigError("Lamb.step takes no closure")
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                self._step_group(group, tensors)

    def _step_group(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        updates = [self._adam_direction(tensor, group) for tensor in tensors]
        if group["weight_decay"] == 0 and not group["use_nvlamb"]:
            for tensor, update in zip(tensors, updates, strict=True):
                tensor.add_(update, alpha=-group["lr"])
            return
        layout = self._layout(group["name"], tensors)
        weights, pieces = zero.views(tensors, layout), zero.views(updates, layout)
        scales = (trust_ratios(weights, pieces, layout, group) * -group["lr"])[layout.owners]
        if not pieces:  # this rank holds nothing but padding of this group
            return
        torch._foreach_mul_(pieces, list(scales.unbind()))
        torch._foreach_add_(weights, pieces)

    def _adam_direction(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = int(state["step"]) if group["bias_correction"] else None
        correction1 = 1 - beta1**step if step else 1.0
        correction2 = 1 - beta2**step if step else 1.0
        gradient = tensor.grad
        assert gradient is not None
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
        direction: Tensor = (state["exp_avg"] / correction1).div_(denominator)
        direction.add_(tensor, alpha=group["weight_decay"])
        return direction

    def _layout(self, name: str, tensors: list[Tensor]) -> zero.Layout:
        if name not in self._layouts:
            self._layouts[name] = zero.locate(self._parameters[name], tensors)
        return self._layouts[name]


def trust_ratios(
    weights: list[Tensor],
    updates: list[Tensor],
    layout: zero.Layout,
    group: Mapping[str, Any],
) -> Tensor:
    """|weights| / |update| of each parameter of a group, 1 where either is 0; fp32 [parameters].

    Args:
        weights: this rank's pieces of the parameters.
        updates: the matching pieces of their updates.
    """
    squares = torch.cat(
        [
            zero.squared_norms(weights, layout),
            zero.squared_norms(updates, layout),
        ]
    )
    zero.sum_over_ranks(squares, layout.process_group)
    weight_norms, update_norms = squares.sqrt_().chunk(2)
    ratios = weight_norms / update_norms
    if group["max_coeff"] is not None or group["min_coeff"] is not None:
        ratios = ratios.clamp(min=group["min_coeff"], max=group["max_coeff"])
    return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LambParams:
    """`optimizer.params` of a JSON whose optimizer is `Lamb`."""

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    use_nvlamb: bool = False
    max_coeff: float | None = None
    min_coeff: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWParams:
    """`optimizer.params` of a JSON whose optimizer is `AdamW` or, as in DeepSpeed, `Adam`."""

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer that a JSON's standard `"optimizer"` section asks for."""

    type: str
    params: LambParams | AdamWParams


def optimizer_config(section: Mapping[str, Any], where: str) -> OptimizerConfig:
    """Read DeepSpeed's `{"type": ..., "params": {...}}`.

    Raises:
        ConfigError: another optimizer, an unknown parameter, or a value out of range.
    """
    kinds: dict[str, type[LambParams] | type[AdamWParams]] = {
        "lamb": LambParams,
        "adamw": AdamWParams,
        "adam": AdamWParams,
    }
    kind = section.get("type")
    if not isinstance(kind, str) or kind.lower() not in kinds:
        raise ConfigError(f"{where}.type: wanted Lamb or AdamW, got {kind!r}")
    if strange := sorted(set(section) - {"type", "params"}):
        raise ConfigError(f"{where}: unknown key {strange[0]!r}; known keys: params, type")
    params = from_dict(kinds[kind.lower()], section.get("params", {}), f"{where}.params")
    if len(params.betas) != 2 or not all(0 <= beta < 1 for beta in params.betas):
        raise ConfigError(f"{where}.params.betas: wanted two numbers from 0 to below 1")
    if params.lr < 0 or params.eps < 0 or params.weight_decay < 0:
        raise ConfigError(f"{where}.params: lr, eps and weight_decay must not be negative")
    return OptimizerConfig(type="Lamb" if kind.lower() == "lamb" else "AdamW", params=params)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer on a model's own parameters, to be handed to DeepSpeed."""
    values = dataclasses.asdict(config.params)
    groups = parameter_groups(model, values["weight_decay"])
    if isinstance(config.params, LambParams):
        return Lamb(groups, **values)
    return torch.optim.AdamW(groups, fused=True, **values)
