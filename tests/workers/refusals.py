"""Start an engine, and train it at a loss scale, where that can't go well.

argv: a JSON file with cases, and the file that rank 0 writes its findings to: of each case's `ds`
the `error` that ended it, and after each of up to `steps` the `scales` and number of `skipped`
steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from tests.workers.exactness import ACCUMULATION, global_batches, loss_of, parts, start
from zerobert import distributed
from zerobert.engine import init_distributed, leave_distributed
from zerobert.errors import ZerobertError


def run(case: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"error": None, "scales": [], "skipped": []}
    rank, ranks = distributed.rank(), distributed.world_size()
    optimizer = {"type": "Lamb", "params": {"lr": 5e-3}}
    try:
        engine, _ = start({"ds": case["ds"], "optimizer": optimizer})
        for batch in global_batches(case["steps"]):
            for micro in parts(batch, ACCUMULATION * ranks)[rank::ranks]:
                engine.backward(loss_of(engine.forward, micro, engine.device))
                engine.step(5e-3)
            found["scales"].append(engine.loss_scale)
            found["skipped"].append(engine.skipped_steps)
        engine.close()
    except ZerobertError as error:
        found["error"] = [type(error).__name__, str(error)]
    return found


def main() -> None:
    cases, findings = sys.argv[1:]
    init_distributed()
    get_accelerator().is_fp16_supported = lambda: True
    found = [run(case) for case in json.loads(Path(cases).read_text())]
    if distributed.is_main():
        Path(findings).write_text(json.dumps(found))
    leave_distributed()


if __name__ == "__main__":
    main()
