"""Fine-tune a pretrained model on a GLUE task, on all of them, or on your own data.

python finetune/run_glue.py --task_name SST-2 --data_dir data/glue

python finetune/run_glue.py --task_name custom --train_file train.csv --dev_file dev.csv
    --text_columns review --label_column stars

Without `--model_name_or_path` it takes the newest pretrained model under `runs/`.
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

from zerobert.errors import ArgumentParser, run_script, truth
from zerobert.launcher import start
from zerobert.signals import StopRequest


def build_parser() -> argparse.ArgumentParser:
    """The command line; PaddleNLP's flags keep their names and meaning."""
    parser = ArgumentParser(
        prog="finetune/run_glue.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--task_name",
        required=True,
        help="a GLUE task in any usual spelling, glue for all, or custom",
    )
    add("--model_type", choices=["bert"], default="bert")
    add(
        "--model_name_or_path",
        help="a model folder or a hub name (default: the newest under runs/)",
    )
    add(
        "--random_init",
        action="store_true",
        help="that model's architecture and vocabulary, new weights",
    )
    add(
        "--data_dir",
        type=Path,
        help="the task's folder or the GLUE folder (default: $GLUE_DIR, data/glue, the hub)",
    )
    add("--output_dir", type=Path, help="default: runs/finetune/TASK")
    add("--max_seq_length", type=int, help="default: 128, or the model's limit")
    add("--batch_size", type=int, help="of each process; default: the task's, 32")
    add("--learning_rate", type=float, help="default: the task's, 2e-5")
    add("--num_train_epochs", type=float, help="default: the task's, 3 (MRPC and WNLI 5)")
    add("--max_steps", type=int, default=-1, help="end earlier; -1 for no limit (default)")
    # Source of the defaults: google-research/bert run_classifier.py and optimization.py.
    add("--warmup_proportion", type=float, default=0.1, help="share of the steps (default: 0.1)")
    add("--warmup_steps", type=int, help="wins over the proportion")
    add(
        "--layer_decay",
        type=float,
        help="factor of the rate from each layer to the one below, as 0.9 (default: one rate)",
    )
    add("--weight_decay", type=float, help="default: 0.01")
    add("--adam_epsilon", type=float, help="default: 1e-6")
    add("--max_grad_norm", type=float, help="0: none; default: 1.0")
    add("--logging_steps", type=int, default=100, help="default: 100")
    add(
        "--save_steps",
        type=int,
        help="evaluate and save into step_N/ (default: evaluate after each epoch, save at the end)",
    )
    add("--seed", type=int, default=42, help="default: 42")
    add("--seeds", help="several runs, as 1,2,3: the best is kept, result.json has the median too")
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
    add(
        "--early_stopping_patience",
        type=int,
        metavar="N",
        help="end after N evaluations in a row without a better one; the best model is kept",
    )
    add("--load_best_model_at_end", action="store_true", help="keep the best model, not the last")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on with a training that was ended before its time (default: auto)",
    )
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the JSON's, or fp32")
    add(
        "--n_gpu",
        type=int,
        help="more than 1 starts so many processes; 0 is the CPU (default: one process)",
    )
    add("--deepspeed_config", metavar="JSON", help="DeepSpeed's settings; flags stand above it")
    add("--device", choices=("cpu", "gpu"), help="default: what there is")
    add("--use_amp", type=truth, metavar="BOOL", help="true: fp16 with fp32 masters; false: fp32")
    add("--scale_loss", type=float, metavar="X", help="first loss scale of fp16, a power of 2")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
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
    num_ranks = 0 if args.device == "cpu" else args.n_gpu
    return start(Path(__file__), sys.argv[1:], num_ranks, lambda stop: _work(args, stop))


def _work(args: argparse.Namespace, stop: StopRequest) -> int:
    from finetune import experiment  # takes seconds to import: a wrong flag is told before

    return experiment.run(args, stop)


if __name__ == "__main__":
    run_script(main)
