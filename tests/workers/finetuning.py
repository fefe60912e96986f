"""A rank that trains a toy classifier and answers with it: `finetuning.py OUT STAGE`.

Rank 0 writes the answers before and after training, and the losses, into OUT.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import torch

from finetune import batches, loop
from zerobert import distributed
from zerobert.config import BertConfig
from zerobert.engine import init_distributed, leave_distributed
from zerobert.model import BertForSequenceClassification
from zerobert.schedule import ScheduleConfig

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GLOBAL_BATCH = 12


class NobodyStops:
    """What the loop asks whether a signal came."""

    exit_code = 0


def make_split(num_examples: int) -> batches.Encoded:
    """Sentences of many lengths; an epoch of 301 ends with a batch of 1."""
    generator = np.random.default_rng(5)
    ids = [
        generator.integers(5, 50, generator.integers(3, 40)).tolist() for _ in range(num_examples)
    ]
    return batches.Encoded(
        input_ids=ids,
        segment_ids=[[0] * len(row) for row in ids],
        labels=np.array([row[0] % 2 for row in ids], dtype=np.int64),
        max_seq_length=64,
    )


def main() -> None:
    """Answer, train for an epoch, answer."""
    out, stage = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    init_distributed()
    settings = loop.Settings(
        deepspeed={
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // distributed.world_size(),
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        },
        num_epochs=1,
        max_steps=None,
        schedule=ScheduleConfig(),
        logging_steps=1,
        save_steps=None,
        seed=3,
    )
    torch.manual_seed(1)
    split = make_split(301)
    engine = loop.start_engine(BertForSequenceClassification(CONFIG, 2), settings)
    engine.train(False)
    before = batches.predict(engine.forward, split, engine.device)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        steps = [review.step for review in loop.train(engine, split, settings, NobodyStops())]
    assert steps == [26], steps
    engine.train(False)
    after = batches.predict(engine.forward, split, engine.device)
    losses = [float(x) for x in re.findall(r"loss: ([\d.]+)", said.getvalue())]
    if distributed.is_main():
        np.savez(out, before=before, after=after, losses=losses)
    leave_distributed()


if __name__ == "__main__":
    main()
