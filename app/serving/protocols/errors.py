"""Errors in the shape of a protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.routing import APIRoute

from app.errors import UserError
from app.serving.refusals import Refused, unusable


def answering(respond: Callable[[Refused], Response]) -> type[APIRoute]:
    """Return a kind of routes whose refusals are answered by `respond`."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                try:
                    return await handle(request)
                except UserError as error:
                    return respond(unusable(error))
                except Refused as refusal:
                    return respond(refusal)

            return handled

    return Route


def in_words(refusal: Refused) -> str:
    """Return all that a refusal tells, as one text."""
    problems = [f"{p.field} {p.message}; {p.remedy}".strip(" ;.") for p in refusal.problems]
    return " ".join([refusal.error, *(f"{problem}." for problem in problems)])
