"""What the loop does around a step: when it saves, evaluates and ends."""

from collections.abc import Callable
from typing import Any

import pytest

from pretrain import loop
from pretrain.loop import LoopConfig
from pretrain.state import TrainState
from zerobert.errors import EXIT_TERMINATED
from zerobert.schedule import ScheduleConfig

Run = Callable[..., tuple[int, list[str]]]


class FakeEngine:
    """Trains on nothing."""

    global_batch_samples = 4

    def train(self) -> None:
        pass


class FakeLoader:
    """Gives steps without end."""

    def steps(self, first_sample: int) -> Any:
        while True:
            yield None


class Stop:
    """Nobody has asked to end."""

    exit_code = 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`train` with everything but its own decisions replaced; gives its code and what it did."""

    def go(
        *,
        signal_step: int | None = None,
        evaluation: int | None = None,
        first_step: int = 0,
        exit_code: int = 0,
    ) -> tuple[int, list[str]]:
        did: list[str] = []
        state = TrainState(step=first_step)

        def train_step(*_: object) -> tuple[int, int]:
            return (EXIT_TERMINATED if state.step + 1 == signal_step else 0), 0

        def evaluate(engine: object, batches: object, step: int, *_: object) -> int:
            did.append(f"evaluate {step} {batches}")
            return EXIT_TERMINATED if step == evaluation else 0

        monkeypatch.setattr(loop, "train_step", train_step)
        monkeypatch.setattr(loop, "evaluate", evaluate)
        monkeypatch.setattr(loop, "log", lambda *_: None)
        monkeypatch.setattr(loop, "check_finite", lambda *_: did.append(f"check {state.step}"))
        monkeypatch.setattr(loop.run_state, "save", lambda *_: did.append(f"save {state.step}"))
        config = LoopConfig(
            total_steps=6,
            logging_steps=100,
            save_steps=4,
            eval_steps=3,
            seed=0,
            peak_lr=1.0,
            schedule=ScheduleConfig(),
            rows_of_epoch=8,
            flops_per_sequence=1.0,
            peak_flops=None,
        )
        stop = Stop()
        stop.exit_code = exit_code
        parts: list[Any] = [FakeEngine(), FakeLoader(), lambda everything: everything]
        rest: list[Any] = [None, None, stop]
        return loop.train(*parts, state, config, *rest), did

    return go


def test_it_saves_before_the_last_evaluation_of_all_rows(run: Run) -> None:
    code, did = run()
    assert code == 0
    assert did == ["evaluate 3 False", "check 4", "save 4", "check 6", "save 6", "evaluate 6 True"]


def test_a_signal_saves_and_evaluates_no_more(run: Run) -> None:
    assert run(signal_step=2) == (EXIT_TERMINATED, ["check 2", "save 2"])


def test_a_signal_during_an_evaluation_saves_what_was_trained(run: Run) -> None:
    code, did = run(evaluation=3)
    assert (code, did) == (EXIT_TERMINATED, ["evaluate 3 False", "check 3", "save 3"])


def test_a_run_that_ended_in_its_last_evaluation_makes_it_again(run: Run) -> None:
    assert run(first_step=6) == (0, ["evaluate 6 True"])


def test_a_signal_before_the_first_step_ends_at_once(run: Run) -> None:
    assert run(exit_code=EXIT_TERMINATED) == (EXIT_TERMINATED, [])
