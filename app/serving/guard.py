"""What stands before every route: who asks, and how much; and what a client that leaves frees.

A body is taken whole before its route runs, so that a slow sender holds no place of an engine. The
route ends when its client leaves.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.answers import to_json
from app.serving.refusals import Problem, Refused, busy
from app.serving.settings import Settings

log = logging.getLogger("app")
# What says nothing of images, and what probes and browsers ask without a key.
OPEN = (
    "/",
    "/label",
    "/health",
    "/ready",
    "/docs",
    "/openapi.json",
    "/v2/health/live",
    "/v2/health/ready",
)
DISCARD_SECONDS = 2.0  # that a refused client may go on to send
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass
class Held:
    """Hold the bytes of the requests that are being received or answered."""

    nbytes: int = 0


class Guard:
    """An ASGI application around another one.

    Args:
        held: counts what the requests of this server hold.
    """

    def __init__(self, app: ASGIApp, settings: Settings, held: Held) -> None:
        self._app, self._settings = app, settings
        self._limits = settings.limits
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: check it, take its body, run its route until its client leaves."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        try:
            self._check_caller(scope)
            async with self._body(scope, receive) as body:
                if body is not None:
                    await self._run(scope, body, receive, send)
        except Refused as refusal:
            if refusal.status == 408 or not await _discard(scope, receive):
                refusal.headers["Connection"] = "close"
            await to_response(refusal)(scope, receive, send)

    def _check_caller(self, scope: Scope) -> None:
        """Raise Refused where the server is called by a stranger's name, or without its key."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        key = self._settings.key
        if key is None and not self._is_ours(_name_in(host)):
            remedy = "call it by its number or localhost, or start it with --allow-host NAME"
            problem = Problem("Host", f"'{host[:100]}' is not a name of this server", remedy)
            raise Refused(421, "The server is not called so.", [problem])
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            problem = Problem("Origin", "a page of another server asks", "ask by a program")
            raise Refused(403, "Pages of other servers may not ask.", [problem])
        if key is None or scope["path"] in OPEN:
            return
        given = headers.get("x-api-key") or headers.get("token") or ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer.strip()
        elif scheme.lower() == "basic":  # as Label Studio sends it, whatever the name
            given = _password(bearer)
        if not hmac.compare_digest(given.encode(), key.encode()):
            remedy = "send the header Authorization: Bearer KEY, or X-API-Key: KEY"
            problem = Problem("Authorization", "no key, or a wrong one", remedy)
            raise Refused(
                401, "The server asks for its key.", [problem], {"WWW-Authenticate": "Bearer"}
            )

    def _is_ours(self, name: str) -> bool:
        """Return whether no stranger's page can have made a browser call this name."""
        if name in ("localhost", *self._settings.hosts):
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return False

    @contextlib.asynccontextmanager
    async def _body(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes | None]:
        """Yield the body of a request, whole, and count it as held until its request ends.

        None: its client has left meanwhile.
        """
        most = self._limits.body_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if len(length) > 18 or (length.isdecimal() and int(length) > most):
            raise _too_large(most)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                whole = await self._receive(receive, parts)
            yield b"".join(parts) if whole else None
        except TimeoutError:
            seconds = self._limits.body_seconds
            problem = Problem("", f"was not sent within {seconds:g} s", "send it faster, or less")
            raise Refused(408, "The request came too slowly.", [problem]) from None
        finally:
            self._held.nbytes -= sum(map(len, parts))

    async def _receive(self, receive: Receive, parts: list[bytes]) -> bool:
        """Append the parts of a body as they come; return whether it came to its end."""
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            if self._held.nbytes + len(part) > self._limits.held_bytes:
                raise busy("Too much is being received.", 5.0)
            parts.append(part)
            size += len(part)
            self._held.nbytes += len(part)
            if size > self._limits.body_bytes:
                raise _too_large(self._limits.body_bytes)
            if not message.get("more_body", False):
                return True

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the route with the body, and end it where the client leaves."""
        bodies = [body]
        begun = False

        async def replay() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            return await asyncio.shield(leaving)

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        leaving = asyncio.ensure_future(_disconnect(receive))
        route = asyncio.ensure_future(self._app(scope, replay, sending))
        try:
            await asyncio.wait((route, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not route.done():
                route.cancel()
                await asyncio.wait((route,))
        if not route.cancelled() and (error := route.exception()) is not None:
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if not begun:
                problem = Problem("", type(error).__name__, "the server's log says more")
                refusal = Refused(500, "The server failed at this request.", [problem])
                await to_response(refusal)(scope, receive, send)


async def _discard(scope: Scope, receive: Receive) -> bool:
    """Take what a refused client still sends, for a while; return whether that was all.

    Many clients read no answer before they have sent all, and none once they are hung up on.
    """
    if "expect" in Headers(scope=scope):  # it waits for leave to send
        return False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    return True
    return False


async def _disconnect(receive: Receive) -> Message:
    """Wait until the client leaves."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def to_response(refusal: Refused) -> Response:
    """Return the response that tells a client why it is refused."""
    return Response(
        to_json(refusal.body()), refusal.status, refusal.headers, media_type="application/json"
    )


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            more = [
                (name.encode(), value.encode())
                for name, value in HEADERS.items()
                if name.encode() not in given
            ]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


def _name_in(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _too_large(most: int) -> Refused:
    problem = Problem("", "is too large", f"send at most {most >> 20} MiB")
    return Refused(413, "The request is too large.", [problem])


def _password(encoded: str) -> str:
    """Return the password of a basic authorization; empty where it has none."""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""
