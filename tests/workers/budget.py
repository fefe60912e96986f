"""A run by time on two ranks whose clocks disagree: interrupted, resumed, ended by its budget.

argv: the run's folder. Every rank checks what it was given.
"""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain import loop
from pretrain import state as run_state
from pretrain.data import StepBatch
from pretrain.state import RunFolder, Saver, TrainState
from zerobert import distributed
from zerobert.config import BertConfig
from zerobert.engine import Engine, init_distributed
from zerobert.errors import EXIT_TERMINATED
from zerobert.model import BertForPreTraining
from zerobert.optim import Lamb, parameter_groups
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

VOCAB = [*SPECIAL_TOKENS, *"abc"]
CONFIG = BertConfig(
    vocab_size=len(VOCAB),
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=8,
)
BUDGET_S = 45.0


class Clock:
    """Rank 0's steps take 10 s; rank 1's clock starts elsewhere and runs faster."""

    def __init__(self) -> None:
        self.now_s = 1000.0 * distributed.rank()

    def tick(self) -> None:
        self.now_s += 10.0 + 7.0 * distributed.rank()


class Loader:
    """The same few words for ever."""

    def steps(self, first_sample: int) -> Iterator[StepBatch]:
        ids = torch.tensor([[2, 5, 4, 3, 6, 3]])
        micro_batch = {
            "input_ids": ids,
            "input_mask": torch.ones_like(ids),
            "segment_ids": torch.zeros_like(ids),
            "masked_lm_positions": torch.tensor([[2]]),
            "masked_lm_ids": torch.tensor([[7]]),
            "next_sentence_labels": torch.tensor([0]),
        }
        while True:
            yield StepBatch(
                micro_batches=(micro_batch,), first_samples=(0,), num_masked=1, num_tokens=6
            )


def main() -> None:
    init_distributed()
    clock, stop = Clock(), types.SimpleNamespace(exit_code=0)
    loop.time = types.SimpleNamespace(perf_counter=lambda: clock.now_s)  # type: ignore[assignment]
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG)
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine = Engine(model, Lamb(parameter_groups(model, 0.01)), ds)
    run = RunFolder(
        path=Path(sys.argv[1]),
        model=CONFIG,
        tokenizer=WordPieceTokenizer(VOCAB, do_lower_case=True),
        resolved={},
        identity={},
        inputs={},
        micro_samples=1,
        keep_states=2,
    )
    asked: list[tuple[int, float]] = []

    def rate(step: int, elapsed_s: float) -> float:
        asked.append((step, elapsed_s))
        clock.tick()
        if len(asked) == 2:
            engine._engine.skipped_steps = 1  # as after an overflow
            # Only one rank is told to stop.
            stop.exit_code = EXIT_TERMINATED if distributed.rank() == 1 else 0
        return 1e-3

    def train(state: TrainState) -> int:
        cfg = loop.LoopConfig(
            total_steps=None,
            max_train_s=BUDGET_S,
            logging_steps=100,
            save_steps=100,
            eval_steps=0,
            seed=0,
            rate=rate,
            rows_of_epoch=4,
            flops_per_sequence=1.0,
            peak_flops=None,
        )
        loader: Any = Loader()
        saver = Saver(run)
        code = loop.train(engine, loader, None, state, cfg, saver, None, stop)  # type: ignore[arg-type]
        saver.close()
        return code

    state = TrainState()
    assert train(state) == EXIT_TERMINATED
    assert asked == [(0, 0.0), (1, 10.0), (1, 20.0)]
    assert state.step == 3

    stop.exit_code = 0
    engine._engine.skipped_steps = 0
    state = run_state.restore(engine, run.path / "state_3")
    assert engine.skipped_steps == 1
    # By rank 0's clock on every rank.
    assert (state.step, state.elapsed_s) == (3, 30.0)
    assert train(state) == 0
    assert asked[3:] == [(2, 30.0), (3, 40.0)]
    assert (state.step, state.elapsed_s) == (5, 50.0)
    assert (run.path / "state_5" / "manifest.json").exists()
    engine.close()


main()
