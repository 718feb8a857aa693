"""What `train` was asked for beside a sweep: the words that all its cells have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Hold the words of a command.

    Attributes:
        overrides: `KEY=VALUE`s, those of flags among them.
        size, recipe, lr: of the flags --model, --recipe and --lr.
    """

    overrides: tuple[str, ...] = ()
    size: str = "auto"
    recipe: str | None = None
    lr: float | None = None
