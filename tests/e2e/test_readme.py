"""What README.md, CONTRIBUTING.md and docs tell people to type exists, its flags and files too."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pretrain.config import BertSection
from zerobert.config import BertConfig
from zerobert.launcher import split_machines

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
]
SCRIPTS = {
    "demo": "demo/__main__.py",
    "prep": "data_prep/__main__.py",
    "pretrain": "pretrain/run.py",
    "report": "pretrain/report.py",
    "finetune": "finetune/run_glue.py",
    "predict": "finetune/predict.py",
    "plan": "pretrain/plan.py",
    "squad": "finetune/run_squad.py",
    "sst2": "finetune/run_glue.py",
}
WITHOUT_FLAGS_OF_THEIR_OWN = ("test", "check", "doctor", "help")


def commands() -> list[str]:
    """Every line of the shell blocks."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if line.startswith("bash launch.sh ")]
    return found


@cache
def help_of(script: str, *subcommand: str) -> str:
    command = [sys.executable, str(REPOSITORY / script), *subcommand, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_shell_blocks_are_found() -> None:
    assert {line.split()[2] for line in commands()} >= {*SCRIPTS, "test", "check"}


@pytest.mark.parametrize("line", commands())
def test_a_command_exists_with_its_flags(line: str) -> None:
    bash, launcher, command, *rest = shlex.split(line, comments=True)
    assert (bash, launcher) == ("bash", "launch.sh")
    if command in WITHOUT_FLAGS_OF_THEIR_OWN:
        assert re.search(rf"^ +{command} +\w", usage(), flags=re.MULTILINE)
        return
    subcommand = rest[:1] if command == "prep" else []
    text = help_of(SCRIPTS[command], *subcommand)
    own, _ = split_machines(rest)
    for flag in (word for word in own if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{flag} is not in {command} --help"


def usage() -> str:
    command = ["bash", str(REPOSITORY / "launch.sh"), "help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_experiments_that_are_named_exist() -> None:
    named = {word for line in commands() for word in line.split() if word.endswith(".json")}
    assert named
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


def test_the_tree_is_that_of_the_repository() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [tree] = re.findall(r"## The tree\n\n```\n(.*?)```", text, flags=re.DOTALL)
    folder, missing = "", []
    for line in tree.splitlines():
        names = re.match(r" *((?:[\w.]+/? )+)", line)
        assert names, line
        for name in names[1].split():
            if not line.startswith(" "):
                folder = name if name.endswith("/") else ""
            path = name if name == folder or not folder else folder + name
            if not (REPOSITORY / path).exists():
                missing.append(path)
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if "://" not in link and not (target.exists() and anchor in {"", *anchors(target)}):
            missing.append(link)
    assert missing == []


def anchors(path: Path) -> set[str]:
    """The headings of a document, as GitHub links to them."""
    if path.suffix != ".md":
        return set()
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_every_key_of_the_configuration_is_told_with_its_default() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    told = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? *\|", section, re.MULTILINE)
        told[section[1 : section.index("`", 1)]] = {
            key: json.loads(value) if value else None for key, value in rows
        }
    defaults = json.loads(json.dumps(dataclasses.asdict(BertSection())))
    model = {**dataclasses.asdict(BertConfig()), "size": "base", "vocab_size": None}
    assert told == {**defaults, "model": model}


def test_hooks_run_what_ci_runs() -> None:
    command = "bash launch.sh check"
    assert f"entry: {command}\n" in (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert f"\n{command} " in (REPOSITORY / ".ci" / "run").read_text()
