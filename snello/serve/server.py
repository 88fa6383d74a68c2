"""The process: a port, the models, signals, and an end that finishes what was begun.

The port is taken before a model is loaded, so that a wrong one is said at once. The first SIGTERM or SIGINT closes the
door (readiness turns false, new requests are refused with the seconds to wait), what is inside may finish, then the
process ends; a second one ends it now. While models are read there is nobody to drain: it ends at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from snello.errors import SnelloError
from snello.serve.options import ServeOptions

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AFTER_ERROR_SECONDS = 2.0  # for those who were ended to hear of it
log = logging.getLogger("snello.serve")


def check_installed() -> None:
    """Raises SnelloError where the extra is missing."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise SnelloError(
            f"serving needs {error.name}, which is not installed", "pip install 'snello[serve]'"
        ) from None


def bind(host: str, port: int) -> socket.socket:
    """The port, taken.

    Raises:
        SnelloError: somebody has it, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on each connection; without it, it does not, and whoever keeps
    # a connection waits 40 ms for each answer: head and body are two packets, and Nagle holds the second for an ACK.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise SnelloError(f"port {port} of {host} is in use", f"--port {port + 1}, or stop what has it") from None
        raise SnelloError(f"cannot listen on {host}, port {port}: {error}", "give another --host or --port") from None
    return taken


def serve(options: ServeOptions, started: Callable[[str, Any], None] | None = None, *, verbose: bool = False) -> bool:
    """Serves until a signal says otherwise. True: everything that was begun was finished.

    Args:
        started: told the address and the models when the first request can come.

    Raises:
        SnelloError: keys, port or a model cannot be used.
    """
    check_installed()
    from snello.serve.app import App
    from snello.serve.keys import read_keys
    from snello.serve.logs import set_up_logs
    from snello.serve.served import open_models

    keys = read_keys(options.keys) if options.keys is not None else None
    with bind(options.host, options.port) as taken, _ended_early():
        models = open_models(options, len(keys) if keys is not None else 0)
        try:
            set_up_logs(logging.DEBUG if verbose else logging.INFO)
            return asyncio.run(_run(App(options, models, keys), taken, started))
        finally:
            models.close()


@contextmanager
def _ended_early() -> Iterator[None]:
    """The first process of a container is not ended by a signal that it does not handle; later the loop has its own."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


async def _run(app: Any, taken: socket.socket, started: Callable[[str, Any], None] | None) -> bool:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's, with signals that are ours."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and started is not None:
                host, port = taken.getsockname()[:2]
                started(f"http://{f'[{host}]' if ':' in host else host}:{port}", app.models)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=2,
        ws="none",
    )
    server, ending = Server(config), _Ending(app)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, ending.signal, server)
    try:
        await server.serve(sockets=[taken])
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    return ending.clean


class _Ending:
    """What the signals do."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._task: asyncio.Task[None] | None = None
        self.clean = True

    def signal(self, server: Any) -> None:
        if self._task is None:
            self._task = asyncio.ensure_future(self._drain(server))
            return
        log.warning("stopped at once")
        self.clean = False
        server.should_exit = server.force_exit = True

    async def _drain(self, server: Any) -> None:
        seconds = self._app.options.drain_seconds
        self._app.close_door()
        log.info("stopping", extra={"fields": {"inside": self._app.inside, "most_seconds": seconds}})
        if not await self._app.drained(seconds):
            self.clean = False
            await self._app.drained(AFTER_ERROR_SECONDS)
        server.should_exit = True
