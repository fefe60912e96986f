"""A run's folders: `model_<step>/` for the world, `state_<step>/` to resume from, `latest`.

A folder is complete or absent; `latest` moves last.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import check_same_run
from zerobert import checkpoint, distributed, manifest
from zerobert.config import BertConfig
from zerobert.engine import Engine, precision
from zerobert.errors import CheckpointError, ConfigError, ManifestError, ZerobertError
from zerobert.tokenizer import WordPieceTokenizer

LATEST_NAME = "latest"
# DeepSpeed leaves them beside its checkpoints; model_<step>/ is what they would make.
_DEEPSPEED_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Where a run stands: all that changes in it beside weights and optimizer."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def advance(self, *, samples: int, tokens: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What is needed to write a run's folders.

    Attributes:
        identity: what a resumed run must agree in (`pretrain.config.identity`).
        inputs: name -> sha256 of the vocabulary and the data's manifests.
    """

    path: Path
    model: BertConfig
    tokenizer: WordPieceTokenizer
    resolved: Mapping[str, Any]
    identity: Mapping[str, Any]
    inputs: Mapping[str, str]
    keep_states: int


def save(engine: Engine, state: TrainState, run: RunFolder) -> None:
    """Write the model folder, then the state, then `latest`; collective.

    Raises:
        DataError: a folder can't be written (on rank 0; the launcher ends the others).
    """
    weights = engine.full_state()
    if distributed.is_main():
        _save_model(engine, weights, state, run)
    folder = run.path / f"state_{state.step}"
    staging = manifest.staging_path(folder)
    if distributed.is_main():
        shutil.rmtree(staging, ignore_errors=True)
        with manifest.writing(staging):
            staging.mkdir(parents=True)
    distributed.barrier()
    try:
        engine.save(staging, dataclasses.asdict(state))
        distributed.barrier()
        if distributed.is_main():
            for name in _DEEPSPEED_SCRIPTS:
                (run.path / name).unlink(missing_ok=True)
            config = {
                "step": state.step,
                "world_size": distributed.world_size(),
                "identity": dict(run.identity),
            }
            manifest.write_manifest(staging, kind="state", config=config, inputs=run.inputs)
            manifest.publish_folder(staging, folder)
            manifest.write_text(run.path / LATEST_NAME, folder.name + "\n")
            _prune(run.path, run.keep_states)
    except ZerobertError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    distributed.barrier()


def _save_model(
    engine: Engine, weights: Mapping[str, Any], state: TrainState, run: RunFolder
) -> None:
    facts = {
        "optimizer steps": state.step,
        "sequences": state.samples,
        "tokens": state.tokens,
        "training": "masked LM + next sentence prediction",
        "precision": precision(run.resolved),
    }
    checkpoint.save_model(
        run.path / f"model_{state.step}",
        engine.module,
        run.model,
        run.tokenizer,
        card=checkpoint.model_card(title="BERT pretrained with zerobert", facts=facts),
        state=weights,
        source=run.resolved,
        inputs=run.inputs,
    )


def _prune(path: Path, keep: int) -> None:
    for folder in _states(path)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _states(path: Path) -> list[Path]:
    """Complete states, newest first."""
    found = [
        folder
        for folder in path.glob("state_*")
        if re.fullmatch(r"state_\d+", folder.name) and manifest.is_complete(folder)
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("state_")), reverse=True)


def find_state(path: Path, resume: str) -> Path | None:
    """The state to resume from, its checksums verified; None to start anew.

    A damaged newest state falls back to the one before it, and says so.

    Args:
        resume: `auto`, `never`, or the path of a state folder.

    Raises:
        CheckpointError: the state that was named can't be used, or all there are, are damaged.
    """
    if resume == "never":
        return None
    candidates = _states(path) if resume == "auto" else [Path(resume)]
    problems = []
    for folder in candidates:
        try:
            _check_state(folder)
        except ManifestError as error:
            print(f"warning: {folder} is not used: {error}", flush=True)
            problems.append(str(error))
        else:
            return folder
    if problems:
        raise CheckpointError(
            f"no usable training state: {problems[0]}; "
            "name another with --resume, or start over with --resume never"
        )
    return None


def _check_state(folder: Path) -> None:
    kind = manifest.verify_folder(folder).kind
    if kind != "state":
        raise ManifestError(f"{folder} is a {kind} folder, wanted state_<step>")


def saved_step(folder: Path) -> int:
    """The optimizer step that a state was saved at."""
    return int(manifest.read_manifest(folder).config["step"])


def micro_batch_of(path: Path) -> int | None:
    """The micro-batch of the run that lies in a folder; None where none has been saved."""
    newest = next(iter(_states(path)), None)
    if newest is None:
        return None
    identity = manifest.read_manifest(newest).config["identity"]
    return int(identity["train_micro_batch_size_per_gpu"])


def check_resumable(folder: Path, run: RunFolder) -> None:
    """Hold a state against the run that is to go on from it.

    Raises:
        ConfigError: the state is of a run with other settings or another number of processes.
    """
    saved = manifest.read_manifest(folder).config
    check_same_run(saved["identity"], run.identity, str(folder))
    if saved["world_size"] != distributed.world_size():
        raise ConfigError(
            f"{folder} was saved by {saved['world_size']} processes, this run has "
            f"{distributed.world_size()}; resume with --n_gpu {saved['world_size']}"
        )


def restore(engine: Engine, folder: Path) -> TrainState:
    """Bring an engine to where a state was saved; collective.

    Raises:
        CheckpointError: the state can't be loaded.
    """
    client_state = engine.load(folder)
    return TrainState(
        **{field.name: client_state[field.name] for field in dataclasses.fields(TrainState)}
    )


def claim(path: Path) -> None:
    """Make a run's folder, and keep other runs out of it for as long as this process lives.

    Raises:
        ConfigError: another run is writing into the folder.
        DataError: the folder can't be made.
    """
    with manifest.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = manifest.try_lock(path)  # stays open: the claim ends with this process
    if descriptor is None:
        raise ConfigError(
            f"another run is writing into {path}; wait for its end or choose another --output_dir"
        )
    for leftover in manifest.leftovers(path):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def supersede(path: Path, resumed: Path) -> None:
    """Rename the states beyond the one that a run goes on from: they are not its own."""
    for folder in _states(path):
        if saved_step(folder) > saved_step(resumed):
            with manifest.writing(folder):
                folder.rename(folder.with_name(f"superseded-{folder.name}"))


def set_aside(path: Path) -> Path | None:
    """Move an earlier run's folder out of the way of one that starts anew; nothing is deleted.

    Returns:
        Where it went; None where there was no run.
    """
    if not _states(path) and not list(path.glob(f"model_*/{manifest.MANIFEST_NAME}")):
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    with manifest.writing(aside):
        path.rename(aside)
    return aside
