"""What the tests of several files start from."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import toy_runs as toy
from zerobert.shards import write_shard


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of uneven sizes, held-out rows, a vocabulary and an experiment."""
    folder = tmp_path_factory.mktemp("data")
    for index, num_rows in enumerate([13, 40, 5]):
        write_shard(folder / f"toy_training_{index}.hdf5", toy.rows(num_rows, index))
    write_shard(folder / "toy_test_0.hdf5", toy.rows(11, 99))
    (folder / "vocab.txt").write_text("\n".join(toy.VOCAB) + "\n")
    (folder / "toy.json").write_text(json.dumps(toy.EXPERIMENT))
    return folder


@pytest.fixture(scope="session")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, with all that it prints as it starts."""
    output = tmp_path_factory.mktemp("unbroken")
    done = subprocess.run(
        toy.command(data, output), env=toy.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (output / "stdout.txt").write_text(done.stdout)
    return output
