"""What the loop does around a step: its rate, when it saves and evaluates, and what ends it."""

import itertools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from pretrain import loop
from pretrain.data import StepBatch
from pretrain.guard import GuardConfig
from pretrain.loop import LoopConfig
from pretrain.state import TrainState
from tests.ranks import run_ranks
from zerobert.errors import (
    EXIT_TERMINATED,
    EXIT_USER,
    DataError,
    ShardFormatError,
    TrainingDivergedError,
)

Run = Callable[..., tuple[int, list[str]]]
WORKER = Path(__file__).resolve().parents[2] / "workers" / "budget.py"
STEP_S = 10.0


class FakeEngine:
    """Trains on nothing; leaves out the steps that it is told to."""

    global_batch_samples = 4

    def __init__(self) -> None:
        self.skipped_steps = 0

    def train(self) -> None:
        pass


class FakeLoader:
    """Gives steps without end."""

    def steps(self, first_sample: int) -> Any:
        while True:
            yield StepBatch(micro_batches=(), first_samples=(), num_masked=3, num_tokens=5)


class TornLoader(FakeLoader):
    """A shard can't be read on after some steps."""

    def steps(self, first_sample: int) -> Any:
        yield from itertools.islice(super().steps(first_sample), 2)
        raise ShardFormatError("shard_3 can't be read")


class Stop:
    """Nobody has asked to end."""

    exit_code = 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`train` with everything but its own decisions replaced; gives its code and what it did.

    Each step takes ten seconds of a clock that starts anywhere.
    """

    def go(
        *,
        signal_step: int | None = None,
        evaluation: int | None = None,
        unreadable: int | None = None,
        exit_code: int = 0,
        state: TrainState | None = None,
        skip: tuple[int, ...] = (),
        rates: list[tuple[int, float]] | None = None,
        losses: Mapping[int, list[float]] = MappingProxyType({}),
        back_to: int | None = None,
        loader: FakeLoader | None = None,
        **limits: Any,
    ) -> tuple[int, list[str]]:
        did: list[str] = []
        engine, stop = FakeEngine(), Stop()
        stop.exit_code = exit_code
        state = TrainState() if state is None else state
        now_s = [1234.5]

        def train_step(
            engine: Any, batch: Any, shared: Any, window: loop.Window, seed: int
        ) -> None:
            now_s[0] += STEP_S
            window.steps += 1
            engine.skipped_steps += state.step in skip

        def share(batch: StepBatch, elapsed_s: float, stop: Any) -> loop.Shared:
            if state.step + 1 == signal_step:
                stop.exit_code = EXIT_TERMINATED
            return real_share(batch, elapsed_s, stop)

        def evaluate(engine: object, batches: object, step: int, *_: object) -> int:
            did.append(f"evaluate {step} {batches}")
            if step == unreadable:
                raise ShardFormatError("test_0 can't be read")
            return EXIT_TERMINATED if step == evaluation else 0

        def rate(step: int, elapsed_s: float) -> float:
            if rates is not None:
                rates.append((step, elapsed_s))
            return 1.0

        def log(*_: object) -> float:
            did.append(f"log {state.step}")
            of_step = losses.get(state.step)
            return of_step.pop(0) if of_step else 1.0

        class Saver:
            """Remembers what it was told to save."""

            def save(self, engine: object, state: TrainState) -> None:
                did.append(f"save {state.step}")

            def check(self) -> None:
                pass

            def wait(self) -> None:
                pass

            def go_back(self, wrong: TrainState, num_states: int, reason: str) -> Path | None:
                did.append(f"go back from {wrong.step}: {reason}")
                return None if back_to is None else Path(f"state_{back_to}")

        def restore(engine: object, target: Path) -> TrainState:
            step = int(target.name.removeprefix("state_"))
            return TrainState(step=step, samples=4 * step, position=4 * step, elapsed_s=10.0)

        real_share = loop.share
        monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now_s[0]))
        monkeypatch.setattr(loop, "train_step", train_step)
        monkeypatch.setattr(loop, "share", share)
        monkeypatch.setattr(loop, "evaluate", evaluate)
        monkeypatch.setattr(loop, "log", log)
        monkeypatch.setattr(loop.run_state, "restore", restore)
        monkeypatch.setattr(loop, "check_finite", lambda *_: did.append(f"check {state.step}"))
        settings: dict[str, Any] = {"total_steps": 6, "max_train_s": None, "logging_steps": 100}
        config = LoopConfig(
            **{**settings, **limits},
            save_steps=4,
            eval_steps=3,
            seed=0,
            rate=rate,
            rows_of_epoch=8,
            flops_per_sequence=1.0,
            peak_flops=None,
        )
        parts: list[Any] = [engine, loader or FakeLoader(), lambda everything: everything]
        rest: list[Any] = [Saver(), None, stop]
        try:
            code = loop.train(*parts, state, config, *rest)
        except DataError as error:
            did.append(str(error))
            code = EXIT_USER
        finally:
            monkeypatch.setattr(loop, "share", real_share)
        return code, did

    return go


def test_it_saves_before_the_last_evaluation_of_all_rows(run: Run) -> None:
    code, did = run()
    assert code == 0
    assert did == [
        *["evaluate 3 False", "check 4", "save 4"],
        *["log 6", "check 6", "save 6", "evaluate 6 True"],
    ]


def test_a_signal_saves_and_evaluates_no_more(run: Run) -> None:
    assert run(signal_step=2) == (EXIT_TERMINATED, ["log 2", "check 2", "save 2"])


def test_a_signal_during_an_evaluation_saves_what_was_trained(run: Run) -> None:
    code, did = run(evaluation=3)
    assert code == EXIT_TERMINATED
    assert did == ["evaluate 3 False", "log 3", "check 3", "save 3"]


def test_held_out_rows_that_can_t_be_read_cost_no_step(run: Run) -> None:
    code, did = run(unreadable=3)
    assert code == EXIT_USER
    assert did == ["evaluate 3 False", "log 3", "check 3", "save 3", "test_0 can't be read"]


def test_rows_that_can_t_be_read_cost_no_step(run: Run) -> None:
    code, did = run(loader=TornLoader())
    assert code == EXIT_USER
    assert did == ["log 2", "check 2", "save 2", "shard_3 can't be read"]


def test_a_run_that_ended_in_its_last_evaluation_makes_it_again(run: Run) -> None:
    assert run(state=TrainState(step=6)) == (0, ["evaluate 6 True"])


def test_a_signal_before_the_first_step_ends_at_once(run: Run) -> None:
    assert run(exit_code=EXIT_TERMINATED) == (EXIT_TERMINATED, [])


def test_the_time_ends_a_run_as_its_last_step_does(run: Run) -> None:
    state, rates = TrainState(), []
    code, did = run(state=state, rates=rates, total_steps=None, max_train_s=45.0)
    # The fifth step begins at 40 s; at 50 s there is no time for a sixth.
    assert rates == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert (code, state.step, state.samples, state.tokens) == (0, 5, 20, 25)
    assert state.elapsed_s == 50.0
    assert did[-4:] == ["log 5", "check 5", "save 5", "evaluate 5 True"]


def test_the_earlier_of_steps_and_time_ends_a_run(run: Run) -> None:
    state = TrainState()
    run(state=state, total_steps=3, max_train_s=1000.0)
    assert state.step == 3
    state = TrainState()
    run(state=state, total_steps=3, max_train_s=15.0)
    assert state.step == 2


def test_a_resumed_run_counts_on(run: Run) -> None:
    state, rates = TrainState(step=3, elapsed_s=30.0), []
    run(state=state, rates=rates, total_steps=None, max_train_s=45.0)
    assert rates == [(3, 30.0), (4, 40.0)]
    assert (state.step, state.elapsed_s) == (5, 50.0)


def test_a_run_whose_time_is_over_only_evaluates(run: Run) -> None:
    state = TrainState(step=5, elapsed_s=50.0)
    assert run(state=state, total_steps=None, max_train_s=45.0) == (0, ["evaluate 5 True"])
    assert state.step == 5


def test_a_run_from_the_end_of_another_saves_in_its_own_folder(run: Run) -> None:
    state = TrainState(step=6, elapsed_s=60.0)
    wanted = ["check 6", "save 6", "evaluate 6 True"]
    assert run(state=state, begins_elsewhere=True) == (0, wanted)


def test_a_step_that_overflowed_does_not_move_the_schedule(run: Run) -> None:
    state, rates = TrainState(), []
    run(state=state, rates=rates, skip=(1, 2, 4))
    assert [step for step, _ in rates] == [0, 0, 0, 1, 1, 2]
    assert state.step == 6


SPIKE = {"spike_factor": 2.0}


def spiking(run: Run, guard: dict[str, Any], **options: Any) -> tuple[int, list[str]]:
    return run(logging_steps=1, total_steps=8, guard=GuardConfig(**SPIKE, **guard), **options)


def test_a_spike_stops_a_run_and_is_not_saved(run: Run) -> None:
    state = TrainState()
    told = r"step 7, 2\.1000, is more than 2 times .* 1\.0.*\); where a state was saved .*rollback"
    with pytest.raises(TrainingDivergedError, match=told):
        spiking(run, {}, losses={6: [1.9], 7: [2.1]}, state=state)
    assert state.step == 7


def test_a_run_goes_back_and_on_behind_the_samples_of_a_spike(run: Run) -> None:
    state, rates = TrainState(), []
    code, did = spiking(
        run, {"action": "rollback"}, losses={7: [9.0]}, back_to=4, state=state, rates=rates
    )
    assert code == 0
    back = [line for line in did if line.startswith("go back")]
    assert len(back) == 1
    assert back[0].startswith("go back from 7: the loss at step 7")
    after = did[did.index(back[0]) + 1 :]
    assert [line for line in after if line.startswith("log")] == [
        "log 5",
        "log 6",
        "log 7",
        "log 8",
    ]
    # Seven steps, back to the fourth, and four more; the time of the lost ones is spent.
    assert (state.step, state.samples, state.position) == (8, 32, 44)
    assert rates == [
        *((step, 10.0 * step) for step in range(7)),
        *((s, 30.0 + 10 * s) for s in (4, 5, 6, 7)),
    ]


def test_a_run_that_goes_wrong_again_and_again_stops(run: Run) -> None:
    guard = {"action": "rollback", "max_rollbacks": 2}
    with pytest.raises(TrainingDivergedError, match="after 2 rollbacks; lower the learning rate"):
        spiking(run, guard, losses={7: [9.0, 9.0, 9.0]}, back_to=1)


def test_with_nothing_saved_a_spike_ends_the_run(run: Run) -> None:
    with pytest.raises(TrainingDivergedError, match=r"step 7.*no state was saved before; lower"):
        spiking(run, {"action": "rollback"}, losses={7: [9.0]})


def test_two_ranks_take_one_rate_and_stop_together(tmp_path: Path) -> None:
    run_ranks(WORKER, 2, str(tmp_path / "run"))
