import json
from pathlib import Path

import pytest

from finetune import output
from finetune.output import announce_replacement, check_output, claimed, replacing, told
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import (
    is_complete,
    read_manifest,
    staged_folder,
    verify_folder,
    write_manifest,
)
from zerobert.tracking import read_status


def finish(out: Path, files: dict[str, str], keep: tuple[str, ...] = ()) -> None:
    """A finished run that writes these files."""
    with replacing(out, config={"task": "T"}, inputs={"a": "b"}, keep=keep) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)


def interrupt_in_the_middle(out: Path) -> None:
    with replacing(out, config={}, inputs={}, keep=()) as staging:
        (staging / "model.safetensors").write_text("half of the n")
        raise KeyboardInterrupt


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_finished_run_is_complete_and_verified(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    finish(out, {"model.safetensors": "1", "result.json": "{}"})
    assert names(out) == {"model.safetensors", "result.json", "manifest.json"}
    record = verify_folder(out)
    assert (record.kind, record.inputs) == ("model", {"a": "b"})
    assert record.config == {"task": "T", "folders": []}
    assert set(record.files) == {"model.safetensors", "result.json"}


def test_older_model_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    finish(tmp_path, {"model.safetensors": "old", "result.json": "{}"})
    with pytest.raises(KeyboardInterrupt):
        interrupt_in_the_middle(tmp_path)
    verify_folder(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == {"model.safetensors", "result.json", "manifest.json"}


def test_interrupted_first_run_leaves_no_model(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_in_the_middle(tmp_path / "out")
    assert names(tmp_path / "out") == set()


def test_killed_between_the_moves_is_incomplete_and_can_be_run_again(
    tmp_path: Path, monkeypatch
) -> None:
    finish(tmp_path, {"config.json": "old", "model.safetensors": "old", "result.json": "{}"})
    replace = Path.replace

    def fail_at_weights(self: Path, target: Path) -> Path:
        if self.name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_weights)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, {"config.json": "new", "model.safetensors": "new", "result.json": "{}"})
    monkeypatch.undo()
    assert not is_complete(tmp_path)
    check_output(tmp_path, tmp_path / "model")
    finish(tmp_path, {"config.json": "newer", "model.safetensors": "newer", "result.json": "{}"})
    verify_folder(tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors", "result.json", "manifest.json"}


@pytest.mark.parametrize("moves", range(6))
def test_the_next_run_ends_the_moves_of_one_that_was_killed(
    tmp_path: Path, monkeypatch, moves: int
) -> None:
    """Of the older manifest, the result, the others, the manifest; then the state is left."""
    (tmp_path / "seed_1").mkdir()
    older = {"config.json": "old", "SST-2.tsv": "old", "result.json": "{}"}
    finish(tmp_path, older, keep=("seed_1",))
    with staged_folder(tmp_path / "state") as staging:
        write_manifest(staging, kind="state", config={"progress": {"saved_steps": []}}, inputs={})
    left, replace = iter(range(moves)), Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.parent in (tmp_path, tmp_path / ".completed") and next(left, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(output, "discard_state", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises((KeyboardInterrupt, OSError)):
        finish(tmp_path, {"config.json": "new", "model.safetensors": "new", "result.json": "{}"})
    monkeypatch.undo()
    assert is_complete(tmp_path / "state")
    with claimed(tmp_path):
        verify_folder(tmp_path)
        assert (tmp_path / "config.json").read_text() == "new"
        assert names(tmp_path) == {
            *("config.json", "model.safetensors", "result.json", "manifest.json", "state"),
        }


def test_the_state_that_a_finished_model_came_from_is_spent(tmp_path: Path) -> None:
    finish(tmp_path, {"result.json": "{}"})
    for run, is_left in (("another", True), (None, False)):
        with staged_folder(tmp_path / "state") as staging:
            config = {"run": run, "progress": {"saved_steps": []}}
            write_manifest(staging, kind="state", config=config, inputs={"a": "b"})
        output.discard_spent_state(tmp_path)
        assert (tmp_path / "state").exists() == is_left


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (None, "done", 0, None),
        (SystemExit(143), "preempted", 143, "SystemExit"),
        (KeyboardInterrupt(), "preempted", 130, "KeyboardInterrupt"),
        (DataError("no\nspace"), "failed", 2, "no space"),
        (ValueError("a bug"), "failed", 1, "a bug"),
    ],
)
def test_the_status_tells_whether_a_run_lives_and_how_it_ended(
    tmp_path: Path, error: BaseException | None, state: str, code: int, reason: str | None
) -> None:
    def run() -> None:
        with told(tmp_path):
            assert read_status(tmp_path)["state"] == "running"
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            run()
    else:
        run()
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status.get("error")) == (state, code, reason)


def test_what_an_older_run_left_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    for name in ("step_5", "step_10", "seed_1", ".incomplete-step_3"):
        (tmp_path / name).mkdir()
    older = {"model.safetensors": "old", "result.json": "{}", "SST-2.tsv": "old"}
    finish(tmp_path, older, keep=("step_5", "step_10", "seed_1"))
    for name in ("notes", "step_last", "step_7", "seed_2"):
        (tmp_path / name).mkdir()
    (tmp_path / "my_notes.txt").write_text("mine")
    finish(tmp_path, {"model.safetensors": "new", "result.json": "{}"}, keep=("step_10",))
    assert names(tmp_path) == {
        *("model.safetensors", "result.json", "manifest.json", "my_notes.txt"),
        *("step_10", "notes", "step_last", "step_7", "seed_2"),
    }
    assert "SST-2.tsv" not in read_manifest(tmp_path).files


def test_the_state_goes_with_the_models_saved_on_its_way(tmp_path: Path) -> None:
    for name in ("step_5", "step_10", "step_15"):
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "state") as staging:
        progress = {"saved_steps": [5, 10]}
        write_manifest(staging, kind="state", config={"progress": progress}, inputs={})
    finish(tmp_path, {"result.json": "{}"}, keep=("step_10",))
    assert names(tmp_path) == {"result.json", "manifest.json", "step_10", "step_15"}


@pytest.mark.parametrize("name", ["step_5", "state"])
def test_what_somebody_else_put_under_a_name_of_ours_is_not_written_over(
    name: str, tmp_path: Path
) -> None:
    finish(tmp_path / "step_3", {"result.json": "{}"})  # a model of ours
    check_output(tmp_path, tmp_path / "model")
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"did not write \S+{name}, .*move it away or choose"):
        check_output(tmp_path, tmp_path / "model")


@pytest.mark.parametrize("name", ["README.md", "vocab.txt", "report.html", "custom.tsv"])
def test_somebody_else_s_files_are_not_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    check_output(tmp_path, tmp_path / "model", ["custom.tsv"])
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"did not write \S+{name}, .*move it away or choose"):
        check_output(tmp_path, tmp_path / "model", ["custom.tsv"])
    (tmp_path / name).unlink()
    finish(tmp_path, {name: "ours", "result.json": "{}"})
    check_output(tmp_path, tmp_path / "model", ["custom.tsv"])


def test_a_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with claimed(out):
        with pytest.raises(ConfigError, match=r"another run is writing into .*out"), claimed(out):
            pass
    with claimed(out):
        assert names(out) == set()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out"), claimed(tmp_path / "file" / "out"):
        pass


def test_model_to_start_from_is_not_overwritten(tmp_path: Path) -> None:
    finish(tmp_path / "step_5", {"result.json": "{}"})
    for start in (tmp_path, tmp_path / "step_5"):
        with pytest.raises(ConfigError, match="is or holds the model to start from"):
            check_output(tmp_path / "step_5" / "..", start)
    check_output(tmp_path, Path("bert-base-uncased"))  # a hub's name is no folder


def test_another_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="holds a model that fine-tuning did not write"):
        check_output(tmp_path, tmp_path / "model")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "config.json", tmp_path / "model")


def test_running_again_says_what_happens_to_the_older_model(tmp_path: Path, capsys) -> None:
    finish(tmp_path, {"config.json": "{}", "result.json": "{}"})
    announce_replacement(tmp_path)
    assert "stays until the new one is complete" in capsys.readouterr().out
