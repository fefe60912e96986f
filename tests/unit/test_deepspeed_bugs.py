"""What DeepSpeed gets wrong without a word, on DeepSpeed alone: each test says what is right.

They fail as expected (xfail), and strictly so: with a DeepSpeed that is right a test fails, and
its reason names what `zerobert/engine.py` then no longer needs.
"""

import json
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.ranks import run_ranks


def wrong(why: str, then: str) -> pytest.MarkDecorator:
    """Expected to fail by its own assertion; anything else that goes wrong is an error."""
    return pytest.mark.xfail(
        strict=True, raises=AssertionError, reason=f"{why}; once right: {then}"
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks measured."""
    folder = tmp_path_factory.mktemp("deepspeed_bugs")
    try:
        run_ranks(REPOSITORY / "tests" / "workers" / "deepspeed_bugs.py", 2, str(folder))
    except AssertionError as error:  # not one of the expected failures
        raise RuntimeError(str(error)) from error
    values: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return values


@wrong(
    "step() divides by a loss scale that backward() has not multiplied by",
    "Engine.backward need not scale the loss at stage 0",
)
def test_fp16_at_stage_0_updates_by_the_gradient(measured: dict[str, Any]) -> None:
    assert measured["fp16 update at stage 0"] == pytest.approx(1, rel=0.01)  # 0.0007


@wrong(
    "get_global_grad_norm() is the norm of scaled gradients",
    "Engine.grad_norm can read fp16 at stage 0 as it reads the other stages",
)
def test_fp16_at_stage_0_reports_an_unscaled_norm(measured: dict[str, Any]) -> None:
    assert measured["fp16 norm at stage 0"] == pytest.approx(1, rel=0.01)  # 1024


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@wrong(
    "initialisation takes an optimizer step with zero gradients",
    "Engine._undo_hidden_step can go",
)
def test_the_first_step_at_stage_0_is_the_first(measured: dict[str, Any], precision: str) -> None:
    # AdamW's first update is the learning rate itself; its second, of one gradient, is less.
    assert measured[f"first {precision} update"] == pytest.approx(1, rel=0.05)  # 0.74


@pytest.mark.parametrize("stage", [1, 2, 3])
@wrong(
    "gradients are unscaled by the loss scale of the next step, halved when it has grown",
    "Engine._grow_scale_after_step can go",
)
def test_fp16_unscales_by_the_scale_it_was_scaled_by(measured: dict[str, Any], stage: int) -> None:
    updates = measured[f"growing scale at stage {stage}"]
    assert updates == pytest.approx([1] * len(updates), rel=0.05)  # 0.5 where the scale grows


@wrong("hysteresis is not read at stage 0", "Engine._patient can go")
def test_fp16_at_stage_0_lowers_its_scale_at_the_second_overflow(measured: dict[str, Any]) -> None:
    assert measured["patience at stage 0"] == 1  # 0.5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_lowers_its_scale_at_the_second_overflow(measured: dict[str, Any], stage: int) -> None:
    assert measured[f"patience at stage {stage}"] == 1


@wrong(
    "what was divided before the sum over as many ranks is not multiplied after it",
    "served.check need not refuse gradient_predivide_factor at stage 3",
)
def test_a_predivide_factor_leaves_gradients_as_they_are(measured: dict[str, Any]) -> None:
    assert measured["predivided"] == pytest.approx(1, rel=0.01)  # 0.5


def test_gradients_that_are_to_be_added_up_are(measured: dict[str, Any]) -> None:
    """As documented, but a loss that is made for their mean is then too large."""
    assert measured["added up"] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2, 3])
@wrong(
    "scaled gradients are clipped to the norm that is meant for unscaled ones",
    "served.check need not refuse torch_autocast in float16 for its clipping",
)
def test_fp16_autocast_clips_to_the_norm(measured: dict[str, Any], stage: int) -> None:
    assert measured[f"autocast clipping at stage {stage}"] == pytest.approx(1, rel=0.01)  # 1.6e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
@wrong(
    "a loss scale that overflows is never lowered, so that no step is taken any more",
    "served.check need not refuse torch_autocast in float16 for its overflows",
)
def test_fp16_autocast_lowers_its_scale(measured: dict[str, Any], stage: int) -> None:
    assert measured[f"autocast overflow at stage {stage}"]


def test_fp16_autocast_is_right_at_stage_0(measured: dict[str, Any]) -> None:
    assert measured["autocast clipping at stage 0"] == pytest.approx(1, rel=0.01)
    assert measured["autocast overflow at stage 0"]


@wrong(
    "ZeRO-3 gives every group the first one's hyperparameters",
    "docs/architecture.md need not name it",
)
def test_a_universal_checkpoint_keeps_each_groups_decay(measured: dict[str, Any]) -> None:
    assert measured["universal"]["weight decays"] == [0.1, 0.0]  # [0.1, 0.1]


@wrong(
    "ZeRO-3 gives all groups one step counter between them, and each advances it",
    "docs/architecture.md need not name it",
)
def test_a_universal_checkpoint_keeps_each_groups_step(measured: dict[str, Any]) -> None:
    assert measured["universal"]["step counts"] == [2, 2]  # [3, 3]


@wrong(
    "the addresses of safe_get_full_* are those without round-robin",
    "served.check need not refuse round_robin_gradients",
)
def test_round_robin_gradients_keep_weights_readable(measured: dict[str, Any]) -> None:
    assert measured["round robin"] == 0  # 2 of 4


@pytest.mark.parametrize("stage", [1, 2, 3])
@wrong(
    "an optimizer is given flat shards, where LAMB finds one trust ratio for a whole group",
    "zerobert/zero.py has nothing left to find",
)
def test_a_plain_lamb_is_right_under_zero(measured: dict[str, Any], stage: int) -> None:
    assert measured[f"lamb at stage {stage}"] < 1e-3  # 0.2 and more


def test_a_plain_lamb_is_right_at_stage_0(measured: dict[str, Any]) -> None:
    assert measured["lamb at stage 0"] < 1e-6


@wrong(
    "unknown keys of the top level are ignored",
    "served.TOP_LEVEL_KEYS can go",
)
def test_a_misspelt_key_is_refused(measured: dict[str, Any]) -> None:
    assert not measured["misspelt key"]


def test_clipping_that_is_not_mentioned_is_clipping_to_one(measured: dict[str, Any]) -> None:
    """Documented, but it was off before: a configuration of old trains differently now."""
    assert measured["default clipping"] == pytest.approx(1, rel=1e-3)
