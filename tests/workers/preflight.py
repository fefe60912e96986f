"""Ranks that are alike, and ranks that are not; argv: a folder. Each checks what it is told."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import preflight
from zerobert import distributed, engine
from zerobert.errors import EXIT_USER, ConfigError

ALIKE: dict[str, Any] = {"config": {"seed": 1}, "data": {"rows": 7}}


def expect(words: str, folder: Path, **facts: Any) -> None:
    """Rank 0 says what is wrong, the others end quietly."""
    told = (
        pytest.raises(ConfigError, match=words)
        if distributed.is_main()
        else pytest.raises(SystemExit, match=f"^{EXIT_USER}$")
    )
    with told:
        preflight.check(folder, **{**ALIKE, **facts})


def main() -> None:
    folder, rank = Path(sys.argv[1]), distributed.rank()
    line = preflight.check(folder, **ALIKE)
    assert line is not None
    assert re.match(r"connection: 3 processes on 1 machines, \d+\.\d\d GB/s a process", line), line
    assert not list(folder.iterdir())  # what it wrote to be seen is gone

    differ = r"not alike: configuration is \w+ on rank 0 .*, \w+ on rank 1 .*, and 1 more differ;"
    expect(differ, folder, config={"seed": rank})
    expect("not alike: data is .* on rank 2 [^,]*; give", folder, data={"rows": 7 + rank // 2})

    preflight.code_version = lambda: f"0.{rank // 2}"  # type: ignore[attr-defined]
    expect(r"not alike: zerobert is 0\.0 on rank 0 .* 0\.1 on rank 2", folder)
    preflight.code_version = lambda: "0.0"  # type: ignore[attr-defined]

    preflight._SHARED_FOLDER_S = 1.0
    mine = folder / str(rank)
    mine.mkdir()
    expect(r"can't see .*/0/\.preflight-\w+, which rank 0 has written .* share", mine)

    busy = preflight._work_s
    preflight._work_s = lambda: busy() * (100 if rank == 1 else 1)
    line = preflight._measure(["a", "b", "c"])
    assert "warning: b computes more than 3 times slower" in line, line


if __name__ == "__main__":
    engine.init_distributed()
    main()
    engine.leave_distributed()
