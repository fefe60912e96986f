"""Command line of the data stage: wiring only.

Each command imports what it runs: loading the libraries of all takes longer than many a command.
"""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

from data_prep.config import DOCUMENT_BREAKS, FORMATS, InstanceConfig, ShardsConfig, TextConfig
from zerobert.errors import EXIT_USER, ArgumentParser, ConfigError, run_script
from zerobert.manifest import write_text, writing

if TYPE_CHECKING:
    from zerobert.tokenizer import WordPieceTokenizer

# Above this the vocabulary probably is of another language or case.
_HIGH_UNKNOWN_SHARE = 0.01


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class _Parser(ArgumentParser):
    """The project's parser, with defaults in the help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **settings)


def main() -> int:
    """Run one command of `python -m data_prep`."""
    parser = _Parser(prog="python -m data_prep", description="Raw text -> HDF5 shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_text(commands)
    _add_vocab(commands)
    _add_shards(commands)
    _add_instances(commands)
    _add_inspect(commands)
    _add_verify(commands)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


def _add_command(commands: Any, name: str, run: Any, purpose: str, example: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=purpose, description=purpose, epilog=f"example: python -m data_prep {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _add_text(commands: Any) -> None:
    parser = _add_command(
        commands,
        "text",
        _run_text,
        "Turn dumps, extracted or plain text, JSON lines, tables or datasets into one sentence a "
        "line; what was broken off goes on after its last complete part.",
        "text --input enwiki-latest-pages-articles.xml.bz2 --output_dir data/text --workers 8",
    )
    defaults = TextConfig()
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files and folders, here or as URLs that fsspec knows; with --format hf names of "
        "Hugging Face datasets",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the text")
    parser.add_argument(
        "--format", choices=FORMATS, default=defaults.format, help="what the files hold"
    )
    parser.add_argument(
        "--text_field", default=defaults.text_field, help="key or column of the text"
    )
    parser.add_argument(
        "--document_break",
        choices=DOCUMENT_BREAKS,
        default=defaults.document_break,
        help="what ends a document in plain text; a .md is always one",
    )
    parser.add_argument(
        "--dataset_config_name",
        default=defaults.dataset_config_name,
        metavar="NAME",
        help="with --format hf: the dataset's configuration, where it has several",
    )
    parser.add_argument(
        "--dataset_split",
        default=defaults.dataset_split,
        metavar="NAME",
        help="with --format hf: the dataset's split",
    )
    parser.add_argument("--language", default=defaults.language, help="ISO 639 code of the text")
    _add_workers(parser)


def _add_vocab(commands: Any) -> None:
    parser = _add_command(
        commands,
        "vocab",
        _run_vocab,
        "Learn a WordPiece vocabulary from text.",
        "vocab --input_dir data/text --output data/vocab.txt",
    )
    parser.add_argument("--input_dir", type=Path, required=True, help="folder that text wrote")
    parser.add_argument("--output", type=Path, required=True, help="vocabulary file to write")
    parser.add_argument("--vocab_size", type=int, default=30522, help="number of tokens")
    _add_lower_case(parser)


def _add_shards(commands: Any) -> None:
    parser = _add_command(
        commands,
        "shards",
        _run_shards,
        "Make training and test shards; prints their folder last.",
        "shards --input_dir data/text --vocab_file data/vocab.txt --output_dir data/shards",
    )
    defaults = ShardsConfig()
    parser.add_argument("--input_dir", type=Path, required=True, help="folder that text wrote")
    parser.add_argument("--vocab_file", type=Path, required=True, help="vocabulary, a token a line")
    parser.add_argument("--output_dir", type=Path, required=True, help="the shards go below it")
    parser.add_argument("--name", default=defaults.name, help="folder and start of file names")
    parser.add_argument(
        "--n_training_shards", type=int, default=defaults.n_training_shards, help="training files"
    )
    parser.add_argument(
        "--n_test_shards", type=int, default=defaults.n_test_shards, help="held-out files"
    )
    parser.add_argument(
        "--fraction_test_set",
        type=float,
        default=defaults.fraction_test_set,
        help="share of the documents that is held out",
    )
    _add_row_flags(parser)
    _add_workers(parser)
    parser.add_argument(
        "--dask_scheduler",
        metavar="ADDR",
        help="use the workers of this Dask scheduler (tcp://host:8786) instead; they must see the "
        "same files",
    )


def _add_instances(commands: Any) -> None:
    parser = _add_command(
        commands,
        "instances",
        _run_instances,
        "Make one shard, row for row what NVIDIA's create_pretraining_data.py makes.",
        "instances --vocab_file vocab.txt --input_file book.txt --output_file book_training_0.hdf5",
    )
    parser.add_argument("--vocab_file", type=Path, required=True, help="vocabulary, a token a line")
    parser.add_argument(
        "--input_file",
        required=True,
        help="a file, a folder of .txt files, or a list of files with commas between them",
    )
    parser.add_argument("--output_file", type=Path, required=True, help="shard to write")
    _add_row_flags(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        _run_inspect,
        "Show rows as a person reads them, and statistics of the whole.",
        "inspect data/shards -n 3",
    )
    parser.add_argument("path", type=Path, help="a shard, or a folder of shards")
    parser.add_argument("-n", "--num_rows", type=int, default=5, help="rows to show")
    parser.add_argument(
        "--vocab_file", type=Path, help="needed only where no vocab.txt lies beside the shards"
    )


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands,
        "verify",
        _run_verify,
        "Check files against their manifest, shards without one against the layout.",
        "verify data/shards",
    )
    parser.add_argument("path", type=Path, metavar="DIR", help="a folder, searched downwards")


def _add_row_flags(parser: _Parser) -> None:
    """The flags of `InstanceConfig`, the seed and the case."""
    defaults = InstanceConfig()
    parser.add_argument(
        "--max_seq_length", type=int, default=defaults.max_seq_length, help="tokens a row"
    )
    parser.add_argument(
        "--max_predictions_per_seq",
        type=int,
        default=defaults.max_predictions_per_seq,
        help="most masked tokens a row",
    )
    parser.add_argument(
        "--masked_lm_prob", type=float, default=defaults.masked_lm_prob, help="share of masks"
    )
    parser.add_argument(
        "--short_seq_prob", type=float, default=defaults.short_seq_prob, help="share of short rows"
    )
    parser.add_argument(
        "--dupe_factor", type=int, default=defaults.dupe_factor, help="passes over the text"
    )
    parser.add_argument(
        "--random_seed", type=int, default=ShardsConfig().random_seed, help="of pairs and masks"
    )
    parser.add_argument("--whole_word_mask", action="store_true", help="mask all pieces of a word")
    parser.add_argument("--no_nsp", action="store_true", help="rows of one segment, no pairs")
    _add_lower_case(parser)


def _add_lower_case(parser: _Parser) -> None:
    parser.add_argument(
        "--do_lower_case",
        action="store_true",
        default=True,
        help="lower-case, strip accents (the default)",
    )
    parser.add_argument(
        "--no_do_lower_case",
        dest="do_lower_case",
        action="store_false",
        default=argparse.SUPPRESS,
        help="keep the text's case",
    )


def _add_workers(parser: _Parser) -> None:
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the result is the same"
    )


def _workers(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise ConfigError(f"--workers: wanted at least 1, got {arguments.workers}")
    workers: int = arguments.workers
    return workers


def _run_text(arguments: argparse.Namespace) -> int:
    from data_prep.extract import extract_text

    config = TextConfig(
        format=arguments.format,
        text_field=arguments.text_field,
        language=arguments.language,
        document_break=arguments.document_break,
        dataset_config_name=arguments.dataset_config_name,
        dataset_split=arguments.dataset_split,
    )
    summary = extract_text(
        arguments.input, arguments.output_dir, config, workers=_workers(arguments)
    )
    print(f"text: {_one_line(summary)} -> {arguments.output_dir}", file=sys.stderr)
    return 0


def _run_vocab(arguments: argparse.Namespace) -> int:
    from data_prep.sources import text_files
    from zerobert.tokenizer import train_vocabulary, vocabulary_text

    if arguments.input_dir.resolve() in arguments.output.resolve().parents:
        raise ConfigError(
            f"--output {arguments.output} lies inside --input_dir, where later commands would take "
            "it for text; choose a path outside"
        )
    files = text_files(arguments.input_dir)
    _make_room(arguments.output)
    vocab = train_vocabulary(
        files,
        vocab_size=arguments.vocab_size,
        do_lower_case=arguments.do_lower_case,
    )
    text = vocabulary_text(vocab)
    with writing(arguments.output):
        is_other = arguments.output.is_file() and arguments.output.read_bytes() != text.encode()
    if is_other:
        raise ConfigError(
            f"--output {arguments.output} exists and is another file; remove it or choose another"
        )
    write_text(arguments.output, text)
    if len(vocab) < arguments.vocab_size:
        print(
            f"note: the text gives {len(vocab):,} tokens, not {arguments.vocab_size:,}",
            file=sys.stderr,
        )
    print(f"vocab: {len(vocab):,} tokens -> {arguments.output}", file=sys.stderr)
    return 0


def _run_shards(arguments: argparse.Namespace) -> int:
    from data_prep.build import build_shards

    _tokenizer(arguments)
    config = ShardsConfig(
        name=arguments.name,
        n_training_shards=arguments.n_training_shards,
        n_test_shards=arguments.n_test_shards,
        fraction_test_set=arguments.fraction_test_set,
        random_seed=arguments.random_seed,
        do_lower_case=arguments.do_lower_case,
        instances=_instance_config(arguments),
    )
    folder, summary = build_shards(
        arguments.input_dir,
        arguments.vocab_file,
        arguments.output_dir,
        config,
        workers=_workers(arguments),
        dask_scheduler=arguments.dask_scheduler,
    )
    _warn_of_unknown(summary)
    print(f"shards: {_one_line(summary)}", file=sys.stderr)
    _print_path(folder)
    return 0


def _print_path(path: Path) -> None:
    """Print a path in the bytes that it has on disk, whatever stdout's encoding is, for a shell."""
    if sys.stdout is not None:  # closed by who started us
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")


def _run_instances(arguments: argparse.Namespace) -> int:
    from data_prep.build import build_instances

    config = _instance_config(arguments)
    tokenizer = _tokenizer(arguments)
    input_files = _input_files(arguments.input_file)
    taken = {path.resolve() for path in [*input_files, arguments.vocab_file]}
    if arguments.output_file.resolve() in taken:
        raise ConfigError(
            f"--output_file {arguments.output_file} is a file that is read; choose another"
        )
    _make_room(arguments.output_file)
    summary = build_instances(
        input_files,
        arguments.output_file,
        tokenizer,
        config,
        random_seed=arguments.random_seed,
    )
    _warn_of_unknown(summary)
    print(f"instances: {_one_line(summary)} -> {arguments.output_file}", file=sys.stderr)
    return 0


def _tokenizer(arguments: argparse.Namespace) -> "WordPieceTokenizer":
    """The tokenizer that the flags name; says where vocabulary and lower-casing can't belong."""
    from zerobert.tokenizer import WordPieceTokenizer

    tokenizer = WordPieceTokenizer.from_file(
        arguments.vocab_file, do_lower_case=arguments.do_lower_case
    )
    if tokenizer.do_lower_case and tokenizer.is_cased:
        print(
            f"warning: {tokenizer.cased_share:.0%} of the vocabulary's tokens have capitals, which "
            "lower-cased text never has; --no_do_lower_case keeps the text's",
            file=sys.stderr,
        )
    return tokenizer


def _make_room(file: Path) -> None:
    """Make the folder of an output file, and try it, before the long work and not after it."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass


def _run_inspect(arguments: argparse.Namespace) -> int:
    from data_prep.look import inspect_shards

    if arguments.num_rows < 0:
        raise ConfigError(f"-n: wanted at least 0, got {arguments.num_rows}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # it may not take every letter
    for line in inspect_shards(arguments.path, arguments.vocab_file, num_rows=arguments.num_rows):
        print(line)
    return 0


def _run_verify(arguments: argparse.Namespace) -> int:
    from data_prep.look import verify

    num_files, problems = verify(arguments.path)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"verify: {num_files} files, {len(problems)} broken", file=sys.stderr)
    return EXIT_USER if problems else 0


def _instance_config(arguments: argparse.Namespace) -> InstanceConfig:
    return InstanceConfig(
        max_seq_length=arguments.max_seq_length,
        max_predictions_per_seq=arguments.max_predictions_per_seq,
        masked_lm_prob=arguments.masked_lm_prob,
        short_seq_prob=arguments.short_seq_prob,
        dupe_factor=arguments.dupe_factor,
        whole_word_mask=arguments.whole_word_mask,
        no_nsp=arguments.no_nsp,
    )


def _input_files(value: str) -> list[Path]:
    """What `--input_file` names: a file, a folder's `.txt` files, or a list with commas."""
    from data_prep.sources import is_folder, local_source, text_files

    names = [value] if os.path.lexists(value) else value.split(",")
    if len(names) == 1 and is_folder(Path(names[0])):
        return text_files(Path(names[0]))
    files = [Path(name) for name in names]
    for path in files:
        local_source(path)
    return files


def _one_line(summary: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_figure(key, summary[key])}" for key in summary)


def _figure(key: str, value: float) -> str:
    return f"{value:.2%}" if key in ("unknown_share", "fill") else f"{value:,}"


def _warn_of_unknown(summary: dict[str, Any]) -> None:
    if summary["unknown_share"] > _HIGH_UNKNOWN_SHARE:
        print(
            f"warning: {summary['unknown_share']:.1%} of the tokens are [UNK]; "
            "is this the vocabulary of this text?",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)
