"""launch.sh as a user meets it, set-up included, in a clone whose package is tiny."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = "demo prep pretrain finetune squad predict plan report bench doctor test check help"
TASKS = "sst2 cola mrpc stsb qqp mnli qnli rte wnli ax glue"


def launch(
    script: Path, *flags: str, cwd: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if name != "ZEROBERT_PYTHON"}
    return subprocess.run(
        ["bash", str(script), *flags],
        env={**clean, **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """launch.sh beside a package without dependencies, which prints how it was called."""
    folder = tmp_path / "a clone"  # with a space, as people have them
    (folder / "data_prep").mkdir(parents=True)
    (folder / "pretrain").mkdir()
    (folder / "finetune").mkdir()
    (folder / "zerobert").mkdir()
    shutil.copy(repository / "launch.sh", folder)
    shown = "import sys, os; print(os.getcwd(), *sys.argv[1:])\n"
    for name in ("data_prep/__main__.py", "finetune/run_glue.py", "finetune/predict.py"):
        (folder / name).write_text(shown)
    (folder / "data_prep" / "__init__.py").touch()
    (folder / "zerobert" / "doctor.py").write_text(
        "import os, sys\nsys.exit('error: no torch' if 'LACKING' in os.environ else None)\n"
    )
    (folder / "zerobert" / "launcher.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    (folder / "constraints.txt").write_text("")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tiny"\nversion = "1"\n[project.optional-dependencies]\ndev = []\n'
    )
    # A build backend of a few lines: an editable install that needs no network.
    (folder / "backend.py").write_text(
        "import pathlib, zipfile\n"
        "def build_editable(wheel_directory, config_settings=None, metadata_directory=None):\n"
        "    name = 'tiny-1-py3-none-any.whl'\n"
        "    here = pathlib.Path(__file__).parent\n"
        "    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), 'w') as wheel:\n"
        "        wheel.writestr('tiny.pth', f'{here}\\n')\n"
        "        for file, text in {\n"
        "            'METADATA': 'Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n'\n"
        "                        'Provides-Extra: dev\\n',\n"
        "            'WHEEL': 'Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\n'\n"
        "                     'Tag: py3-none-any\\n',\n"
        "            'RECORD': '',\n"
        "        }.items():\n"
        "            wheel.writestr(f'tiny-1.dist-info/{file}', text)\n"
        "    return name\n"
    )
    return folder


def test_help_lists_every_command_and_sets_nothing_up(clone: Path) -> None:
    result = launch(clone / "launch.sh", "help")
    assert result.returncode == 0
    words = result.stdout.split()
    assert [name for name in f"{COMMANDS} {TASKS}".split() if name not in words] == []
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("flags", [("nonsense",), ()])
def test_what_it_does_not_know_is_exit_code_2(clone: Path, flags: tuple[str, ...]) -> None:
    result = launch(clone / "launch.sh", *flags)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "launch.sh" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_is_given_is_used_and_installs_nothing(clone: Path, tmp_path: Path) -> None:
    script = clone / "launch.sh"
    python = {"ZEROBERT_PYTHON": sys.executable}
    result = launch(script, "prep", "text", "--input", "a b", cwd=tmp_path, **python)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path} text --input a b\n"
    result = launch(script, "mnli", "--seed", "1", **python)
    assert result.stdout.endswith(" --task_name mnli --seed 1\n")
    result = launch(script, "finetune", "--task_name", "custom", **python)
    assert result.stdout.endswith(" --task_name custom\n")
    result = launch(script, "predict", "a film", **python)
    assert result.stdout.endswith(" a film\n")
    assert not (clone / ".venv").exists()


def test_a_python_without_what_is_required_is_refused_before_anything_runs(clone: Path) -> None:
    result = launch(clone / "launch.sh", "prep", ZEROBERT_PYTHON=sys.executable, LACKING="1")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: no torch\n")


def test_links_and_cdpath_lead_to_the_clone(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "zb").symlink_to(f"../{clone.name}/launch.sh")
    environment = {"ZEROBERT_PYTHON": sys.executable, "CDPATH": "."}
    for script in (Path("bin/zb"), Path(clone.name, "launch.sh")):
        result = launch(script, "prep", "text", cwd=tmp_path, **environment)
        assert (result.stdout, result.stderr) == (f"{tmp_path} text\n", "")


def test_an_environment_of_others_is_not_removed(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "precious").touch()
    result = launch(clone / "launch.sh", "prep")
    assert result.returncode == 2
    assert "is there, not made by this script, and can't be used" in result.stderr
    assert (clone / ".venv" / "precious").exists()


def test_a_python_that_does_not_run_is_named(clone: Path) -> None:
    result = launch(clone / "launch.sh", "prep", ZEROBERT_PYTHON="/no/python")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ZEROBERT_PYTHON=/no/python is not a Python")
    assert len(result.stderr.splitlines()) == 1


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """A PATH on which every python is a script, and otherwise only what the shell needs."""
    folder.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python"):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    for name in ("dirname", "cat", "cksum", "flock"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return {"PATH": str(folder)}


def test_a_python_that_is_too_old_is_one_line(clone: Path, tmp_path: Path) -> None:
    body = '[ "$1" = --version ] && echo Python 3.8.1 && exit; exit 1'
    bash = shutil.which("bash")
    assert bash is not None
    environment = fake_python(tmp_path / "bin", body)
    (tmp_path / "bin" / "bash").symlink_to(bash)
    result = launch(clone / "launch.sh", "prep", **environment)
    assert result.returncode == 2
    assert "error: wanted Python 3.10 or newer on PATH, found Python 3.8.1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_python_without_ensurepip_says_what_to_install(clone: Path, tmp_path: Path) -> None:
    body = 'case "$*" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac'
    bash = shutil.which("bash")
    assert bash is not None
    environment = fake_python(tmp_path / "bin", body)
    (tmp_path / "bin" / "bash").symlink_to(bash)
    result = launch(clone / "launch.sh", "prep", **environment)
    assert result.returncode == 2
    assert "apt-get install python3-venv" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_set_up_is_done_once_mended_and_renewed(clone: Path) -> None:
    script = clone / "launch.sh"
    first = launch(script, "prep", "one")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith(" one\n")
    assert "this happens once" in first.stderr

    second = launch(script, "prep", "two")
    assert (second.returncode, second.stderr) == (0, "")  # nothing was set up again

    # An install that was killed: nothing in the folder can be trusted.
    (clone / ".venv" / ".zerobert-begun").touch()
    (clone / ".venv" / ".zerobert-ready").unlink()
    (clone / ".venv" / "left-over").touch()
    third = launch(script, "prep", "three")
    assert third.stdout.endswith(" three\n"), third.stderr
    assert not (clone / ".venv" / "left-over").exists()

    # Other pins: what is there is brought up to date.
    (clone / "constraints.txt").write_text("nothing==1\n")
    (clone / ".venv" / "kept").touch()
    fourth = launch(script, "prep", "four")
    assert fourth.stdout.endswith(" four\n"), fourth.stderr
    assert "up to date" in fourth.stderr
    assert (clone / ".venv" / "kept").exists()

    # A Python that went away takes the environment with it.
    (clone / ".venv" / "bin" / "python").unlink()
    fifth = launch(script, "prep", "five")
    assert fifth.stdout.endswith(" five\n"), fifth.stderr


def test_an_install_that_fails_is_shown_and_tried_again(clone: Path) -> None:
    script, project = clone / "launch.sh", clone / "pyproject.toml"
    good = project.read_text()
    project.write_text(good.replace('version = "1"', 'version = "not a version"'))
    (clone / "backend.py").rename(clone / "away.py")
    failed = launch(script, "prep")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install")
    (clone / "away.py").rename(clone / "backend.py")
    project.write_text(good)
    assert launch(script, "prep", "again").stdout.endswith(" again\n")


def test_two_calls_at_the_same_time_set_up_once(clone: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("needs flock")
    clean = {name: value for name, value in os.environ.items() if name != "ZEROBERT_PYTHON"}
    command = ["bash", str(clone / "launch.sh"), "prep", "go"]
    both = [
        subprocess.Popen(
            command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [child.communicate(timeout=200) for child in both]
    assert [child.returncode for child in both] == [0, 0], results
    assert all(out.endswith(" go\n") for out, _ in results)
    assert sum("this happens once" in err for _, err in results) == 1


def test_signals_reach_the_program_and_its_code_comes_back(clone: Path) -> None:
    child = subprocess.Popen(
        ["bash", str(clone / "launch.sh"), "pretrain"],
        env={**os.environ, "ZEROBERT_PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "up\n"
        child.terminate()
        assert child.wait(timeout=30) == 143


def test_no_index_host_is_named(repository: Path) -> None:
    for name in ("launch.sh", "constraints.txt", ".ci/run", "demo/sources.py"):
        text = (repository / name).read_text()
        assert "://" not in text
        assert "--index-url" not in text
