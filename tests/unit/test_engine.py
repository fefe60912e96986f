"""What the engine adds to DeepSpeed's configuration."""

from typing import Any

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator

from zerobert import engine, served

FP16 = {"fp16": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}}
ZERO_1 = {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("name", ["fp32", "float32", "float", "torch.float32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_gradients_are_added_up_in_has_one_name(name: str, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage}}
    asked = BF16 | zero | {"data_types": {"grad_accum_dtype": name}}
    served.check(asked)
    assert served.grad_accum_dtype(asked) == "fp32"
    assert _completed(asked) == _completed(BF16 | zero)


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [
        (BF16, "fp32"),
        (BF16 | ZERO_1, "fp32"),
        (BF16 | {"zero_optimization": {"stage": 2}}, None),
        (BF16 | {"zero_optimization": {"stage": 3}}, None),
        (BF16 | ZERO_1 | {"communication_data_type": "bf16"}, "bf16"),
        (BF16 | ZERO_1 | {"data_types": {"grad_accum_dtype": "bf16"}}, None),
        (FP16 | ZERO_1, None),
        (FP16 | ZERO_1 | {"data_types": {"grad_accum_dtype": "fp32"}}, "fp32"),
        (ZERO_1, None),
    ],
    ids=str,
)
def test_gradients_go_over_ranks_in_fp32_where_they_are_added_up_in_it(
    ds_config: dict[str, Any], dtype: str | None
) -> None:
    assert _completed(ds_config).get("communication_data_type") == dtype


def test_the_norm_of_a_long_tensor_is_exact() -> None:
    gradients = [torch.randn(3001, 999, generator=torch.Generator().manual_seed(0)), torch.ones(3)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert engine._norm(gradients) == pytest.approx(exact, rel=1e-6)
    added_up = float(torch.stack(torch._foreach_norm(gradients)).norm())
    assert added_up != pytest.approx(exact, rel=1e-5)  # else torch's own would do


def _completed(ds_config: dict[str, Any]) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    return engine._completed(ds_config, torch.optim.SGD([parameter], lr=0.1))


@pytest.mark.parametrize(
    ("visible", "asks_torch"),
    [("0,1", False), ("", False), ("GPU-8932f937-d72c", True), ("MIG-1,0", True)],
)
def test_gpus_may_be_told_by_name(
    monkeypatch: pytest.MonkeyPatch, visible: str, asks_torch: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(cuda_accelerator, "pynvml", "its module")
    engine._leave_names_of_gpus_alone()
    assert (cuda_accelerator.pynvml is None) == asks_torch


def test_deepspeed_s_buffer_is_no_larger_than_the_model() -> None:
    zero = _completed(ZERO_1)["zero_optimization"]
    assert zero == {"reduce_bucket_size": 1, "stage": zero["stage"]}
    asked = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}}
    assert _completed(asked)["zero_optimization"]["reduce_bucket_size"] == 5
