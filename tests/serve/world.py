"""A server on a real socket in a thread of the test process, and small models to serve: words, a chat, an encoder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

import snello.models.demo
from snello.serve.app import App
from snello.serve.keys import Keys
from snello.serve.options import ServeOptions
from snello.serve.served import Models, open_models
from snello.serve.server import bind
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}call: <tool_call>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    "[assistant]"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather in a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}


def make_chat(folder: Path, template: str = TEMPLATE) -> Path:
    """`demo` with a chat template."""
    shutil.copytree(Path(snello.models.demo.__file__).parent, folder, ignore=shutil.ignore_patterns("*.py", "__py*"))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def make_encoder(folder: Path) -> Path:
    return _pooling(make_checkpoint(folder, "bert-mlm"), pooling_mode_mean_tokens=True)


def make_pooled(folder: Path) -> Path:
    """A decoder whose last row is the vector of a text."""
    return _pooling(make_checkpoint(folder, "qwen3"), "Normalize", pooling_mode_lasttoken=True)


def _pooling(folder: Path, *more: str, **mode: bool) -> Path:
    """The files of sentence-transformers beside a checkpoint."""
    listed = [("", "Transformer"), ("1_Pooling", "Pooling"), *(("2_Normalize", kind) for kind in more)]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in listed]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 96, **mode}))
    return folder


class Running:
    """A server that listens. `get` and `post` speak to it as its own key, if it has one."""

    def __init__(self, app: App, address: str, key: str | None = None) -> None:
        self.app, self.address = app, address
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=address, headers=headers, timeout=30.0)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def events(self, path: str, body: dict[str, Any], **more: Any) -> list[Any]:
        """The events of a stream: parsed, `[DONE]` as it is."""
        with self.client.stream("POST", path, json={**body, "stream": True}, **more) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return parse(response.read())

    def idle(self, name: str = "demo", seconds: float = 5.0) -> bool:
        """Whether nothing runs, waits or holds a page, soon enough."""
        served, until = self.app.models[name], time.monotonic() + seconds
        while time.monotonic() < until:
            engine, gate = served.worker.engine, served.gate
            if not (engine.has_work or served.llm.executor.pages.num_held or gate.inside or gate.requests):
                return True
            time.sleep(0.005)
        return False


def parse(raw: bytes) -> list[Any]:
    events = []
    for block in raw.decode().split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("data: ")]
        for line in lines:
            events.append(line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]))
    return events


def text_of(events: list[Any], index: int = 0) -> str:
    """What a stream says to one choice."""
    rows = [row for event in events if isinstance(event, dict) for row in event["choices"] if row["index"] == index]
    return "".join(row["text"] if "text" in row else row["delta"].get("content") or "" for row in rows)


@contextlib.contextmanager
def running(
    models: Models, options: ServeOptions, keys: Keys | None = None, key: str | None = None
) -> Iterator[Running]:
    """Serves models that are open already; they are closed by who opened them."""
    app = App(options, models, keys)
    taken = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[taken])), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until and thread.is_alive(), "the server does not start"
        time.sleep(0.005)
    here = Running(app, f"http://127.0.0.1:{taken.getsockname()[1]}", key)
    try:
        yield here
    finally:
        here.client.close()
        server.should_exit = True
        thread.join(20)
        taken.close()


@contextlib.contextmanager
def serving(options: ServeOptions, keys: Keys | None = None, key: str | None = None) -> Iterator[Running]:
    """Opens the models of these options and serves them."""
    models = open_models(options, len(keys) if keys is not None else 0)
    try:
        with running(models, options, keys, key) as here:
            yield here
    finally:
        models.close()


class Process:
    """`snello serve demo` as a process of its own."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "snello", "serve", "demo", "--port", "0", "--json", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        try:
            self.address = json.loads(first)["address"]
        except ValueError:
            self.process.kill()
            raise AssertionError(f"the server does not start: {first}{self.process.communicate()[1]}") from None

    def end(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def raw_request(address: str, body: bytes, path: str = "/v1/completions") -> socket.socket:
    """A request as bytes, on a socket of its own that the test may close at any time."""
    host, port = address.removeprefix("http://").split(":")
    plug = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    plug.sendall(head.encode() + body)
    return plug
