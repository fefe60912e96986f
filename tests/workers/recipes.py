"""Train two steps of every experiment in a folder, as `pretrain/run.py` would, and write down what
was done.

argv: the folder with the JSONs, the folder with shards, and the file for the findings: of each JSON
what every update was given, and how the optimizer and DeepSpeed were set.
"""

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pretrain import experiment, training
from pretrain.config import PretrainConfig
from pretrain.run import parse_args
from zerobert.engine import Engine, init_distributed, leave_distributed
from zerobert.errors import EXIT_TERMINATED

Findings = dict[str, Any]


class RecordedEngine(Engine):
    """Writes down what the training loop asks of the engine."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any]
    ) -> None:
        super().__init__(model, optimizer, ds_config)
        self.found: Findings = {
            "optimizer": type(optimizer).__name__,
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
            "clipping": self._engine.gradient_clipping(),
            "stage": self._engine.zero_optimization_stage(),
            "sizes": [
                self.global_batch_samples,
                self.micro_batch_samples,
                self.accumulation_steps,
            ],
            "dropout": sorted({m.dropout_p for m in model.modules() if hasattr(m, "dropout_p")}),
            "has_nsp": model.has_nsp,
            "rows": [],
            "rates": [],
        }

    def forward(self, **batch: torch.Tensor) -> Any:
        self.found["rows"].append(len(batch["input_ids"]))
        return super().forward(**batch)

    def step(self, lr: float) -> None:
        is_update = self.at_boundary
        super().step(lr)
        if is_update:
            self.found["rates"].append([group["lr"] for group in self._optimizer.param_groups])


def train(path: Path, shards: Path, out: Path) -> Findings:
    """Two steps of a run whose length, and so its schedule, is the recipe's own."""
    flags = ["--deepspeed_config", str(path), "--input_dir", str(shards), "--output_dir", str(out)]
    args = parse_args([*flags, "--precision", "fp32", "--logging_steps", "1"])
    run = experiment.prepare(args)
    stop = types.SimpleNamespace(exit_code=0)
    asked: list[tuple[int, float]] = []
    engines: list[RecordedEngine] = []
    rate = PretrainConfig.rate

    def recorded_rate(
        config: PretrainConfig, step: int, elapsed_s: float, *, total_steps: int | None
    ) -> float:
        asked.append((step, elapsed_s))
        stop.exit_code = EXIT_TERMINATED  # seen by the next step, which is then the last
        return rate(config, step, elapsed_s, total_steps=total_steps)

    def recorded_engine(*given: Any) -> RecordedEngine:
        engines.append(RecordedEngine(*given))
        return engines[0]

    with (
        mock.patch.object(PretrainConfig, "rate", recorded_rate),
        mock.patch.object(training, "Engine", recorded_engine),
    ):
        code = training.train(run, args, stop)  # type: ignore[arg-type]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return {
        **engines[0].found,
        "asked": asked,
        "code": code,
        "metrics": [line for line in metrics if "train/loss" in line],
        "facts": run.facts(),
        "kept": sorted(entry.name for entry in out.iterdir()),
        "resolved": run.folder.resolved["bert"],
        "model": dataclasses.asdict(run.folder.model),
    }


def main() -> None:
    recipes, shards, findings = map(Path, sys.argv[1:4])
    init_distributed()
    found = {
        path.stem: train(path, shards, findings.parent / "runs" / path.stem)
        for path in sorted(recipes.glob("*.json"))
    }
    findings.write_text(json.dumps(found))
    leave_distributed()


if __name__ == "__main__":
    main()
