"""Which state a run resumes from, what it keeps, and what happens to an earlier run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import state as run_state
from pretrain.state import RunFolder, TrainState, find_state, set_aside
from zerobert import manifest
from zerobert.config import BertConfig
from zerobert.errors import CheckpointError, ConfigError, DataError
from zerobert.model import BertForPreTraining
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

CONFIG = BertConfig(
    vocab_size=6,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=4,
    max_position_embeddings=8,
)
IDENTITY = {"total_steps": 8, "bert.run.seed": 1}


class FakeEngine:
    """An engine whose state is one small file."""

    def __init__(self) -> None:
        self.module = BertForPreTraining(CONFIG)
        self.refusal: DataError | None = None

    def full_state(self) -> dict[str, torch.Tensor]:
        return dict(self.module.state_dict())

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        (folder / "engine.json").write_text(json.dumps(client_state))
        if self.refusal:
            raise self.refusal

    def load(self, folder: Path) -> dict[str, Any]:
        return {**json.loads((folder / "engine.json").read_text()), "deepspeed's own": 1}


def make_run(path: Path, *, keep_states: int = 2, **identity: object) -> RunFolder:
    return RunFolder(
        path=path,
        model=CONFIG,
        tokenizer=WordPieceTokenizer([*SPECIAL_TOKENS, "a"], do_lower_case=True),
        resolved={"bf16": {"enabled": True}},
        identity={**IDENTITY, **identity},
        inputs={"vocab.txt": "ab"},
        keep_states=keep_states,
    )


def save_steps(path: Path, *steps: int, keep_states: int = 10) -> None:
    engine: Any = FakeEngine()
    for step in steps:
        state = TrainState(step=step, samples=4 * step, tokens=9 * step, elapsed_s=1.5)
        run_state.save(engine, state, make_run(path, keep_states=keep_states))


def damage(folder: Path) -> None:
    """One flipped byte: only the checksum can tell."""
    data = bytearray((folder / "engine.json").read_bytes())
    data[-2] ^= 1
    (folder / "engine.json").write_bytes(data)


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir())


def test_advancing_counts_steps_samples_and_tokens() -> None:
    state = TrainState()
    state.advance(samples=8, tokens=100)
    state.advance(samples=8, tokens=90)
    assert state == TrainState(step=2, samples=16, tokens=190)


def test_a_save_makes_a_model_a_state_and_points_to_it(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 3)
    path = tmp_path / "run"
    assert folders(path) == ["latest", "model_3", "state_3"]
    assert (path / "latest").read_text() == "state_3\n"
    written = manifest.verify_folder(path / "state_3")
    assert (written.kind, written.config) == (
        "state",
        {"step": 3, "world_size": 1, "identity": IDENTITY},
    )
    assert run_state.saved_step(path / "state_3") == 3
    assert manifest.verify_folder(path / "model_3").kind == "model"
    card = (path / "model_3" / "README.md").read_text()
    assert "| optimizer steps | 3 |" in card
    assert "| precision | bf16 |" in card


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    engine: Any = FakeEngine()
    run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path))
    got = run_state.restore(engine, tmp_path / "state_3")
    assert got == TrainState(step=3, samples=12, tokens=27, elapsed_s=1.5)


def test_other_settings_or_processes_are_not_resumed(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    other = make_run(tmp_path, **{"bert.run.seed": 2})
    with pytest.raises(ConfigError, match=r"bert\.run\.seed was 1, is 2"):
        run_state.check_resumable(tmp_path / "state_3", other)
    path = tmp_path / "state_3" / "manifest.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 4'))
    with pytest.raises(
        ConfigError, match="saved by 4 processes, this run has 1; resume with --n_gpu 4"
    ):
        run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path))


def test_a_save_that_fails_leaves_the_last_state_in_charge(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    engine: Any = FakeEngine()
    engine.refusal = DataError("no space")
    with pytest.raises(DataError, match="no space"):
        run_state.save(engine, TrainState(step=6), make_run(tmp_path))
    assert "state_6" not in folders(tmp_path)
    assert not [name for name in folders(tmp_path) if name.startswith(".")]
    assert (tmp_path / "latest").read_text() == "state_3\n"
    assert find_state(tmp_path, "auto") == tmp_path / "state_3"


def test_only_the_newest_states_are_kept_and_all_models(tmp_path: Path) -> None:
    save_steps(tmp_path, 8, 9, 10, 11, keep_states=2)  # as text, 8 comes after 10
    names = folders(tmp_path)
    assert [name for name in names if "state" in name] == ["state_10", "state_11"]
    assert [name for name in names if "model" in name] == [
        "model_10",
        "model_11",
        "model_8",
        "model_9",
    ]


def test_the_newest_complete_state_is_found(tmp_path: Path) -> None:
    save_steps(tmp_path, 8, 9, 10)
    (tmp_path / "state_11").mkdir()  # no manifest: never completed
    (tmp_path / ".incomplete-state_12").mkdir()
    (tmp_path / "state_x").mkdir()
    assert find_state(tmp_path, "auto") == tmp_path / "state_10"


def test_nothing_to_resume_is_a_new_start(tmp_path: Path) -> None:
    assert find_state(tmp_path / "nowhere", "auto") is None
    (tmp_path / "state_11").mkdir()
    assert find_state(tmp_path, "auto") is None


def test_never_looks_at_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    assert find_state(tmp_path, "never") is None


def test_a_damaged_newest_state_falls_back_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 3, 6)
    damage(tmp_path / "state_6")
    assert find_state(tmp_path, "auto") == tmp_path / "state_3"
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path / 'state_6'} is not used: ")
    assert "engine.json: its contents differ" in said


def test_if_all_states_are_damaged_nothing_is_started(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6)
    damage(tmp_path / "state_3")
    damage(tmp_path / "state_6")
    with pytest.raises(
        CheckpointError, match=r"no usable training state: .*state_6.*--resume never"
    ):
        find_state(tmp_path, "auto")


def test_a_state_that_is_named_is_taken_from_wherever_it_lies(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", 3, 6)
    assert find_state(tmp_path / "b", str(tmp_path / "a" / "state_3")) == tmp_path / "a" / "state_3"


def test_a_named_state_that_is_not_usable_is_not_replaced_by_another(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6)
    damage(tmp_path / "state_6")
    with pytest.raises(CheckpointError, match=r"state_6/engine\.json: its contents differ"):
        find_state(tmp_path, str(tmp_path / "state_6"))


def test_a_named_state_that_is_none_is_told_apart(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"there is no folder .*state_99"):
        find_state(tmp_path, str(tmp_path / "state_99"))
    with pytest.raises(CheckpointError, match=r"model_3 is a model folder, wanted state_<step>"):
        find_state(tmp_path, str(tmp_path / "model_3"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no manifest\.json: it was never"):
        find_state(tmp_path, str(tmp_path / "empty"))


def test_an_earlier_run_is_set_aside_and_kept_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_steps(run, 3)
    before = folders(run)
    assert set_aside(run) == tmp_path / "run.old-1"
    assert not run.exists()
    assert folders(tmp_path / "run.old-1") == before
    save_steps(run, 6)
    assert set_aside(run) == tmp_path / "run.old-2"
    assert folders(tmp_path) == ["run.old-1", "run.old-2"]
    manifest.verify_folder(tmp_path / "run.old-1" / "state_3")


def test_where_there_was_no_run_nothing_is_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "nowhere") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert set_aside(tmp_path / "run") is None
    assert folders(tmp_path) == ["run"]


def test_a_folder_in_use_is_refused_and_leftovers_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".incomplete-state_5").mkdir(parents=True)
    run_state.claim(run)
    assert list(run.iterdir()) == []
    with pytest.raises(ConfigError, match="another run is writing into"):
        run_state.claim(run)


def test_states_beyond_the_resumed_one_are_renamed(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6, 9)
    run_state.supersede(tmp_path, tmp_path / "state_3")
    names = sorted(path.name for path in tmp_path.glob("*state_*"))
    assert names == ["state_3", "superseded-state_6", "superseded-state_9"]
    assert find_state(tmp_path, "auto") == tmp_path / "state_3"
