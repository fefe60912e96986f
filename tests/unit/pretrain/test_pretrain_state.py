"""Which state a run resumes from, what it keeps, and what happens to an earlier run."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain import state as run_state
from pretrain.state import RunFolder, Saver, TrainState, find_state, set_aside
from zerobert import manifest, training_state
from zerobert.config import BertConfig
from zerobert.errors import CheckpointError, ConfigError, DataError
from zerobert.model import BertForPreTraining
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from zerobert.training_state import Piece, Snapshot, StateReader

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
    """A model that is never trained."""

    def __init__(self) -> None:
        self.module = BertForPreTraining(CONFIG)
        self.restored: StateReader | None = None

    def snapshot(self) -> Snapshot:
        parameters = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        return Snapshot(
            pieces=tuple(
                Piece(name=name, offset=0, values={"weights": tensor.flatten()})
                for name, tensor in parameters.items()
            ),
            counters={},
            shapes={name: tuple(tensor.shape) for name, tensor in parameters.items()},
            rows={name: len(tensor) for name, tensor in self.module.state_dict().items()},
        )

    def restore(self, source: StateReader) -> None:
        self.restored = source


def make_run(
    path: Path,
    *,
    keep_states: int = 2,
    keep_models: int = 0,
    keep_every_steps: int = 0,
    micro_samples: int = 4,
    **identity: object,
) -> RunFolder:
    return RunFolder(
        path=path,
        model=CONFIG,
        tokenizer=WordPieceTokenizer([*SPECIAL_TOKENS, "a"], do_lower_case=True),
        resolved={"bf16": {"enabled": True}},
        identity={**IDENTITY, **identity},
        inputs={"vocab.txt": "ab"},
        micro_samples=micro_samples,
        keep_states=keep_states,
        keep_models=keep_models,
        keep_every_steps=keep_every_steps,
    )


def save_steps(path: Path, *steps: int, keep_states: int = 10, **kept: int) -> None:
    engine: Any = FakeEngine()
    saver = Saver(make_run(path, keep_states=keep_states, **kept))
    for step in steps:
        samples = 4 * step
        state = TrainState(
            step=step, samples=samples, position=samples, tokens=9 * step, elapsed_s=1.5
        )
        saver.save(engine, state)
        state.step = 1000  # training goes on
    saver.wait()
    saver.close()


def damage(folder: Path) -> None:
    """One flipped byte: only the checksum can tell."""
    path = folder / "pieces_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir())


def test_advancing_counts_steps_samples_and_tokens() -> None:
    state = TrainState()
    state.advance(samples=8, tokens=100)
    state.advance(samples=8, tokens=90)
    assert state == TrainState(step=2, samples=16, position=16, tokens=190)


def test_a_save_makes_a_model_a_state_and_points_to_it(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 3)
    path = tmp_path / "run"
    assert folders(path) == ["latest", "model_3", "state_3"]
    assert (path / "latest").read_text() == "state_3\n"
    written = manifest.verify_folder(path / "state_3")
    assert (written.kind, written.config) == (
        "state",
        {
            "step": 3,
            "world_size": 1,
            "micro_samples": 4,
            "identity": IDENTITY,
            "train_state": {
                "step": 3,
                "samples": 12,
                "position": 12,
                "tokens": 27,
                "elapsed_s": 1.5,
            },
        },
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
    assert got == TrainState(step=3, samples=12, position=12, tokens=27, elapsed_s=1.5)
    assert engine.restored is not None


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    other = make_run(tmp_path, **{"bert.run.seed": 2})
    with pytest.raises(ConfigError, match=r"bert\.run\.seed was 1, is 2"):
        run_state.check_resumable(tmp_path / "state_3", other)


def test_what_the_rate_no_longer_depends_on_may_have_been_kept(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    saver = Saver(make_run(tmp_path, total_steps=8))
    saver.save(engine, TrainState(step=3))
    saver.wait()
    saver.close()
    run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path, total_steps=None))
    with pytest.raises(ConfigError, match="total_steps was 8, is 9"):
        run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path, total_steps=9))


def test_another_micro_batch_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 3)
    run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path))
    assert not capsys.readouterr().out
    run_state.check_resumable(tmp_path / "state_3", make_run(tmp_path, micro_samples=2))
    assert "warning: the micro-batch was 4, is 2" in capsys.readouterr().out


def test_the_model_has_the_weights_of_the_state(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    saver = Saver(make_run(tmp_path))
    saver.save(engine, TrainState(step=3))
    wanted = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()  # what comes after is not saved
    saver.wait()
    saver.close()
    got = load_file(tmp_path / "model_3" / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_a_save_that_fails_leaves_the_last_state_in_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 3)

    def refuse(*_: object) -> None:
        raise DataError("no space")

    monkeypatch.setattr(training_state, "write_index", refuse)
    engine: Any = FakeEngine()
    saver = Saver(make_run(tmp_path))
    saver.save(engine, TrainState(step=6))
    with pytest.raises(DataError, match="no space"):
        saver.wait()
    saver.close()
    assert "state_6" not in folders(tmp_path)
    assert not [name for name in folders(tmp_path) if name.startswith(".")]
    assert (tmp_path / "latest").read_text() == "state_3\n"
    assert find_state(tmp_path, "auto") == tmp_path / "state_3"


def test_a_failed_save_is_told_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def refuse(*_: object) -> None:
        started.wait(60)
        raise DataError("no space")

    monkeypatch.setattr(training_state, "write_pieces", refuse)
    engine: Any = FakeEngine()
    saver = Saver(make_run(tmp_path))
    saver.save(engine, TrainState(step=6))
    saver.check()  # still under way: nothing to tell, and nothing waits
    started.set()
    with pytest.raises(DataError, match="no space"):
        saver.save(engine, TrainState(step=7))
    saver.check()
    saver.close()


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


def test_states_of_every_so_many_steps_are_kept_beside_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 6, 8, 10, 12, keep_states=1, keep_every_steps=4)
    assert [name for name in folders(tmp_path) if "state" in name] == [
        "state_12",
        "state_4",
        "state_8",
    ]


def test_models_are_kept_as_asked_for(tmp_path: Path) -> None:
    kept = {"keep_states": 2, "keep_models": 3, "keep_every_steps": 4}
    save_steps(tmp_path, 2, 4, 6, 8, 10, 12, 14, 16, **kept)
    assert {name for name in folders(tmp_path) if "model" in name} == {
        *("model_4", "model_8", "model_12", "model_14", "model_16")
    }


def go_back(path: Path, num_states: int) -> Path | None:
    saver = Saver(make_run(path))
    wrong = TrainState(step=10, samples=40, position=40)
    target = saver.go_back(wrong, num_states, "the loss is no number")
    saver.close()
    return target


@pytest.mark.parametrize(("num_states", "step"), [(1, 9), (2, 6), (7, 3)])
def test_a_run_goes_back_to_an_earlier_state_and_behind_the_samples(
    tmp_path: Path, num_states: int, step: int
) -> None:
    save_steps(tmp_path, 3, 6, 9)
    target = go_back(tmp_path, num_states)
    assert target == tmp_path / f"state_{step}"
    assert find_state(tmp_path, "auto") == target  # the states beyond are not its own any more
    assert (tmp_path / "latest").read_text() == f"state_{step}\n"
    engine: Any = FakeEngine()
    got = run_state.restore(engine, target)  # now, and whenever the run goes on from there
    assert (got.step, got.samples, got.position) == (step, 4 * step, 40)


def test_where_nothing_was_saved_there_is_no_way_back(tmp_path: Path) -> None:
    assert go_back(tmp_path, 1) is None
    assert folders(tmp_path) == []


def test_a_damaged_state_is_no_target_of_going_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6)
    damage(tmp_path / "state_6")
    assert go_back(tmp_path, 1) == tmp_path / "state_3"


def test_notes_of_what_to_skip_that_are_damaged_are_one_line(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    (tmp_path / "skipped.json").write_text("[{}]")
    engine: Any = FakeEngine()
    with pytest.raises(CheckpointError, match=r"skipped\.json can't be read"):
        run_state.restore(engine, tmp_path / "state_3")


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


def test_a_run_whose_states_are_gone_is_not_begun_anew_in_its_place(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6)
    for step in (3, 6):
        shutil.rmtree(tmp_path / f"state_{step}")
    with pytest.raises(CheckpointError, match=r"states are gone: .*--resume never"):
        find_state(tmp_path, "auto")
    assert find_state(tmp_path, "never") is None


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
    assert "pieces_0.safetensors: its contents differ" in said


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
    with pytest.raises(
        CheckpointError, match=r"state_6/pieces_0\.safetensors: its contents differ"
    ):
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


def test_a_run_in_the_folder_that_one_stands_in_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save_steps(run, 3)
    monkeypatch.chdir(run)
    assert set_aside(Path()) == tmp_path / "run.old-1"


def test_where_there_was_no_run_nothing_is_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "nowhere") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert set_aside(tmp_path / "run") is None
    assert folders(tmp_path) == ["run"]


def test_a_folder_in_use_is_refused_and_leftovers_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".incomplete-state_5").mkdir(parents=True)
    (run / f".latest.{32 * 'a'}").touch()
    run_state.claim(run)
    assert list(run.iterdir()) == []
    with pytest.raises(ConfigError, match="another run is writing into"):
        run_state.claim(run)


def test_states_beyond_the_resumed_one_are_renamed_and_their_models(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6, 9)
    (tmp_path / "model_12").mkdir()  # of a save that was killed, or somebody's: of no state
    run_state.supersede(tmp_path, tmp_path / "state_3")
    names = sorted(path.name for path in tmp_path.glob("*_*"))
    assert names == [
        *("model_12", "model_3", "state_3", "superseded-model_6", "superseded-model_9"),
        *("superseded-state_6", "superseded-state_9"),
    ]
    assert find_state(tmp_path, "auto") == tmp_path / "state_3"
    assert (tmp_path / "latest").read_text() == "state_3\n"


def test_a_run_that_goes_back_twice_keeps_what_both_left_behind(tmp_path: Path) -> None:
    for _ in range(2):
        save_steps(tmp_path, 3, 6)
        run_state.supersede(tmp_path, tmp_path / "state_3")
    assert [path.name for path in sorted(tmp_path.glob("*state_*"))] == [
        *("state_3", "superseded-state_6", "superseded-state_6-2")
    ]


def test_a_newer_state_that_is_damaged_is_out_of_the_way(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, 6)
    (tmp_path / "state_6" / "manifest.json").write_text("{")
    assert run_state.micro_batch_of(tmp_path) == 4
    run_state.supersede(tmp_path, tmp_path / "state_3")
    assert [path.name for path in sorted(tmp_path.glob("*state_*"))] == [
        *("state_3", "superseded-state_6")
    ]
    save_steps(tmp_path, 6, 9, keep_states=1)
    assert [path.name for path in tmp_path.glob("state_*")] == ["state_9"]


@pytest.mark.parametrize(("resumed", "position"), [(3, 12), (6, 40), (9, 36)])
def test_samples_are_skipped_only_on_the_way_that_they_went_wrong_on(
    tmp_path: Path, resumed: int, position: int
) -> None:
    save_steps(tmp_path, 3, 6, 9)
    assert go_back(tmp_path, 2) == tmp_path / "state_6"
    save_steps(tmp_path, 9)
    run_state.supersede(tmp_path, tmp_path / f"state_{resumed}")
    save_steps(tmp_path, 3, 6)  # once more, where the run came by
    engine: Any = FakeEngine()
    assert run_state.restore(engine, tmp_path / f"state_{resumed}").position == position
    if resumed == 3:
        assert run_state.restore(engine, tmp_path / "state_6").position == 24
        assert not (tmp_path / "skipped.json").exists()


def test_a_run_that_begins_anew_skips_nothing_of_the_one_before(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    go_back(tmp_path, 1)
    shutil.rmtree(tmp_path / "state_3")
    run_state.supersede(tmp_path, None)
    assert not (tmp_path / "skipped.json").exists()
