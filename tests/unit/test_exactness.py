"""Every ZeRO stage, precision and optimizer against float64 references, on several ranks."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

WORKER = Path(__file__).resolve().parents[1] / "workers" / "exactness.py"
TABLE = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"

# Of a tensor, given the same gradients; of the gradients' norm; of a weight after ten steps in
# fp32; of a model after ten steps in 16 bits, in units of what rounding alone does.
GIVEN, NORM, TRAINED, SPREAD = 1e-6, 1e-6, 1e-5, 2.0
# Of the first gradient: AdamW and LAMB hardly see a factor that all gradients have.
GRADIENT = {"fp32": 1e-6, "bf16": 0.02, "fp16": 0.004}
# Of the sum of a step's gradients over micro-steps and ranks, where it is made in fp32. (It may be
# nearer to the truth than each micro-step in 16 bits, where a tied weight has two gradients.)
SUMMED = 1e-6

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("Lamb", "AdamW")
FLAGS = ("kernels", "micro_samples", "naive", "factor", "overflows")
Case = dict[str, Any]


def case(
    precision: str, optimizer: str, *, ds: Case | None = None, zero: Case, **options: Any
) -> Case:
    flags: Case = {name: options.pop(name) for name in FLAGS if name in options}
    settings = {**PRECISIONS[precision], "zero_optimization": zero, **(ds or {})}
    extras = {**{name: value for name, value in zero.items() if name != "stage"}, **(ds or {})}
    described = " ".join(json.dumps(part) for part in (extras, options, flags) if part)
    return {
        "name": f"{precision} stage {zero['stage']} {optimizer} {described}".strip(),
        "ds": settings,
        "optimizer": {"type": optimizer, "params": {"lr": 5e-3, "weight_decay": 0.01, **options}},
        **flags,
    }


MATRIX = [
    case(precision, optimizer, zero={"stage": stage})
    for precision, stage, optimizer in itertools.product(PRECISIONS, STAGES, OPTIMIZERS)
]
CPU = {"device": "cpu"}
GROWING = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
TOO_LARGE = {"fp16": {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}}
FEW = {"reduce_bucket_size": 500, "overlap_comm": False}
NO_PERSISTENCE = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100}
SETTINGS = [
    case("fp32", "Lamb", zero={"stage": 1, **FEW}, use_nvlamb=True),
    case("fp32", "Lamb", zero={"stage": 1}, bias_correction=False),
    case("fp32", "Lamb", zero={"stage": 2, "overlap_comm": True}, max_coeff=0.5, min_coeff=0.2),
    case("fp32", "Lamb", zero={"stage": 2, "reduce_bucket_size": 700}, betas=[0.8, 0.95], eps=1e-3),
    case("fp32", "Lamb", zero={"stage": 3, **NO_PERSISTENCE, "sub_group_size": 200}),
    case("fp16", "Lamb", zero={"stage": 3, **NO_PERSISTENCE}, ds={"gradient_clipping": 0.5}),
    case(
        "fp32",
        "Lamb",
        zero={"stage": 3, **NO_PERSISTENCE},
        kernels={
            "projections": "fused",
            "cross_entropy": "chunked",
            "activation_checkpointing": True,
        },
    ),
    *[
        case(precision, "Lamb", zero={"stage": stage, "offload_optimizer": CPU})
        for precision, stage in (("fp32", 1), ("bf16", 1), ("bf16", 2), ("fp16", 2), ("fp32", 3))
    ],
    case(
        "bf16",
        "Lamb",
        zero={"stage": 3, **NO_PERSISTENCE, "offload_optimizer": CPU, "offload_param": CPU},
    ),
    case("bf16", "AdamW", zero={"stage": 2, "offload_optimizer": CPU}),
    *[
        case(precision, optimizer, zero={"stage": stage}, ds={"gradient_clipping": 0.5})
        for precision, stage, optimizer in (
            *(("bf16", stage, "Lamb") for stage in STAGES),
            ("fp32", 0, "Lamb"),
            ("fp32", 2, "Lamb"),
            ("bf16", 1, "AdamW"),
        )
    ],
    *[case("fp32", "Lamb", zero={"stage": s}, kernels={"lamb": "plain"}) for s in STAGES],
    case("bf16", "Lamb", zero={"stage": 1}, micro_samples=1),
    case("bf16", "Lamb", zero={"stage": 1}, ds={"data_types": {"grad_accum_dtype": "bf16"}}),
    *[
        case("fp16", "Lamb", zero={"stage": stage}, ds={**GROWING, "gradient_clipping": 0.5})
        for stage in STAGES
    ],
    *[
        case("fp16", "Lamb", zero={"stage": stage}, ds=TOO_LARGE, overflows=True)
        for stage in STAGES
    ],
]
WRONG = [
    case("bf16", "Lamb", zero={"stage": 1}, factor=2.0),
    case("fp16", "AdamW", zero={"stage": 2}, factor=0.5),
    case("fp32", "AdamW", zero={"stage": 0}, factor=1.001),
]
ROUNDED = {"communication_data_type": "bf16"}
EXACT = {"communication_data_type": "fp32"}
NAIVE = [case("fp32", "Lamb", zero={"stage": stage}, naive=True) for stage in (1, 2, 3)]


def measure(cases: Sequence[Case], num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What tests/workers/exactness.py finds."""
    asked, found = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps(cases), encoding="utf-8")
    timeout_s = 60 + 20 * len(cases)
    run_ranks(WORKER, num_ranks, str(asked), str(found), timeout_s=timeout_s)
    findings: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    assert [finding["name"] for finding in findings] == [case["name"] for case in cases]
    return findings


def is_exact(finding: dict[str, Any]) -> bool:
    if not (finding["given"] <= GIVEN and finding["norm"] <= NORM):
        return False
    if not finding["gradient"] <= GRADIENT[finding["name"].split()[0]]:
        return False
    if "spread" in finding:
        return bool(finding["spread"] <= SPREAD)
    return bool(finding.get("trained", 0.0) <= TRAINED)


def assert_exact(findings: Sequence[dict[str, Any]]) -> None:
    wrong = [finding for finding in findings if not is_exact(finding)]
    assert not wrong, "\n".join(map(str, wrong))


def test_lamb_is_exact_at_every_stage_and_precision(tmp_path: Path) -> None:
    assert_exact(measure([c for c in MATRIX if "Lamb" in c["name"]], 2, tmp_path))


def test_lamb_is_exact_with_settings_of_zero(tmp_path: Path) -> None:
    assert_exact(measure(SETTINGS[::3], 2, tmp_path))


def test_one_trust_ratio_for_a_shard_fails_the_same_check(tmp_path: Path) -> None:
    for finding in measure(NAIVE, 2, tmp_path):
        assert not is_exact(finding)
        assert not finding["given"] <= 1e-3


def test_gradients_that_are_wrong_by_a_factor_fail_the_same_check(tmp_path: Path) -> None:
    for finding in measure(WRONG, 2, tmp_path):
        assert not is_exact(finding)
        assert is_exact({**finding, "gradient": 0.0})  # nothing else tells


def test_bf16_gradients_of_many_micro_steps_are_summed_in_fp32(tmp_path: Path) -> None:
    def summed(stage: int, ds: Case | None = None) -> Case:
        return case("bf16", "Lamb", zero={"stage": stage}, ds=ds, micro_samples=1, factor=1.0)

    exact = measure([summed(1), summed(2, EXACT)], 2, tmp_path)
    assert_exact(exact)
    assert all(finding["summed"] <= SUMMED for finding in exact)
    # Of stage 0 the tied weight alone is another one than 16 bits make of it.
    rounded = measure([summed(0), summed(0, ROUNDED), summed(1, ROUNDED), summed(2)], 2, tmp_path)
    assert_exact(rounded)
    assert rounded[0]["summed"] < 1e-3
    assert all(finding["summed"] > 1.5e-3 for finding in rounded[1:])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_matrix(tmp_path: Path) -> None:
    """With ZEROBERT_WRITE_TABLE set, the figures go to docs/exactness.md."""
    findings = {ranks: measure(MATRIX, ranks, tmp_path) for ranks in (2, 3)}
    for found in findings.values():
        assert_exact(found)
    if "ZEROBERT_WRITE_TABLE" in os.environ:
        TABLE.write_text(page(findings), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_setting_on_every_number_of_ranks(num_ranks: int, tmp_path: Path) -> None:
    assert_exact(measure(SETTINGS, num_ranks, tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(1200)
def test_the_matrix_and_every_setting_on_a_gpu(tmp_path: Path) -> None:
    assert_exact(measure([*MATRIX, *SETTINGS], 1, tmp_path))


def test_the_page_shows_the_whole_matrix() -> None:
    said = TABLE.read_text(encoding="utf-8")
    rows = [line for line in said.splitlines() if line.startswith(("| fp32", "| bf16", "| fp16"))]
    assert len(rows) == len(MATRIX)


INTRODUCTION = f"""\
# How exact training is under ZeRO

`ZEROBERT_WRITE_TABLE=1 bash launch.sh test -m slow tests/unit/test_exactness.py` measures and
writes this page. A small BERT, whose tensors are cut in odd places, trains under DeepSpeed on gloo
ranks; independent float64 implementations of the optimizers are the measure.

- The first step's gradient is held against that of the float64 model. Its relative error must be
  below {GRADIENT["fp32"]:g} in fp32, {GRADIENT["bf16"]:g} in bf16 and {GRADIENT["fp16"]:g} in fp16.
  (The optimizers hardly see a factor that all gradients have.)
- *given*: the largest relative error of a tensor over four steps, the float64 optimizer being given
  DeepSpeed's own gradients; must be below {GIVEN:g}.
- *trained*: the largest error of a weight after ten steps of whole training, against a float64
  model that trains on the same global batches in one process; in fp32 it must be below {TRAINED:g}.
- *spread*, in 16 bits: the mean error of a weight after those ten steps, in units of that which
  rounding alone makes, in a single process with 16-bit weights and exact masters; must be below
  {SPREAD:g}. (The largest error is luck: where a first gradient is near zero, rounding decides on
  the direction of a step.)

The gradient of the keys' bias is zero but for rounding; in 16 bits it is left out of the last two.

In bf16, gradients are added up in fp32. Over ranks, too, at stages 0 and 1, where that happens once
a step: the sum is exact to some 1e-8. Stages 2 and 3 send gradients in every micro-step, in bf16,
which adds an error of 2e-3 beside the 1e-2 that the micro-steps' own arithmetic makes;
`"communication_data_type": "fp32"` takes most of it away and sends twice as many bytes.

"""


def page(findings: dict[int, list[dict[str, Any]]]) -> str:
    """The table of docs/exactness.md."""
    headings = "".join(f" {ranks} ranks: given | trained | spread |" for ranks in findings)
    lines = [
        *INTRODUCTION.splitlines(),
        f"| precision | stage | optimizer |{headings}",
        "|---|---|---|" + "---|" * (3 * len(findings)),
    ]
    for number, asked in enumerate(MATRIX):
        precision, _, stage, optimizer = asked["name"].split()
        cells = [precision, stage, optimizer]
        for found in findings.values():
            finding = found[number]
            spread = f"{finding['spread']:.2f}" if "spread" in finding else "-"
            cells += [f"{finding['given']:.1e}", f"{finding['trained']:.1e}", spread]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
