"""Raw Wikipedia text to a fine-tuned BERT, in minutes, on a machine with two cores and no GPU.

Every stage shows the command that does it. A demo that was stopped goes on where it was when it is
started again.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from zerobert.errors import expect_interrupts

    expect_interrupts()

from demo import results, stages
from demo.pipeline import Stage, remove, run_stages
from zerobert.errors import EXIT_TERMINATED, ArgumentParser, ConfigError, run_script
from zerobert.manifest import writing
from zerobert.page import format_table

RECORDS_NAME = "records"


def main() -> int:
    """Run the command line."""
    parser = ArgumentParser(
        prog="bash launch.sh demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes"
    )
    parser.add_argument(
        "--max_steps", type=positive, default=stages.MAX_STEPS, help="pretraining steps"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; only what was downloaded is kept"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    return run(args.output_dir, args.max_steps, is_fresh=args.fresh)


def run(root: Path, max_steps: int, *, is_fresh: bool) -> int:
    """The whole demo; returns the exit code of the stage that failed, or 0."""
    started = time.monotonic()
    plan = stages.plan(root, max_steps)
    check_folder(root, plan)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if is_fresh:
            clear(root, plan)
    code, records = run_stages(plan, root / RECORDS_NAME)
    if code:
        return code
    unigram = results.unigram_loss(root)
    tables = [results.language_table(root, unigram), results.task_table(root)]
    page = results.write_page(root, plan, records, tables, unigram=unigram)
    print("\n" + "\n\n".join(format_table(table) for table in tables) + "\n")
    if (note := results.task_note(root, max_steps)) is not None:
        print(note + "\n")
    print(f"curves: {page}\nmodel:  {stages.model_folder(root, max_steps)}")
    print(f"{time.monotonic() - started:.0f} s; --fresh does it all again")
    return 0


def check_folder(root: Path, plan: Sequence[Stage]) -> None:
    """Refuse a folder with files that a demo would take for its own.

    Raises:
        ConfigError: names it.
    """
    with writing(root):
        there = {path.name for path in root.iterdir()} if root.exists() else set()
    sources, *later = plan
    if RECORDS_NAME not in there and there - {sources.output.name}:
        names = ", ".join(stage.output.name for stage in later)
        raise ConfigError(
            f"--output_dir {root}: there are files in it, and the demo writes {names} and others; "
            "name a folder of its own"
        )


def clear(root: Path, plan: Sequence[Stage]) -> None:
    """Remove what the demo wrote and nothing else; what was downloaded stays."""
    _sources, *later = plan
    for path in (*(stage.output for stage in later), root / "logs", root / results.PAGE_NAME):
        remove(path)


def positive(text: str) -> int:
    """A number of steps."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _terminate(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that the running stage is ended too."""
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    run_script(main)
