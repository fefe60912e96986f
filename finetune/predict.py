"""Ask a fine-tuned model: the class of each text with its probabilities, or its score.

python finetune/predict.py --model_name_or_path runs/finetune/SST-2 "a fine film" "a dull one"

python finetune/predict.py --model_name_or_path runs/finetune/MNLI --input_file pairs.jsonl
    --text_columns premise,hypothesis --output_file answers.tsv

Without texts and file it reads stdin, a text a line. A TAB stands between the two texts of a pair.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

import numpy as np
import numpy.typing as npt
import torch

from finetune import loop, metrics
from finetune.data import Examples, parse_columns
from finetune.run_glue import choose_device
from finetune.tables import read_rows
from finetune.tasks import TASKS
from zerobert import checkpoint, manifest
from zerobert.device import set_threads
from zerobert.errors import ArgumentParser, CheckpointError, ConfigError, DataError, run_script
from zerobert.model import BertForSequenceClassification
from zerobert.tokenizer import WordPieceTokenizer

_SEQ_LENGTH = 128  # where the model does not say what it was fine-tuned at
_CHUNK = 1024  # texts that are sorted by length and batched together
# What a configuration that names no labels means to Hugging Face.
_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")
_DIGITS = 6

Texts = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """A fine-tuned model, ready to answer.

    Args:
        labels: in the order of the model's outputs; () means regression.
        score_range: the least and the greatest score, where they are known.
    """

    model: BertForSequenceClassification
    tokenizer: WordPieceTokenizer
    labels: tuple[str, ...]
    score_range: tuple[float, float] | None
    max_seq_length: int


def open_classifier(
    name_or_path: str, device: torch.device, *, max_seq_length: int | None = None
) -> Classifier:
    """Load a fine-tuned model, ours or one in Hugging Face's format.

    Args:
        max_seq_length: None for what it was fine-tuned at; where that is not known for 128, or
            less where the model was made for less.

    Raises:
        CheckpointError: the folder can't be read, or the model has no classifier.
        ConfigError: the model was made for shorter texts.
    """
    folder = checkpoint.open_model(name_or_path)
    is_regression = folder.is_regression or len(folder.labels) == 1
    labels = () if is_regression else folder.labels or _DEFAULT_LABELS
    model = BertForSequenceClassification(folder.config, len(labels) or 1)
    if checkpoint.load_weights(model, folder):
        raise CheckpointError(
            f"{folder.path} is not fine-tuned: it has no sentence classifier of "
            f"{len(labels) or 1} outputs; give the output folder of a fine-tuning"
        )
    limit = folder.config.max_position_embeddings
    source = _source(folder.path)
    length = max_seq_length or source.get("max_seq_length") or min(_SEQ_LENGTH, limit)
    if length > limit:
        raise ConfigError(f"--max_seq_length {length}: {folder.path} was made for at most {limit}")
    return Classifier(
        model=model.to(device),
        tokenizer=checkpoint.load_tokenizer(folder),
        labels=labels,
        score_range=next((t.score_range for t in TASKS if t.name == source.get("task")), None),
        max_seq_length=length,
    )


def _source(folder: Path) -> dict[str, Any]:
    """What our manifest says of how the model was made; nothing for a model from elsewhere."""
    return manifest.read_manifest(folder).config if manifest.is_complete(folder) else {}


def answer(
    classifier: Classifier, rows: Sequence[Texts], precision: loop.Precision, device: torch.device
) -> npt.NDArray[np.float64]:
    """The probability of each class, or the score, of each row of one or two texts.

    Returns:
        N rows of as many columns as there are classes, of one for a score.
    """
    sides = [list(side) for side in zip(*rows, strict=True)]
    examples = Examples(
        source="",
        version="",
        first=sides[0],
        second=sides[1] if len(sides) > 1 else None,
        labels=None,
    )
    encoded = loop.encode(examples, classifier.tokenizer, max_seq_length=classifier.max_seq_length)
    logits_NC = loop.predict(classifier.model, encoded, precision, device)
    if classifier.labels:
        return metrics.probabilities(logits_NC)
    low, high = classifier.score_range or (-np.inf, np.inf)
    return logits_NC.astype(np.float64).clip(low, high)


def format_line(labels: Sequence[str], texts: Texts, answer_C: Sequence[float]) -> str:
    """An answer for people: the label, each class's probability, the text."""
    shown = [_one_line(text) for text in texts]
    if not labels:
        return "\t".join([f"{answer_C[0]:.3f}", *shown])
    chances = zip(labels, answer_C, strict=True)
    each = ", ".join(f"{_one_line(label)} {chance:.4f}" for label, chance in chances)
    return "\t".join([_one_line(_best(labels, answer_C)), each, *shown])


def format_tsv(labels: Sequence[str], number: int, answer_C: Sequence[float]) -> str:
    """A line of an output file; `tsv_header` names its columns."""
    cells = [_one_line(_best(labels, answer_C))] if labels else []
    return "\t".join([str(number), *cells, *(f"{value:.{_DIGITS}f}" for value in answer_C)])


def tsv_header(labels: Sequence[str]) -> str:
    """The first line of an output file."""
    names = ["label", *(f"probability_{_one_line(label)}" for label in labels)]
    return "\t".join(["row", *(names if labels else ["score"])])


def format_json(labels: Sequence[str], number: int, answer_C: Sequence[float]) -> str:
    """A line of an output file that ends in `.jsonl`."""
    values = [round(float(value), _DIGITS) for value in answer_C]
    if not labels:
        return json.dumps({"row": number, "score": values[0]})
    chances = dict(zip(labels, values, strict=True))
    record = {"row": number, "label": _best(labels, answer_C), "probabilities": chances}
    return json.dumps(record, ensure_ascii=False)


def _best(labels: Sequence[str], answer_C: Sequence[float]) -> str:
    return labels[int(np.argmax(answer_C))]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_lines(lines: Iterable[bytes], where: str) -> Iterator[Texts]:
    """The text of each line, or its two with a TAB between; blank lines are left out.

    Args:
        where: what the lines are of, for messages.

    Raises:
        DataError: a line is not UTF-8, has several TABs, or is no pair among pairs.
    """
    wanted = 0
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} {number}: wanted UTF-8 text: {error.reason}") from error
        if not text.strip():
            continue
        texts = tuple(text.split("\t"))
        wanted = wanted or min(len(texts), 2)
        if len(texts) != wanted:
            form = "one text" if wanted == 1 else "two texts with a TAB between"
            raise DataError(f"{where} {number}: wanted {form}, got {len(texts)}")
        yield texts


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="finetune/predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="what to ask about")
    add(
        "--model_name_or_path",
        required=True,
        help="the output folder of a fine-tuning, or a hub name",
    )
    add("--input_file", type=Path, help="TSV, CSV or JSONL")
    add("--text_columns", help="of --input_file: one column, or two as a,b")
    add(
        "--output_file",
        type=Path,
        help="TSV, or JSON lines where it ends in .jsonl (default: a line a text on stdout)",
    )
    add("--max_seq_length", type=int, help="default: what the model was fine-tuned at, or 128")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    add("--n_gpu", type=int, help="0 for the CPU (default: a GPU where there is one)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what does not fit together.

    Raises:
        ConfigError: says what to give instead.
    """
    if args.texts and args.input_file:
        raise ConfigError("both texts and --input_file: give one of them")
    if (args.input_file is None) != (args.text_columns is None):
        raise ConfigError("--input_file and --text_columns go together: give both or neither")
    if args.max_seq_length is not None and args.max_seq_length < 1:
        raise ConfigError(f"--max_seq_length: wanted 1 or more, got {args.max_seq_length}")
    if args.output_file is None:
        return
    if args.output_file.suffix.lower() not in (".tsv", ".jsonl"):
        raise ConfigError(f"--output_file {args.output_file}: wanted a name in .tsv or .jsonl")
    if args.input_file and args.output_file.resolve() == args.input_file.resolve():
        raise ConfigError("--output_file is --input_file, which would be lost; choose another")


def read_texts(args: argparse.Namespace) -> Iterator[Texts]:
    """What the command line asks about.

    Raises:
        DataError: it can't be read, or there is nothing.
    """
    rows: Iterator[Texts]
    if args.input_file:
        where = str(args.input_file)
        columns = parse_columns(args.text_columns)
        rows = (texts for _, texts in read_rows(args.input_file, columns))
    elif args.texts:
        where = "the command line"
        rows = read_lines(map(os.fsencode, args.texts), "text")
    else:
        where = "stdin"
        if sys.stdin.isatty():
            print("a text a line, Ctrl-D ends", file=sys.stderr)
        rows = read_lines(sys.stdin.buffer, "stdin line")
    first = next(rows, None)
    if first is None:
        raise DataError(f"{where}: no text; give one text a row")
    return itertools.chain([first], rows)


def _chunks(rows: Iterator[Texts], size: int) -> Iterator[list[Texts]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def main() -> int:
    """Run the command line."""
    args = build_parser().parse_args()
    check_flags(args)
    set_threads()
    # Without network it would print ten lines of retries before our one.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    device = choose_device(args.n_gpu)
    classifier = open_classifier(
        args.model_name_or_path, device, max_seq_length=args.max_seq_length
    )
    labels, output = classifier.labels, args.output_file
    if output:
        with manifest.writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
    is_json = output is not None and output.suffix.lower() == ".jsonl"
    lines = [] if is_json else [tsv_header(labels)]
    is_typed = not (args.texts or args.input_file) and sys.stdin.isatty()
    number = 0
    for rows in _chunks(read_texts(args), 1 if is_typed else _CHUNK):
        answers_NC = answer(classifier, rows, args.precision, device)
        for texts, answer_C in zip(rows, answers_NC.tolist(), strict=True):
            number += 1
            if output is None:
                print(format_line(labels, texts, answer_C))
            else:
                lines.append((format_json if is_json else format_tsv)(labels, number, answer_C))
        sys.stdout.flush()
    if output:
        manifest.write_text(output, "".join(f"{line}\n" for line in lines))
        print(f"{number} answers in {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
