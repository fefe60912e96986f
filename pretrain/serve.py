"""One page over HTTP, made anew for each request, on this machine alone."""

import contextlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NoReturn

from zerobert.errors import ConfigError, ZerobertError

_HOSTS = ("localhost", "127.0.0.1")


def serve(page: Callable[[], str], port: int) -> NoReturn:
    """Serve until the process is interrupted; prints the address.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: the port is taken, or none.
    """
    server = open_server(page, port)
    print(f"http://localhost:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    server.serve_forever()
    raise AssertionError("a server ends by Ctrl-C only")


def open_server(page: Callable[[], str], port: int) -> ThreadingHTTPServer:
    """A server that has its port, and waits for `serve_forever`.

    Raises:
        ConfigError: the port is taken, or none.
    """
    lock = threading.Lock()  # two browsers at a time must not read a long run twice at a time

    class Handler(BaseHTTPRequestHandler):
        """Answers one path with the page."""

        def do_GET(self) -> None:
            """Send the page, or say in one line why there is none."""
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in _HOSTS:  # some site's name, pointed at this machine to read the page
                self._send(403, "text/plain", f"wanted {' or '.join(_HOSTS)}, got {host}")
            elif self.path.partition("?")[0] != "/":
                self._send(404, "text/plain", "the page is at /")
            else:
                try:
                    with lock:
                        text = page()
                except ZerobertError as error:
                    self._send(503, "text/plain", str(error))
                else:
                    self._send(200, "text/html", text)

        def _send(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            with contextlib.suppress(ConnectionError):  # the browser has gone on
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: a line every few seconds would bury the address."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} can't be served at: {error}; choose another, 0 for any free one"
        ) from error
