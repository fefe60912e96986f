"""LAMB with exact per-parameter trust ratios under ZeRO, AdamW, and parameter groups."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerobert import zero
from zerobert.config import from_dict
from zerobert.errors import ConfigError
from zerobert.kernels import lamb

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
        kernel: what does the arithmetic; see `zerobert.kernels.lamb`.

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
        kernel: str = "auto",
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
        self._kernel = kernel
        # ZeRO replaces each group's params by its flat shard, and steps one group at a time.
        self._parameters: dict[str, list[nn.Parameter]] = {
            group["name"]: list(group["params"]) for group in self.param_groups
        }
        # Layouts by the tensors that they are of, which are kept so that no id is given out anew.
        self._layouts: dict[tuple[int, ...], tuple[list[Tensor], zero.Layout]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; collective under ZeRO."""
        if closure is not None:
            raise ConfigError("Lamb.step takes no closure")
        for group in self.param_groups:
            alike: dict[int, list[Tensor]] = {}
            for tensor in group["params"]:
                if tensor.grad is not None:
                    alike.setdefault(self._count(tensor), []).append(tensor)
            for number, tensors in alike.items():
                self._step_alike(group, tensors, number)

    def _count(self, tensor: Tensor) -> int:
        """The number of this step among a tensor's own."""
        state = self.state[tensor]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        return int(state["step"])

    def _step_alike(self, group: Mapping[str, Any], tensors: list[Tensor], number: int) -> None:
        """Update tensors of a group that have all taken as many steps."""
        layout = self._layout(group["name"], tensors)
        states = [self.state[tensor] for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        parts = (tensors, gradients, *moments)
        pieces = lamb.Pieces(*(zero.views(part, layout) for part in parts))
        beta1, beta2 = group["betas"]
        corrects = group["bias_correction"]
        rates = lamb.Rates(
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            1 - beta1**number if corrects else 1.0,
            1 - beta2**number if corrects else 1.0,
            number,
            corrects,
        )
        scaling = lamb.Scaling(
            group["lr"],
            adapts=group["weight_decay"] != 0 or group["use_nvlamb"],
            min_coeff=group["min_coeff"],
            max_coeff=group["max_coeff"],
        )
        kernel = lamb.implementation(lamb.choose(tensors[0].device, self._kernel)[0])
        if scaling.adapts and layout.is_shared:
            squares = torch.zeros(layout.num_parameters, 2, device=layout.owners.device)
            if pieces.weights:  # else this rank holds nothing of the group, or padding alone
                squares.index_add_(0, layout.owners, kernel.update_moments(pieces, rates))
            zero.sum_over_ranks(squares, layout.process_group)
            if pieces.weights:
                kernel.apply(pieces, rates, lamb.scales(squares, scaling)[layout.owners])
        elif pieces.weights:
            kernel.step_local(pieces, rates, scaling)

    def _layout(self, name: str, tensors: list[Tensor]) -> zero.Layout:
        key = tuple(map(id, tensors))
        if key not in self._layouts:
            self._layouts[key] = tensors, zero.locate(self._parameters[name], tensors)
        return self._layouts[key][1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LambParams:
    """`optimizer.params` of a JSON whose optimizer is `Lamb`, by DeepSpeed's and apex's names.

    Attributes:
        max_grad_norm: another name of DeepSpeed's `gradient_clipping`, as apex's FusedLAMB has it.
    """

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    use_nvlamb: bool = False
    max_coeff: float | None = None
    min_coeff: float | None = None
    max_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWParams:
    """`optimizer.params` of a JSON whose optimizer is `AdamW` or, as in DeepSpeed, `Adam`.

    Attributes:
        bias_correction, adam_w_mode: must be true; DeepSpeed's names, so that its files are read.
        torch_adam: torch's fused AdamW it is either way.
    """

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    bias_correction: bool = True
    adam_w_mode: bool = True
    torch_adam: bool = True


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
    _check_ranges(params, f"{where}.params")
    return OptimizerConfig(type="Lamb" if kind.lower() == "lamb" else "AdamW", params=params)


def _check_ranges(params: LambParams | AdamWParams, where: str) -> None:
    if len(params.betas) != 2 or not all(0 <= beta < 1 for beta in params.betas):
        raise ConfigError(f"{where}.betas: wanted two numbers from 0 to below 1")
    for name in ("lr", "eps", "weight_decay", "max_grad_norm", "min_coeff", "max_coeff"):
        value = getattr(params, name, None)
        if value is not None and not 0 <= value < math.inf:  # JSON readers know NaN and Infinity
            raise ConfigError(f"{where}.{name}: wanted a number from 0 on, got {value}")
    if isinstance(params, AdamWParams):
        for name in ("adam_w_mode", "bias_correction"):
            if not getattr(params, name):
                raise ConfigError(f"{where}.{name}: false is not served; remove it")
    elif params.max_coeff is not None and params.max_coeff <= (params.min_coeff or 0.0):
        raise ConfigError(
            f"{where}.max_coeff: wanted above {params.min_coeff or 0.0:g}, which is the least "
            f"ratio, got {params.max_coeff:g}"
        )


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    lamb_kernel: str = "auto",
    *,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer on a model's own parameters, to be handed to DeepSpeed, which clips for it.

    Args:
        lamb_kernel: see `Lamb`.
        layer_decay: see `parameter_groups`.
    """
    params = config.params
    groups = parameter_groups(model, params.weight_decay, layer_decay)
    if isinstance(params, LambParams):
        options = dataclasses.asdict(params)
        del options["max_grad_norm"]
        return Lamb(groups, kernel=lamb_kernel, **options)
    beta1, beta2 = params.betas
    return torch.optim.AdamW(groups, lr=params.lr, betas=(beta1, beta2), eps=params.eps, fused=True)
