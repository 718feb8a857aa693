"""The server's process: where it listens, and how it ends."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from app import signals
from app.console import counted
from app.errors import UserError
from app.serving.api import create_app
from app.serving.elsewhere import load_elsewhere
from app.serving.engine import Engine
from app.serving.loading import Registered, Source
from app.serving.observer import Observer
from app.serving.refusals import Refused
from app.serving.settings import Settings
from app.serving.versions import Models

log = logging.getLogger("app")
LEAST_KEY = 16  # characters


def check_address(host: str, settings: Settings, *, open: bool) -> None:
    """Refuse to listen beyond this machine without a key, unless that is asked for; say so then.

    Raises:
        UserError: no key, or one that is soon guessed.
    """
    if settings.key is not None and len(settings.key) < LEAST_KEY:
        raise UserError(
            f"SAM3_API_KEY: has {counted(len(settings.key), 'character')}, and must have "
            f"{LEAST_KEY}: export SAM3_API_KEY=$(openssl rand -hex 16)"
        )
    if settings.key is not None or is_loopback(host):
        return
    if not open:
        raise UserError(
            f"--host {host}: others could ask without a key. Set one: export "
            "SAM3_API_KEY=$(openssl rand -hex 16), or give --open to let anyone ask"
        )
    log.warning("WARNING: --open: anyone who reaches %s may ask, and use this machine", host)


def is_loopback(host: str) -> bool:
    """Return whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(
    sources: Sequence[Source],
    wanted: Sequence[Registered],
    settings: Settings,
    host: str,
    port: int,
    observer: Observer,
    processes: int = 1,
) -> None:
    """Serve until a signal asks for the end; what was begun is answered before.

    Args:
        sources: of files; with `wanted`, one without a path, which says how those are loaded.
        wanted: of the registry.
        observer: is told what happens.
        processes: that each model has, with a GPU each or a share of the cores; 1: none beside
            this one.

    Raises:
        UserError: weights that cannot be loaded, or an address that cannot be had.
        Stopped: a signal asked for the end, and it has come.
    """
    listener = listen(host, port)
    with listener, signals.watch():
        app = create_app(_load(sources, wanted, settings, processes), settings, observer)
        server = Server(app, settings)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        log.info("serving: %s", address)
        if settings.label is not None:
            log.info("label the images of %s: %s/label", settings.label.folder, address)
        server.run(sockets=[listener])


def _load(
    sources: Sequence[Source], wanted: Sequence[Registered], settings: Settings, processes: int
) -> Models:
    """Return the models; none but them holds an engine, which so can end when it is exchanged."""

    def start(source: Source) -> Engine:
        loads = [source.load] if processes == 1 else load_elsewhere(source, processes)
        return Engine(loads[0], settings, loads[1:])

    engines: list[Engine] = []
    aliases: Mapping[tuple[str, str], str] = {}
    follower = None
    if wanted:
        from app.serving.registry import Follower, Registry  # MLflow takes seconds

        follower = Follower(Registry(settings.mlflow or ""), wanted, sources[0], start)
        engines, aliases = follower.load_all()
    else:
        for source in sources:
            engines.append(start(source))
            about = engines[-1].about
            log.info("model: %s (%s, %d px)", about.name, about.size, about.resolution)
    try:
        models = Models(engines, aliases, settings.canary, settings.shadow)
    except Refused as error:
        problems = [f"{problem.message}; {problem.remedy}" for problem in error.problems]
        raise UserError([f"--canary, --shadow: {problem}" for problem in problems]) from None
    if follower is not None:
        follower.follow(models, settings.poll_seconds)
    return models


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    It is made as one of TCP by name: asyncio sends answers without a delay (TCP_NODELAY) through
    such alone, and `socket.create_server` makes others.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"--host {host} --port {port}: {why}; give another --port") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn, which says on /ready that it ends, and gives requests their time before it does."""

    def __init__(self, app: Any, settings: Settings) -> None:
        limits = settings.limits

        class Protocol(ImpatientProtocol):
            seconds = limits.body_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,  # longer than proxies keep theirs: they end it, not we
                timeout_graceful_shutdown=int(limits.seconds + limits.body_seconds) + 1,
            )
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end."""
        self.config.app.state.closing = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


class ImpatientProtocol(H11Protocol):
    """HTTP that closes a connection whose client does not come to the end of its headers.

    uvicorn waits for them forever: 0.54, h11_impl.py, has a limit for the time between requests.
    """

    seconds = 60.0
    _due: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Take what came; what is no whole request yet is waited for no longer than it may be."""
        super().data_received(data)
        if not self._is_idle():
            self._stop_waiting()
        elif self._due is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        self._due = self.loop.call_later(self.seconds, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._due = None
        if self._is_idle():
            self.transport.close()
