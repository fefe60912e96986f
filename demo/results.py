"""What the demo found: the final tables and the page of curves."""

from collections.abc import Sequence
from pathlib import Path

from demo import reviews
from demo.pipeline import Record, Stage
from demo.stages import last_evaluation, num_entries, read_accuracy
from demo.unigram import shards_unigram_loss
from zerobert.manifest import write_text
from zerobert.page import Chart, Series, Table, render_page
from zerobert.tracking import METRICS_NAME, read_metrics

PAGE_NAME = "report.html"


def task_table(root: Path) -> Table:
    """Fine-tuning beside what needs no pretraining and what needs no model."""
    train = reviews.read_tsv(root / "reviews" / "train.tsv")
    dev = reviews.read_tsv(root / "reviews" / "dev.tsv")
    label, share = reviews.majority_accuracy(train, dev)
    return Table(
        title=f"Is the sentence kind to the film? {len(dev):,} held-out sentences",
        header=("", "accuracy"),
        rows=[
            (f"always {label!r}, the commonest label", f"{share:.1%}"),
            ("fine-tuned from random weights", f"{read_accuracy(root / 'finetune_random'):.1%}"),
            (
                "fine-tuned from the pretrained model",
                f"{read_accuracy(root / 'finetune_pretrained'):.1%}",
            ),
        ],
    )


def task_note(root: Path, max_steps: int) -> str | None:
    """What to think of a pretrained model that is no better than random weights."""
    if read_accuracy(root / "finetune_pretrained") > read_accuracy(root / "finetune_random"):
        return None
    return (
        f"{max_steps:,} steps on so little text are too few to help with these labels: the model "
        "has learnt how often words come, and hardly how they go together. On more text an hour of "
        "ds_configs/tiny_cpu_1h.json is enough for that (docs/reproduce.md)."
    )


def language_table(root: Path, unigram: float) -> Table:
    """Pretraining beside a model that knows nothing of the context."""
    found = last_evaluation(root / "pretrain")["eval/mlm_loss"]
    return Table(
        title="Masked words of held-out text",
        header=("", "loss in nats"),
        rows=[
            ("predicted by their frequency alone", f"{unigram:.3f}"),
            ("predicted by the pretrained model", f"{found:.3f}"),
            ("below frequency", f"{unigram - found:+.3f}"),
        ],
    )


def unigram_loss(root: Path) -> float:
    """What the demo's pretraining has to beat."""
    return shards_unigram_loss(root / "shards", num_entries(root / "vocab.txt"))


def write_page(
    root: Path,
    stages: Sequence[Stage],
    records: Sequence[Record],
    tables: Sequence[Table],
    *,
    unigram: float,
) -> Path:
    """Tables, curves and times as `PAGE_NAME`.

    Raises:
        DataError: the page can't be written.
    """
    times = Table(
        title="What was done",
        header=("stage", "seconds", "result"),
        rows=[
            (stage.name, f"{record.seconds:.0f}", record.line or "")
            for stage, record in zip(stages, records, strict=True)
        ],
    )
    path = root / PAGE_NAME
    write_text(path, render_page("zerobert: the demo", [*tables, *_charts(root, unigram), times]))
    return path


def _charts(root: Path, unigram: float) -> list[Chart]:
    lines = read_metrics(root / "pretrain" / METRICS_NAME)

    def series(name: str, key: str) -> Series:
        found = [line for line in lines if line.get(key) is not None]
        return Series(
            name=name,
            xs={"step": [line["step"] for line in found]},
            ys=[line[key] for line in found],
        )

    ends = [lines[0]["step"], lines[-1]["step"]]
    frequency = Series(name="by frequency alone", xs={"step": ends}, ys=[unigram, unigram])
    charts = [
        (
            "Masked-LM loss",
            "nats a masked token",
            [series("training", "train/mlm_loss"), series("held-out", "eval/mlm_loss"), frequency],
        ),
        ("Masked-LM accuracy", "share right", [series("held-out", "eval/mlm_accuracy")]),
        ("Next-sentence accuracy", "share right", [series("held-out", "eval/nsp_accuracy")]),
        ("Learning rate", "rate", [series("rate", "train/lr")]),
    ]
    return [Chart(title=title, y_label=y_label, series=curves) for title, y_label, curves in charts]
