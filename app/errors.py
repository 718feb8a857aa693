"""The error for what the user can mend: every problem at once, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something that the user can mend: wrong flag, broken file, missing weights.

    The command line prints it and exits with 2. List every problem that was found, not only the
    first, each with the value, the place and the remedy.

    Args:
        problems: one line a problem; a single string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def nearest(word: str, known: Iterable[str], alike: float = 0.5) -> str:
    """Return ` Did you mean 'x'?` with the known word most like `word`, or an empty string.

    Args:
        alike: 0..1, how much the words must be, by difflib's ratio.
    """
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f" Did you mean '{matches[0]}'?" if matches else ""
