"""Fine-tune a pretrained model on SQuAD v1.1: questions whose answer is a piece of a paragraph.

python finetune/run_squad.py --data_dir data/squad

The folder holds the official train-v1.1.json and dev-v1.1.json. Without `--model_name_or_path` it
takes the newest pretrained model under `runs/`.
"""

import argparse
import functools
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

from finetune.flags import add_training_flags, ranks_asked_for
from zerobert.errors import ArgumentParser, run_script, truth
from zerobert.launcher import start
from zerobert.signals import StopRequest


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags that google-research/bert or PaddleNLP have, too, mean the same."""
    parser = ArgumentParser(
        prog="finetune/run_squad.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("data/squad"), help="default: data/squad")
    add("--train_file", type=Path, help="default: train-v1.1.json there")
    add("--predict_file", type=Path, help="default: dev-v1.1.json there")
    for name, what in (
        ("--do_train", "train and answer, as without it"),
        ("--do_predict", "without --do_train: answer only, with a model of SQuAD's"),
    ):
        add(name, type=truth, nargs="?", const=True, default=False, metavar="BOOL", help=what)
    # Source of the defaults: google-research/bert run_squad.py.
    add("--max_seq_length", type=int, help="default: 384, or the model's limit")
    add("--doc_stride", type=int, default=128, help="pieces between windows' starts (default: 128)")
    add("--max_query_length", type=int, default=64, help="pieces of a question (default: 64)")
    add("--n_best_size", type=int, default=20, help="starts and ends that are tried (default: 20)")
    add("--max_answer_length", type=int, default=30, help="in pieces (default: 30)")
    add_training_flags(parser, batch_size="12", learning_rate="3e-5", num_epochs="2")
    return parser


def main() -> int:
    """Run the command line."""
    args = build_parser().parse_args()
    work = functools.partial(_work, args)
    return start(Path(__file__), sys.argv[1:], ranks_asked_for(args), work)


def _work(args: argparse.Namespace, stop: StopRequest) -> int:
    from finetune import squad_job  # takes seconds to import: a wrong flag is told before

    return squad_job.run(args, stop)


if __name__ == "__main__":
    run_script(main)
