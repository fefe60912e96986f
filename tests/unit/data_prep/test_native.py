"""The compiled code on its own: strict compilers, sanitizers, and machines that can't build it."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep import native
from data_prep.native.compiler import LIBRARY
from tests.conftest import REPOSITORY
from zerobert import compiled

GOLDEN = REPOSITORY / "tests" / "golden" / "data_prep"
# Prints whether the compiled code is there, and the hashes of the golden rows.
REMAKE = f"""
import hashlib, sys
from pathlib import Path
sys.path.insert(0, {str(GOLDEN)!r})
import remake
from data_prep import native
shard = Path(sys.argv[1])
hashes = {{case: remake.array_hashes(config, shard) for case, config in remake.CASES.items()}}
print(remake.json.dumps([native.is_available(), hashes]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, where this test's processes look for the library and put it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("ZEROBERT_TOLD_OF_COMPILER", raising=False)
    return folder / "zerobert"


def start(code: str, *arguments: object, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output, errors


def expected() -> Any:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_strict_compilers_have_nothing_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if not shutil.which(name):
        pytest.skip(f"there is no {name} here")
    monkeypatch.setenv("CC", name)
    strict = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Wshadow", "-Werror")
    compiled.compile_to(tmp_path / "strict.so", LIBRARY, *strict)
    assert (tmp_path / "strict.so").is_file()


def test_a_library_is_built_once_and_only_from_these_sources(cache: Path, tmp_path: Path) -> None:
    library = compiled.built(LIBRARY)
    assert [library] == list(cache.iterdir())
    written = library.stat().st_mtime_ns
    assert compiled.built(LIBRARY) == library
    assert library.stat().st_mtime_ns == written
    changed = tmp_path / "native"
    shutil.copytree(LIBRARY.folder, changed)
    with (changed / "native.h").open("a") as file:
        file.write("/* another release */\n")
    other = compiled.built(dataclasses.replace(LIBRARY, folder=changed))
    assert other != library
    assert sorted(cache.iterdir()) == sorted([library, other])


def test_processes_that_build_at_the_same_time_both_succeed(cache: Path, tmp_path: Path) -> None:
    processes = [start(REMAKE, tmp_path / f"{number}.hdf5") for number in range(2)]
    for process in processes:
        output, errors = finish(process)
        assert json.loads(output) == [True, expected()]
        assert errors == ""
    assert len(list(cache.iterdir())) == 1


def block(folder: Path) -> None:
    """Make a folder impossible, for the superuser too."""
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")


def test_a_cache_that_cant_be_written_is_not_needed(cache: Path, tmp_path: Path) -> None:
    block(cache)
    library = compiled.built(LIBRARY)
    assert library.parent == tmp_path / f"zerobert-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert compiled.built(LIBRARY) == library


def test_a_cache_that_is_full_is_not_needed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "x.c:1: warning: old\nx.s: Fatal error: can't write: 'No space left on device'\nstopped"
    compile_to = compiled.compile_to

    def compile_where_there_is_room(path: Path, library: compiled.Library) -> None:
        if cache in path.parents:
            raise subprocess.CalledProcessError(1, ["cc"], stderr=said)
        compile_to(path, library)

    monkeypatch.setattr(compiled, "compile_to", compile_where_there_is_room)
    assert compiled.built(LIBRARY).parent == compiled.private_folder()
    shutil.rmtree(compiled.private_folder())
    block(compiled.private_folder())
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compiled.built(LIBRARY)
    wanted = "x.s: Fatal error: can't write: 'No space left on device'"
    assert compiled.reason(caught.value) == wanted


@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser can give a folder away")
def test_what_another_user_put_into_the_private_folder_is_not_loaded(
    cache: Path, tmp_path: Path
) -> None:
    block(cache)
    private = compiled.private_folder()
    private.mkdir()
    os.chown(private, 12345, -1)
    planted = private / compiled.file_name(LIBRARY)
    planted.write_bytes(b"another user's code")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        compiled.built(LIBRARY)
    assert planted.read_bytes() == b"another user's code"


def test_without_a_compiler_the_user_is_told_once_and_gets_the_same(
    cache: Path, tmp_path: Path
) -> None:
    output, errors = finish(start(REMAKE, tmp_path / "a.hdf5", PATH="", CC=""))
    assert json.loads(output) == [False, expected()]
    assert errors.count("\n") == 1
    assert errors.startswith(
        "note: the compiled parts of data_prep can't be built (there is no C compiler); plain "
        "Python does the same"
    )
    assert not list(cache.iterdir())


def test_workers_do_not_tell_it_again(cache: Path, tmp_path: Path) -> None:
    code = """
from data_prep import native
from data_prep.parallel import pool
from tests.unit.data_prep.test_native import ask
if __name__ == "__main__":
    native.is_available()
    with pool(2) as workers:
        print(list(workers.map(ask, range(4))))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = start(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", PATH="", CC=""
    )
    output, errors = finish(process)
    assert output == "[False, False, False, False]\n"
    assert errors.count("note: ") == 1


def ask(number: int) -> bool:
    return native.is_available()


def test_a_compiler_that_refuses_is_quoted(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "mycc"
    broken.write_text("#!/bin/sh\necho 'mycc: no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    code = "from data_prep import native; print(native.is_available())"
    output, errors = finish(start(code, CC=f"{broken} -m64"))
    assert output == "False\n"
    assert "can't be built (mycc: no licence); plain Python does the same" in errors


def runtime(name: str) -> str | None:
    """The path of a library of gcc's, to be loaded ahead of Python's own."""
    if not shutil.which("gcc"):
        return None
    command = ["gcc", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


SANITIZED = """
import random, sys
from pathlib import Path
from zerobert import compiled
compiled.built = lambda library: Path(sys.argv[2])
from tests.unit.data_prep.test_native import use_everything
use_everything()
"""


def use_everything() -> None:
    """Words and rows of random input through every path of the C code, checked by the twins."""
    import numpy as np

    from data_prep.config import InstanceConfig
    from data_prep.instances import Instances, create_instances, create_rows_plainly
    from tests.unit.data_prep import test_instances, test_wordpiece

    assert native.is_available()
    rng = random.Random(0)
    alphabet = (
        "ab the [SEP] [MASK\n\n \t\u3000\u0085\u2028\u1680é東，。“\u0301\U0001f600\U00020000.,-"
    )
    for length in [*range(40), *range(100, 2000, 100)]:
        text = "".join(rng.choices(alphabet, k=length))
        test_wordpiece.check(text, lower_case=bool(length % 2))
    test_wordpiece.check(" ".join(f"{rng.getrandbits(60):x}" for _ in range(30_000)), True)
    for trial in range(300):
        config = InstanceConfig(
            max_seq_length=rng.randint(5, 40),
            max_predictions_per_seq=rng.randint(1, 5),
            short_seq_prob=rng.choice([0, 0.5, 1]),
            masked_lm_prob=rng.choice([0, 0.15, 1]),
            dupe_factor=rng.randint(1, 3),
            whole_word_mask=rng.random() < 0.5,
            no_nsp=rng.random() < 0.5,
        )
        lists = [
            [
                [rng.randint(5, 39) for _ in range(rng.randint(1, 12))]
                for _ in range(rng.randint(1, 6))
            ]
            for _ in range(rng.randint(2, 5))
        ]
        documents = test_wordpiece.documents_of(lists)
        vocabulary = test_instances.VOCABULARY
        fast = create_instances(documents, config, vocabulary, random.Random(trial)).arrays()
        rows = create_rows_plainly(documents, config, vocabulary, random.Random(trial))
        for name, array in Instances(rows, config).arrays().items():
            np.testing.assert_array_equal(fast[name], array)


@pytest.mark.slow
@pytest.mark.skipif(runtime("libasan.so") is None, reason="gcc's sanitizers are not here")
def test_sanitizers_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AddressSanitizer and UBSan, with the standard library's own checks of memory it gives out."""
    monkeypatch.setenv("CC", "gcc")
    library = tmp_path / "sanitized.so"
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    compiled.compile_to(library, LIBRARY, *checks)
    settings = {
        # Python's own allocator would hide from ASan where its blocks end.
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    finish(start(SANITIZED, "", library, **settings))
    golden = REMAKE.replace(
        "from data_prep import native\n",
        "from data_prep import native\nfrom zerobert import compiled\n"
        f"compiled.built = lambda _: Path({str(library)!r})\n",
    )
    output, _ = finish(start(golden, tmp_path / "a.hdf5", **settings))
    assert json.loads(output) == [True, expected()]
