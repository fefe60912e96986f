"""Settings that every test shares."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import NAMES, Browser, find_chromium, open_browser

# A shell's background job ignores Ctrl-C, and so would every process that a test starts from there.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"needs a Chromium on PATH, one of {', '.join(NAMES)}")
    with open_browser(chromium, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """The rights of a user who has none, where the tests run as root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see neither the user's W&B account nor a distributed launcher around them."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
