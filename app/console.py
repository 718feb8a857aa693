"""What a command says: its news to stdout, what the user must mend to stderr."""

from __future__ import annotations

import logging
import sys

from app.errors import UserError


def log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("app")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def show_problems(error: UserError) -> None:
    """A line each; those that begin with a blank go on with the one before."""
    for problem in error.problems:
        print(problem if problem.startswith(" ") else f"error: {problem}", file=sys.stderr)
