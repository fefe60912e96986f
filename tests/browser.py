"""A headless Chromium, driven by its own protocol over two pipes: nothing else is needed."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60


def find_chromium() -> str | None:
    """Where one is that runs; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) and _runs(path)), None)


def _runs(path: str) -> bool:
    """Whether it is a browser, and no script that only tells how to install one."""
    try:
        asked = subprocess.run([path, "--version"], capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


class Browser:
    """One page of a browser, and what went wrong in it since it was opened.

    Attributes:
        errors: what the console has of errors and warnings, exceptions among them.
        requests: addresses that the page asked for.
    """

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._out, self._in = requests, answers
        self._last_id = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1200, dark: bool = False) -> None:
        """Load a page and wait until it is there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url="about:blank")
        self._wait_for("Page.loadEventFired")
        self.errors.clear()
        self.requests.clear()
        self._call("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")
        # The event may have been that of the empty page before.
        self.wait_until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a function's body must be a called function."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_until(self, script: str) -> None:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"text": key} if len(key) == 1 else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`mouseMoved`, `mousePressed` or `mouseReleased`, the left button."""
        button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def close(self) -> None:
        """End the browser, which may be gone before it has answered."""
        self._session = None
        self._send("Browser.close")

    def _send(self, method: str, **params: Any) -> None:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._send(method, **params)
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        """The next message; an event is remembered."""
        text = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        kind = message.get("method")
        if kind:
            self._events.append(message)
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        if kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"]))
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def _wait_for(self, event: str) -> None:
        while not any(message["method"] == event for message in self._events):
            self._read()
        self._events.clear()


@contextlib.contextmanager
def open_browser(chromium: str, home: Path) -> Iterator[Browser]:
    """Start a browser whose files lie in `home`."""
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # Chromium expects its two pipes as file descriptors 3 and 4.
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}', chromium]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with open(our_out, "wb") as requests, open(our_in, "rb") as answers:
        process = subprocess.Popen(
            [
                *command,
                *flags,
                "--remote-debugging-pipe",
                "--no-first-run",
                f"--user-data-dir={home}",
                "about:blank",
            ],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(home)},
        )
        os.close(their_in)
        os.close(their_out)
        try:
            browser = Browser(requests, answers)
            yield browser
            browser.close()
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()
