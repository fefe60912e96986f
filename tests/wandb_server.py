"""A stand-in for W&B's server: enough of it to create runs, resume them, and keep their history."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """What clients have sent, by the run's id."""

    url: str = ""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def answer_query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What the client asks for in GraphQL; of all else, that there is nothing."""
        if "upsertBucket" in query:
            name = variables["name"]
            is_new = name not in self.configs
            config = json.loads(variables.get("config") or "{}")
            self.configs.setdefault(name, {}).update(
                {key: value["value"] for key, value in config.items() if key != "_wandb"}
            )
            return {"upsertBucket": {"bucket": self._run(name), "inserted": is_new}}
        if "historyLineCount" in query:
            name = variables["name"]
            return {"model": {"bucket": self._run(name) if name in self.configs else None}}
        if "viewer" in query:
            viewer = {"id": "1", "entity": "someone", "username": "someone", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}, "serverInfo": {"features": []}}
        return {"serverInfo": {"features": []}, "createRunFiles": {"runID": "1", "files": []}}

    def take_files(self, name: str, files: dict[str, Any]) -> None:
        """Lines of a run's history, from where the client says that they begin."""
        if history := files.get("wandb-history.jsonl"):
            lines = self.history.setdefault(name, [])
            lines[history["offset"] :] = [json.loads(line) for line in history["content"]]

    def _run(self, name: str) -> dict[str, Any]:
        lines = self.history.get(name, [])
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "someone"}}
        return {
            "id": "1",
            "name": name,
            "displayName": "r",
            "project": project,
            "config": "{}",
            "summaryMetrics": "{}",
            "historyLineCount": len(lines),
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": json.dumps({"t": {}}),
        }


@contextlib.contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """A server on this machine, for as long as the context lives."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        """GraphQL queries and the stream of a run's files; uploads are thrown away."""

        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            """Answer the two kinds of requests that matter."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.path.endswith("/file_stream"):
                state.take_files(self.path.split("/")[-2], json.loads(body).get("files") or {})
            elif self.path == "/graphql":
                asked = json.loads(body)
                answer = {"data": state.answer_query(asked["query"], asked.get("variables") or {})}
            self._send(answer)

        def do_GET(self) -> None:
            """There is nothing to get."""
            self._send({})

        def _send(self, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
