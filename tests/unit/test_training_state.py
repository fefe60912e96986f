"""A training state: written by any number of ranks at any stage, read by any other."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.unit.test_exactness import PRECISIONS, Case, case
from zerobert.errors import CheckpointError
from zerobert.training_state import Piece, Snapshot, StateReader, write_index, write_pieces

WORKER = Path(__file__).resolve().parents[1] / "workers" / "going_on.py"
CPU = {"device": "cpu"}
SMALL_PARTS = {"stage3_param_persistence_threshold": 0, "sub_group_size": 200}
ZEROS: dict[str, Case] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2, "reduce_bucket_size": 700},
    "3": {"stage": 3},
    "1-offloaded": {"stage": 1, "offload_optimizer": CPU},
    "3-small": {"stage": 3, **SMALL_PARTS},
    "3-offloaded": {
        "stage": 3,
        **SMALL_PARTS,
        "offload_optimizer": CPU,
        "offload_param": CPU,
    },
}


def states(precision: str, optimizer: str, zeros: tuple[str, ...]) -> dict[str, Case]:
    return {
        f"{precision}-{optimizer}-{zero}": case(precision, optimizer, zero=ZEROS[zero])
        for zero in zeros
    }


def walk(
    saved: dict[str, Case], ranks_before: int, ranks_after: int, folder: Path, *, every: int = 1
) -> None:
    """Save each on some ranks; go on from each with each of the same kind on others.

    Args:
        every: take only one of so many pairs.
    """
    cases = folder / "cases.json"
    cases.write_text(json.dumps([{**case, "state": name} for name, case in saved.items()]))
    timeout_s = 60 + 20 * len(saved)
    run_ranks(WORKER, ranks_before, "save", str(cases), str(folder), timeout_s=timeout_s)
    pairs = [
        {
            **saved[reader],
            "state": writer,
            "is_same": reader == writer and ranks_before == ranks_after,
        }
        for writer, reader in itertools.product(saved, saved)
        if writer.split("-")[:2] == reader.split("-")[:2]
    ][::every]
    cases.write_text(json.dumps(pairs))
    timeout_s = 60 + 20 * len(pairs)
    run_ranks(WORKER, ranks_after, "go-on", str(cases), str(folder), timeout_s=timeout_s)


def test_a_state_goes_on_at_every_stage_on_as_many_ranks(tmp_path: Path) -> None:
    walk(states("fp32", "Lamb", ("0", "1", "2", "3", "3-small")), 2, 2, tmp_path)


def test_a_state_goes_on_on_other_ranks(tmp_path: Path) -> None:
    walk(states("fp32", "AdamW", ("0", "2", "3-small")), 3, 2, tmp_path)


def test_a_state_of_16_bits_goes_on(tmp_path: Path) -> None:
    saved = {
        **states("bf16", "Lamb", ("0", "1", "3-small")),
        **states("fp16", "Lamb", ("0", "2", "3")),
    }
    walk(saved, 1, 2, tmp_path)


def test_a_loss_scale_that_can_fall_no_further_ends_the_training(tmp_path: Path) -> None:
    too_large = {"enabled": True, "initial_scale_power": 21, "min_loss_scale": 2**20}
    cases = tmp_path / "cases.json"
    cases.write_text(
        json.dumps(
            [
                case(
                    "fp16",
                    "Lamb",
                    zero={"stage": stage},
                    ds={"fp16": {**too_large, "hysteresis": 1}},
                )
                for stage in (0, 2, 3)
            ]
        )
    )
    run_ranks(WORKER, 2, "collapse", str(cases), str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 4), (4, 3)])
def test_every_stage_goes_on_from_every_other(before: int, after: int, tmp_path: Path) -> None:
    saved: dict[str, Case] = {}
    for precision, optimizer in itertools.product(PRECISIONS, ("Lamb", "AdamW")):
        saved.update(states(precision, optimizer, tuple(ZEROS)))
    walk(saved, before, after, tmp_path, every=5)  # which meets each reader and each writer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(1200)
def test_a_state_goes_on_at_every_stage_on_a_gpu(tmp_path: Path) -> None:
    saved: dict[str, Case] = {}
    for precision in PRECISIONS:
        saved.update(states(precision, "Lamb", tuple(ZEROS)))
    walk(saved, 1, 1, tmp_path, every=3)


def piece(name: str, offset: int, *values: float) -> Piece:
    return Piece(name=name, offset=offset, values={"weights": torch.tensor(values)})


def snapshot(*pieces: Piece) -> Snapshot:
    return Snapshot(
        pieces=pieces, counters={"steps": 3}, shapes={"a": (3, 2), "b": (1,)}, rows={"a": 2, "b": 1}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The state of three ranks, of which one holds nothing."""
    of_ranks: tuple[tuple[Piece, ...], ...] = (
        (piece("a", 0, 1, 2, 3),),
        (),
        (piece("a", 3, 4, 5, 6), piece("b", 0, 7)),
    )
    for rank, pieces in enumerate(of_ranks):
        write_pieces(tmp_path, rank, pieces)
    write_index(tmp_path, snapshot())
    return tmp_path


def test_pieces_are_put_together(folder: Path) -> None:
    reader = StateReader(folder)
    assert reader.counters == {"steps": 3}
    assert reader.read("weights", "a", 2, 3).tolist() == [3, 4, 5]
    assert reader.read("weights", "b", 0, 1).tolist() == [7]


def test_whole_weights_leave_padding_out(folder: Path) -> None:
    weights = dict(StateReader(folder).weights())
    assert {name: weight.tolist() for name, weight in weights.items()} == {
        "a": [[1, 2], [3, 4]],
        "b": [7],
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_state_that_was_read_is_let_go(folder: Path) -> None:
    """A file that is held takes its space on the disk after the state was removed."""

    def held() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder))

    reader = StateReader(folder)
    weights = dict(reader.weights())
    assert held() > 0
    del reader, weights
    assert held() == 0


def test_a_piece_that_is_missing_is_noticed(tmp_path: Path) -> None:
    write_pieces(tmp_path, 0, [piece("a", 0, 1, 2, 3), piece("b", 0, 7)])
    with pytest.raises(CheckpointError, match="pieces of a are not the whole"):
        write_index(tmp_path, snapshot())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"a": (3, 2)}, "b is (1,) there, missing here"),
        ({"a": (6,), "b": (1,)}, "a is (3, 2) there, (6,) here"),
        ({"a": (3, 2), "b": (1,), "c": (2,)}, "c is missing there, (2,) here"),
    ],
)
def test_another_model_s_state_is_told_apart(
    folder: Path, shapes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        StateReader(folder).check_shapes(shapes)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"counters": {}}'])
def test_a_folder_without_an_index_is_no_state(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"holds no training state that can be read.*--resume"
    ):
        StateReader(tmp_path)
