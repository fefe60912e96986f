"""A fine-tuned model, ready to answer texts of which nobody has said what is right."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune import batches, metrics
from finetune.data import Examples
from finetune.tasks import TASKS
from zerobert import checkpoint, manifest
from zerobert.errors import CheckpointError, ConfigError
from zerobert.model import BertForSequenceClassification
from zerobert.tokenizer import WordPieceTokenizer

# What a configuration that names no labels means to Hugging Face.
_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")

Texts = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """The model, and what its outputs mean.

    Args:
        labels: in the order of the model's outputs; () means regression.
        score_range: the least and the greatest score, where they are known.
        num_texts: of a row, where it is known.
    """

    model: BertForSequenceClassification
    tokenizer: WordPieceTokenizer
    labels: tuple[str, ...]
    score_range: tuple[float, float] | None
    num_texts: int | None
    max_seq_length: int


def open_classifier(
    name_or_path: str, device: torch.device, *, max_seq_length: int | None = None
) -> Classifier:
    """Load a fine-tuned model, ours or one in Hugging Face's format.

    Args:
        max_seq_length: None for what it was fine-tuned at; where that is not known, for
            fine-tuning's default, or less where the model was made for less.

    Raises:
        CheckpointError: the folder can't be read, or the model has no classifier of one class a
            row.
        ConfigError: the model was made for shorter texts.
    """
    folder = checkpoint.open_model(name_or_path)
    if folder.problem_type == "multi_label_classification":
        raise CheckpointError(
            f"{folder.path} gives a row any number of labels (problem_type {folder.problem_type}); "
            "only models of one label a row, or of a score, are asked here"
        )
    is_regression = folder.is_regression or len(folder.labels) == 1
    labels = () if is_regression else folder.labels or _DEFAULT_LABELS
    model = BertForSequenceClassification(folder.config, len(labels) or 1)
    if checkpoint.load_weights(model, folder):
        raise CheckpointError(
            f"{folder.path} is not fine-tuned: it has no sentence classifier of "
            f"{len(labels) or 1} outputs; give the output folder of finetune/run_glue.py"
        )
    source = _source(folder.path)
    asked = max_seq_length or source.get("max_seq_length") or None
    length = batches.choose_length(folder, asked, batches.SEQ_LENGTH)
    return Classifier(
        model=model.to(device),
        tokenizer=checkpoint.load_tokenizer(folder),
        labels=labels,
        score_range=next((t.score_range for t in TASKS if t.name == source.get("task")), None),
        num_texts=len(source.get("text_columns", ())) or None,
        max_seq_length=length,
    )


def _source(folder: Path) -> dict[str, Any]:
    """What our manifest says of how the model was made; nothing for a model from elsewhere."""
    if not manifest.is_complete(folder):
        return {}
    source: dict[str, Any] = manifest.read_manifest(folder).config.get("run", {})
    return source


def answer(
    classifier: Classifier, rows: Sequence[Texts], precision: str, device: torch.device
) -> npt.NDArray[np.float64]:
    """The probability of each class, or the score, of each row of one or two texts.

    Returns:
        N rows of as many columns as there are classes, of one for a score.

    Raises:
        ConfigError: the model was fine-tuned on pairs and gets single texts, or the reverse.
    """
    if classifier.num_texts not in (None, len(rows[0])):
        forms = {1: "single texts", 2: "pairs of texts"}
        raise ConfigError(
            f"the model was fine-tuned on {forms[classifier.num_texts or 1]}, got "
            f"{forms[len(rows[0])]}; a TAB, or two --text_columns, make a pair"
        )
    sides = [list(side) for side in zip(*rows, strict=True)]
    examples = Examples(
        source="",
        version="",
        first=sides[0],
        second=sides[1] if len(sides) > 1 else None,
        labels=None,
    )
    encoded = batches.encode(
        examples, classifier.tokenizer, max_seq_length=classifier.max_seq_length
    )
    forward = batches.plain_forward(classifier.model, precision, device)
    logits_NC = batches.predict(forward, encoded, device)
    if classifier.labels:
        return metrics.probabilities(logits_NC)
    low, high = classifier.score_range or (-np.inf, np.inf)
    return logits_NC.astype(np.float64).clip(low, high)
