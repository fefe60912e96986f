"""The README's figures, out of the newest reports: `python benchmarks/readme.py` rewrites them.

A test fails where README.md says anything else.
"""

import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: benchmarks/readme.py -->\n", "<!-- end of figures -->\n"
Row = tuple[str, str, str, str]
# Of reports from before they recorded all that was asked for.
DEFAULTS = {"size": "base", "task": "SST-2", "precision": "fp32"}


def newest(theme: str, has: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The newest report of a theme that has these figures: all of them and its file; None for none.

    Args:
        has: figure -> its value, or None for any.

    Raises:
        ValueError: two of one date and of different commits, of which none is the newest.
    """
    found = []
    for path in (ROOT / "benchmarks").glob(f"{theme}_*_20*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        dtypes = [word for word in path.stem.split("_") if word in ("fp32", "bf16")]
        figures = {**DEFAULTS, "dtype": "".join(dtypes), **record.get("arguments", {}), **record}
        if all(key in figures and value in (None, figures[key]) for key, value in has.items()):
            found.append((figures["date"], path.stem, figures))
    if not found:
        return None
    date, stem, figures = max(found, key=lambda each: each[:2])
    for other_date, other, record in found:
        if other_date == date and record.get("commit") != figures.get("commit"):
            raise ValueError(f"{stem} and {other} are both of {date}; give one its time of day")
    return figures, f"{stem}.md"


def data_preparation(figures: Mapping[str, Any]) -> Iterator[Row]:
    """CPU time of the shards of one file."""
    ours, nvidia = (figures["single_file"][name] for name in ("zerobert", "NVIDIA"))
    seconds = [statistics.median(each["cpu_s"]) for each in (ours, nvidia)]
    yield (
        "shards from 10 MB of text",
        f"{seconds[0]:.1f} s of CPU, {ours['peak_mb']:.0f} MB",
        f"NVIDIA's create_pretraining_data.py: {seconds[1]:.1f} s, {nvidia['peak_mb']:.0f} MB",
        f"{ours['ratio']:.0f}",
    )


def loader(figures: Mapping[str, Any]) -> Iterator[Row]:
    """Samples a second, out of shards as we write them and out of NVIDIA's."""
    runs = {name: [run["rate"] for run in each] for name, each in figures["runs"].items()}
    for layout in ("own", "NVIDIA's"):
        mine = runs[f"{layout} shards: zerobert"]
        peers = [rates for name, rates in runs.items() if name.startswith(f"{layout} shards: NV")]
        best = max(peers, key=statistics.median)
        yield (
            f"samples out of {layout} shards",
            f"{statistics.median(mine):,.0f} a second",
            f"NVIDIA's loader at its best: {statistics.median(best):,.0f}",
            f"{measure.ratio(mine, best):.0f}",
        )


def train_step(figures: Mapping[str, Any], size: str, dtype: str) -> Iterator[Row]:
    """Training steps, a tenth of them padding."""
    rates = figures[f"{size} 0.9"]["samples_per_s"]
    mine = rates["zerobert"]
    peers = {"Hugging Face sdpa": "Hugging Face's BERT", "NVIDIA": "NVIDIA's BERT"}
    for name, words in peers.items():
        yield (
            f"training BERT-{size} in {dtype}, rows of 128 filled to 90 %",
            f"{statistics.median(mine):.2f} rows/s",
            f"{words}: {statistics.median(rates[name]):.2f}",
            f"{measure.ratio(mine, rates[name]):.2f}",
        )


def optimizer_step(figures: Mapping[str, Any]) -> Iterator[Row]:
    """LAMB on BERT-base's parameters."""
    seconds = figures["base"]["seconds"]
    mine = seconds["zerobert.optim.Lamb"]
    other = seconds["plain"]
    yield (
        "LAMB on BERT-base's parameters",
        f"{1e3 * statistics.median(mine):.0f} ms",
        f"the same in plain torch, our own: {1e3 * statistics.median(other):,.0f} ms",
        f"{measure.ratio(other, mine):.0f}",
    )


def finetuning(figures: Mapping[str, Any], precision: str) -> Iterator[Row]:
    """Sentences a second of SST-2."""
    rates = figures["sentences_per_s"]
    mine = rates["zerobert"]
    for name, other in rates.items():
        if name != "zerobert":
            yield (
                f"fine-tuning on SST-2 in {precision}",
                f"{statistics.median(mine):.0f} sentences/s",
                f"Hugging Face's {name}: {statistics.median(other):.0f}",
                f"{measure.ratio(mine, other):.1f}",
            )


def engine_overhead(figures: Mapping[str, Any]) -> Iterator[Row]:
    """A step under DeepSpeed's engine, beside the same without it."""
    seconds = figures["seconds"]
    bare = seconds["bare loop"]
    for name, mine in seconds.items():
        if name != "bare loop":
            yield (
                f"a step of `pretrain`, BERT-base, {name}",
                f"{1e3 * statistics.median(mine):,.0f} ms",
                f"a bare loop of torch: {1e3 * statistics.median(bare):,.0f} ms",
                f"{measure.ratio(bare, mine):.2f}",
            )


# Theme, what its report must have, and how it is told.
SOURCES: list[tuple[str, dict[str, Any], Callable[[Mapping[str, Any]], Iterator[Row]]]] = [
    ("data_preparation", {"single_file": None}, data_preparation),
    ("loader", {"runs": None}, loader),
    *(
        (
            "train_step",
            {f"{size} 0.9": None, "dtype": dtype},
            functools.partial(train_step, size=size, dtype=dtype),
        )
        for size, dtype in (("base", "bf16"), ("mini", "bf16"), ("base", "fp32"))
    ),
    ("optimizer_step", {"base": None}, optimizer_step),
    ("engine_overhead", {"seconds": None, "size": "base"}, engine_overhead),
    *(
        (
            "finetuning",
            {"sentences_per_s": None, "task": "SST-2", "precision": precision},
            functools.partial(finetuning, precision=precision),
        )
        for precision in ("bf16", "fp32")
    ),
]


def figures_table() -> str:
    """The README's table."""
    rows: list[Sequence[str]] = []
    for theme, has, tell in SOURCES:
        if found := newest(theme, has):
            figures, file = found
            machine = figures.get("gpu") or figures["hardware"]
            if name := figures.get("arguments", {}).get("hardware"):
                machine += f" ({name.split('_')[0]})"
            for row in tell(figures):
                rows.append((*row[:3], f"[{row[3]} x](benchmarks/{file})", machine))
    note = (
        "Medians, and their ratio. Plain torch and the bare loop are ours, written without the "
        "fast paths or the engine: no peer of anyone's. Machines have their names in brackets; "
        "rows of different ones do not compare.\n\n"
    )
    return note + measure.table(("", "here", "beside", "", "on"), rows) + "\n"


def rewritten(text: str) -> str:
    """README.md with the figures of the newest reports."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the line {BEGIN.strip()} or {END.strip()}")
    return head + begin + figures_table() + end + tail


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
