"""Ask a fine-tuned model: the class of each text with its probabilities, or its score.

python finetune/predict.py --model_name_or_path runs/finetune/SST-2 "a fine film" "a dull one"

python finetune/predict.py --model_name_or_path runs/finetune/MNLI --input_file pairs.jsonl
    --text_columns premise,hypothesis --output_file answers.tsv

Without texts and file it reads stdin, a text a line; blank lines are none. A TAB stands between
the two texts of a pair.
"""

import argparse
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

import torch

from finetune.classifier import Texts, answer, open_classifier
from finetune.data import parse_columns
from finetune.flags import name_or_path
from finetune.tables import one_line, read_rows
from zerobert.device import set_threads, this_device
from zerobert.errors import ArgumentParser, ConfigError, DataError, run_script
from zerobert.manifest import write_text, writing

_CHUNK = 1024  # texts that are sorted by length and batched together
_DIGITS = 6


def format_line(labels: Sequence[str], texts: Texts, answer_C: Sequence[float]) -> str:
    """An answer for people: the label, each class's probability, the text."""
    shown = [one_line(text) for text in texts]
    if not labels:
        return "\t".join([f"{answer_C[0]:.3f}", *shown])
    chances = zip(labels, answer_C, strict=True)
    each = ", ".join(f"{one_line(label)} {chance:.4f}" for label, chance in chances)
    return "\t".join([one_line(_best(labels, answer_C)), each, *shown])


def format_tsv(labels: Sequence[str], number: int, answer_C: Sequence[float]) -> str:
    """A line of an output file; `tsv_header` names its columns."""
    cells = [one_line(_best(labels, answer_C))] if labels else []
    return "\t".join([str(number), *cells, *(f"{value:.{_DIGITS}f}" for value in answer_C)])


def tsv_header(labels: Sequence[str]) -> str:
    """The first line of an output file."""
    names = ["label", *(f"probability_{one_line(label)}" for label in labels)]
    return "\t".join(["row", *(names if labels else ["score"])])


def format_json(labels: Sequence[str], number: int, answer_C: Sequence[float]) -> str:
    """A line of an output file that ends in `.jsonl`."""
    values = [round(value, _DIGITS) for value in answer_C]
    if not labels:
        return json.dumps({"row": number, "score": values[0]})
    chances = dict(zip(labels, values, strict=True))
    record = {"row": number, "label": _best(labels, answer_C), "probabilities": chances}
    return json.dumps(record, ensure_ascii=False)


def _best(labels: Sequence[str], answer_C: Sequence[float]) -> str:
    return labels[answer_C.index(max(answer_C))]


def read_lines(lines: Iterable[bytes], where: str, *, skips_blank: bool = True) -> Iterator[Texts]:
    """The text of each line, or its two with a TAB between.

    Args:
        where: what the lines are of, for messages.
        skips_blank: a line without text is none.

    Raises:
        DataError: a line is not UTF-8, has several TABs, or is no pair among pairs.
    """
    wanted = 0
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} {number}: wanted UTF-8 text: {error.reason}") from error
        if skips_blank and not text.strip():
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
    )
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="what to ask about")
    add(
        "--model_name_or_path",
        type=name_or_path,
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
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    add("--n_gpu", type=int, choices=(0, 1), help="0 is the CPU (default: a GPU, if there is one)")
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
    if not (args.texts or args.input_file) and sys.stdin is None:
        raise ConfigError("stdin is closed: give texts or --input_file")
    if args.output_file is None:
        if sys.stdout is None:
            raise ConfigError("stdout is closed, and the answers with it: give --output_file")
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
        rows = (texts for _, texts in read_rows(args.input_file, columns, tells_of_quotes=True))
    elif args.texts:
        where = "the command line"
        are_blank = not any(text.strip() for text in args.texts)
        rows = read_lines(map(os.fsencode, args.texts), "text", skips_blank=are_blank)
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
    device = torch.device("cpu") if args.n_gpu == 0 else this_device()
    classifier = open_classifier(
        args.model_name_or_path, device, max_seq_length=args.max_seq_length
    )
    is_typed = not (args.texts or args.input_file) and sys.stdin.isatty()
    answers = (
        pair
        for rows in _chunks(read_texts(args), 1 if is_typed else _CHUNK)
        for pair in zip(
            rows, answer(classifier, rows, args.precision, device).tolist(), strict=True
        )
    )
    if args.output_file:
        write_answers(args.output_file, classifier.labels, (answer_C for _, answer_C in answers))
        return 0
    for texts, answer_C in answers:
        print(format_line(classifier.labels, texts, answer_C), flush=is_typed)
    return 0


def write_answers(path: Path, labels: Sequence[str], answers_NC: Iterable[Sequence[float]]) -> None:
    """Write a line an answer, in the format that the suffix tells; the file is whole or as it was.

    Raises:
        DataError: it can't be written.
    """
    with writing(path):  # before the work, not after it
        path.parent.mkdir(parents=True, exist_ok=True)
    is_json = path.suffix.lower() == ".jsonl"
    form = format_json if is_json else format_tsv
    lines = [form(labels, row, answer_C) for row, answer_C in enumerate(answers_NC, start=1)]
    header = [] if is_json else [tsv_header(labels)]
    write_text(path, "".join(f"{line}\n" for line in [*header, *lines]))
    print(f"{len(lines)} answers in {path}")


if __name__ == "__main__":
    run_script(main)
