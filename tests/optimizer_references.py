"""LAMB and AdamW in float64 on whole tensors, written apart from those that they check."""

from collections.abc import Mapping

import torch
from torch import Tensor


class ReferenceLamb:
    """LAMB of arXiv:1904.00962; the state of every named tensor, in plain dictionaries."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        bias_correction: bool = True,
        use_nvlamb: bool = False,
        max_coeff: float | None = None,
        min_coeff: float | None = None,
    ) -> None:
        self.start = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.weights = {name: weight.clone() for name, weight in self.start.items()}
        self.m = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.v = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.t = 0
        self.lr, self.decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.bias_correction, self.use_nvlamb = bias_correction, use_nvlamb
        self.low = 0.0 if min_coeff is None else min_coeff
        self.high = float("inf") if max_coeff is None else max_coeff

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        self.t += 1
        b1, b2 = self.betas
        for name, w in self.weights.items():
            g = gradients[name].double()
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            m, v = self.m[name], self.v[name]
            if self.bias_correction:
                m, v = m / (1 - b1**self.t), v / (1 - b2**self.t)
            is_exempt = name.endswith("bias") or "LayerNorm" in name
            decay = 0.0 if is_exempt else self.decay
            r = m / (v.sqrt() + self.eps) + decay * w
            ratio = 1.0
            if decay or self.use_nvlamb:
                wn, rn = float(w.norm()), float(r.norm())
                ratio = min(max(wn / rn, self.low), self.high) if wn > 0 and rn > 0 else 1.0
            self.weights[name] = w - self.lr * ratio * r


class DeepSpeedLamb:
    """What DeepSpeed's FusedLamb computes, of one tensor and with its defaults.

    Source: DeepSpeed 0.19, ops/lamb/fused_lamb.py, csrc/lamb/fused_lamb_cuda_kernel.cu.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.t = 0
        self.lr, self.decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.low, self.high = min_coeff, max_coeff

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        (b1, b2), g, w = self.betas, gradient.double(), self.weight
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        r = self.m / (self.v.sqrt() + self.eps) + self.decay * w
        wn, rn = float(w.norm()), float(r.norm())
        ratio = min(max(wn / rn, self.low), self.high) if wn and rn else 1.0
        rate = self.lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        self.weight = w - rate * ratio * r


class ReferenceAdamW:
    """AdamW of arXiv:1711.05101, algorithm 2, with bias correction."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.start = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.weights = {name: weight.clone() for name, weight in self.start.items()}
        self.m = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.v = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.t = 0
        self.lr, self.decay, self.betas, self.eps = lr, weight_decay, betas, eps

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        self.t += 1
        b1, b2 = self.betas
        for name, w in self.weights.items():
            g = gradients[name].double()
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            is_exempt = name.endswith("bias") or "LayerNorm" in name
            decayed = w if is_exempt else w * (1 - self.lr * self.decay)
            self.weights[name] = decayed - self.lr * m / (v.sqrt() + self.eps)
