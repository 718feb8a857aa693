"""What a client is told instead of an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.errors import UserError

# The flags that messages of the command line name, as requests call them.
FIELDS = {"--prompt": "prompts", "--box": "prompts.boxes", "image": "images"}


@dataclass(frozen=True)
class Problem:
    """Hold one thing that the client can mend.

    Attributes:
        field: of the request, such as "prompts.0.threshold"; empty: the whole of it.
        message: what is wrong.
        remedy: what mends it.
    """

    field: str
    message: str
    remedy: str = ""


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        error: one sentence.
        problems: all that were found.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        error: str,
        problems: Sequence[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.problems = status, error, tuple(problems)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON of every error of ours."""
        return {"error": self.error, "problems": [asdict(problem) for problem in self.problems]}


def busy(error: str, seconds: float) -> Refused:
    """Return a refusal for now: the client may ask again after so many seconds."""
    wait = str(max(1, round(seconds)))
    remedy = f"ask again in {wait} s"
    return Refused(503, error, [Problem("", error, remedy)], {"Retry-After": wait})


def unusable(error: UserError) -> Refused:
    """Return what the tool says of a user's mistake as a refusal of values."""
    return Refused(
        422, "The request cannot be answered as it is.", [_problem(p) for p in error.problems]
    )


def _problem(text: str) -> Problem:
    field = ""
    for flag, name in FIELDS.items():
        if re.match(rf"{flag}\b", text):
            field, text = name, text[len(flag) :].lstrip(": ")
            break
    message, _, remedy = text.partition("; ")
    return Problem(field, message, remedy)
