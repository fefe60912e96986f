"""Fine-tune a pretrained model on a GLUE task, on all of them, or on your own data.

python finetune/run_glue.py --task_name SST-2 --data_dir data/glue

python finetune/run_glue.py --task_name custom --train_file train.csv --dev_file dev.csv
    --text_columns review --label_column stars

Without `--model_name_or_path` it takes the newest pretrained model under `runs/`.
"""

import argparse
import functools
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

from finetune.flags import add_training_flags, ranks_asked_for, refuse_flags
from zerobert.errors import ArgumentParser, run_script
from zerobert.launcher import start
from zerobert.signals import StopRequest


def build_parser() -> argparse.ArgumentParser:
    """The command line; PaddleNLP's flags keep their names and meaning."""
    parser = ArgumentParser(
        prog="finetune/run_glue.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--task_name",
        required=True,
        help="a GLUE task in any usual spelling, glue for all, or custom",
    )
    add(
        "--data_dir",
        type=Path,
        help="the task's folder or the GLUE folder (default: $GLUE_DIR, data/glue, the hub)",
    )
    add("--max_seq_length", type=int, help="default: 128, or the model's limit")
    add(
        "--from_mnli",
        action="store_true",
        help="RTE, MRPC and STS-B start from the model fine-tuned on MNLI, as RoBERTa's did",
    )
    add(
        "--do_predict",
        action="store_true",
        help="write the test set's answers as the GLUE server takes them",
    )
    seeds = add_training_flags(
        parser,
        batch_size="the task's, 32",
        learning_rate="the task's, 2e-5",
        num_epochs="the task's, 3 (MRPC and WNLI 5)",
    )
    seeds.add_argument(
        "--seeds", help="several runs, as 1,2,3: the best is kept, result.json has the median too"
    )
    refuse_flags(parser, {"--do_train": "leave it out: a task that has a training set is trained"})
    own = parser.add_argument_group("your own data (--task_name custom): TSV, CSV or JSONL")
    own.add_argument("--train_file", type=Path)
    own.add_argument("--dev_file", type=Path)
    own.add_argument("--test_file", type=Path, help="for --do_predict")
    own.add_argument("--text_columns", help="one column, or two as a,b")
    own.add_argument("--label_column")
    own.add_argument("--regression", action="store_true", help="the label is a number, not a class")
    return parser


def main() -> int:
    """Parse, hand over to the launcher where several processes are wanted, else train."""
    args = build_parser().parse_args()
    work = functools.partial(_work, args)
    return start(Path(__file__), sys.argv[1:], ranks_asked_for(args), work)


def _work(args: argparse.Namespace, stop: StopRequest) -> int:
    from finetune import experiment  # takes seconds to import: a wrong flag is told before

    return experiment.run(args, stop)


if __name__ == "__main__":
    run_script(main)
