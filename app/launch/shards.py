"""Which piece of a work this process does: numbered by Slurm, Kubernetes or a loop."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import UserError

# Variables by which engines number their processes, from 0 unless a first number is told.
NUMBERS = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
FIRST = {"SLURM_ARRAY_TASK_ID": "SLURM_ARRAY_TASK_MIN"}


@dataclass(frozen=True)
class Shard:
    """Hold which of several pieces is meant, from 0."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """Return the shard of `I/N`, with I from 0.

    Raises:
        UserError: another text, or a number that is not below its count.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {text}: must be I/N, from 0/N to N-1/N")
    return Shard(int(found[1]), int(found[2]))


def choose(text: str, count: int, flag: str, *, below: str = "") -> int:
    """Return the number that a flag gives, from 0 and below `count`; auto: that of an engine.

    Args:
        below: how a message names the flag of the count.

    Raises:
        UserError: another text, no engine that numbers, or a number that is too high.
    """
    number = numbered() if text == "auto" else None
    if re.fullmatch("[0-9]{1,9}", text):
        number = int(text)
    if number is None:
        names = " or ".join(NUMBERS)
        raise UserError(f"{flag} {text}: must be a number; auto takes that of {names}")
    if number >= count:
        raise UserError(f"{flag} {number}: must be below {below}{count}")
    return number


def numbered(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number, from 0, that an engine has given this process; None: it has given none.

    Raises:
        UserError: what stands there is no number.
    """
    for name in NUMBERS:
        if (text := environment.get(name)) is None:
            continue
        first = environment.get(FIRST.get(name, ""), "0")
        if not (re.fullmatch(r"[0-9]{1,9}", text) and re.fullmatch(r"[0-9]{1,9}", first)):
            raise UserError(f"{name}={text}: must be a number")
        return int(text) - int(first)
    return None
