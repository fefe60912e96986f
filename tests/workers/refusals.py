"""Start an engine, and train it at a loss scale, where that can't go well.

argv: a JSON file with cases, and the file that rank 0 writes its findings to: of each case's `ds`
the `error` that ended it, and after each of up to `steps` the `scales`, the number of `skipped`
steps and the `weights` of one bias. At the steps that `infinite` names the loss has no end.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from tests.workers.exactness import ACCUMULATION, global_batches, loss_of, parts, start
from zerobert import distributed
from zerobert.engine import Engine, init_distributed, leave_distributed
from zerobert.errors import ZerobertError
from zerobert.training_state import WEIGHTS


def run(case: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"error": None, "scales": [], "skipped": [], "weights": []}
    rank, ranks = distributed.rank(), distributed.world_size()
    optimizer = {"type": "Lamb", "params": {"lr": 5e-3}}
    try:
        engine, _ = start({"ds": case["ds"], "optimizer": optimizer})
        for step, batch in enumerate(global_batches(case["steps"]), start=1):
            factor = math.inf if step in case.get("infinite", ()) else 1.0
            for micro in parts(batch, ACCUMULATION * ranks)[rank::ranks]:
                engine.backward(loss_of(engine.forward, micro, engine.device) * factor)
                engine.step(5e-3)
            found["scales"].append(engine.loss_scale)
            found["skipped"].append(engine.skipped_steps)
            found["weights"].append(bias_of(engine))
        engine.close()
    except ZerobertError as error:
        found["error"] = [type(error).__name__, str(error)]
    return found


def bias_of(engine: Engine) -> list[float]:
    """The fp32 weights of the MLM head's bias that this rank holds, of all at stage 0."""
    pieces = {piece.name: piece for piece in engine.snapshot().pieces}
    piece = pieces.get("cls.predictions.bias")
    return piece.values[WEIGHTS].tolist() if piece else []


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
