"""What a script prints and exits with, in processes of their own."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import REPOSITORY
from zerobert import errors


def run(
    body: str, *, closes_stdout: bool = False, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script whose `main` has this body."""
    script = (
        "import os, signal, sys\n"
        "from zerobert.errors import *\n"
        "from zerobert.errors import ArgumentParser, run_script\n"
        f"def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "run_script(main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=functools.partial(os.close, 1) if closes_stdout else None,
    )


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_code_that_main_returns_is_the_exit_code(code: int) -> None:
    result = run(f"print('said')\nreturn {code}")
    assert (result.returncode, result.stdout, result.stderr) == (code, "said\n", "")


def test_a_closed_stdout_is_no_error() -> None:
    result = run("return 0 if sys.stdout is None else 1", closes_stdout=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        "ZerobertError",
        "ConfigError",
        "DataError",
        "ShardFormatError",
        "ManifestError",
        "CheckpointError",
        "MissingDependencyError",
        "TrainingDivergedError",
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(name: str) -> None:
    result = run(f"raise {name}('a.json: wanted 1,\\n  got 2')")
    assert result.returncode == 2
    assert result.stderr == "error: a.json: wanted 1, got 2\n"


def test_another_rank_says_which_it_is() -> None:
    body = "raise DataError('broken')"
    assert run(body, RANK="3").stderr == "[rank 3] error: broken\n"
    assert run(body, RANK="0").stderr == "error: broken\n"


def test_a_wrong_flag_is_one_line_that_names_the_help() -> None:
    result = run("ArgumentParser(prog='x.py').parse_args(['--nonsense'])")
    assert result.returncode == 2
    assert result.stderr == "error: unrecognized arguments: --nonsense; see x.py --help\n"


def test_help_is_no_error() -> None:
    result = run("ArgumentParser(prog='x.py').parse_args(['--help'])")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: x.py" in result.stdout


def test_control_c_exits_with_130_and_no_traceback() -> None:
    result = run("os.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(5)")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("error", ["KeyError('x')", "OSError('x')", "BrokenPipeError('x')"])
def test_a_bug_keeps_its_traceback(error: str) -> None:
    result = run(f"raise {error}")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "in main" in result.stderr


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(buffering: str) -> None:
    script = (
        "import time\n"
        "from zerobert.errors import run_script\n"
        "def main():\n"
        "    print('first', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    print('nobody reads this')\n"
        "    return 0\n"
        "run_script(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": buffering},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DataError("x"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(5), 5),
        (SystemExit(), 0),
        (SystemExit("a message"), 1),
        (ValueError("x"), 1),
    ],
)
def test_exit_code_of_an_exception(error: BaseException, code: int) -> None:
    assert errors.exit_code(error) == code


def test_errors_are_what_callers_of_python_expect() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert issubclass(errors.ShardFormatError, errors.DataError)
    assert issubclass(errors.ManifestError, errors.DataError)
