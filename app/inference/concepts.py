"""Concepts: example boxes, encoded once, that stand for a class in images they were not drawn in.

A model reads their tokens where it would read those of words. Needs no torch, as the runtime.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import UserError
from app.files import atomic_path

ENDING = ".concept"
MOST_TOKENS, MOST_CONCEPTS, MOST_WIDTH = 1024, 1000, 16_384
_INFO = "info"


@dataclass(frozen=True)
class Concept:
    """Hold what a model reads of a class's example boxes.

    Attributes:
        name: the prompt that asks for it.
        tokens: (T, D) float32, those of words first, then one a box.
        boxes: how many examples there were.
        weights: what tells the weights that encoded them from others; empty where nothing does.
    """

    name: str
    tokens: NDArray[np.float32]
    boxes: int
    weights: str = ""


def write(file: Path, concepts: Sequence[Concept]) -> None:
    """Write concepts to one file, whole or not at all."""
    info = [{"name": c.name, "boxes": c.boxes, "weights": c.weights} for c in concepts]
    arrays: dict[str, Any] = {str(index): c.tokens for index, c in enumerate(concepts)}
    arrays[_INFO] = np.array(json.dumps(info))
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **arrays)


def read(file: Path) -> list[Concept]:
    """Read the concepts of a file, as `write` leaves it.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f"--concept {file}: no such file; python -m app concept makes one")
    try:
        with np.load(file, allow_pickle=False) as content:
            info = json.loads(str(content[_INFO]))
            found = [
                Concept(
                    str(each["name"]),
                    np.ascontiguousarray(content[str(index)]),
                    int(each["boxes"]),
                    str(each["weights"]),
                )
                for index, each in enumerate(info[:MOST_CONCEPTS])
            ]
    except (OSError, ValueError, KeyError, TypeError, MemoryError, EOFError, zipfile.BadZipFile):
        found = []
    if not found or not all(map(_is_sound, found)):
        raise UserError(f"--concept {file}: is no file that python -m app concept has written")
    return found


def read_all(files: Iterable[Path | str]) -> list[Concept]:
    """Read the concepts of several files, in their order; raise UserError as `read`."""
    return [concept for file in files for concept in read(Path(file))]


def _is_sound(concept: Concept) -> bool:
    tokens = concept.tokens
    is_matrix = tokens.ndim == 2 and tokens.dtype == np.float32 and bool(tokens.size)
    within = is_matrix and len(tokens) <= MOST_TOKENS and tokens.shape[1] <= MOST_WIDTH
    return within and bool(np.isfinite(tokens).all()) and bool(concept.name.strip())


def check(concepts: Sequence[Concept], width: int, weights: str, length: int | None = None) -> str:
    """Return a note of concepts that other weights have encoded; empty where there are none.

    Args:
        width: D of the model's tokens.
        weights: what tells them from others; empty where nothing does.
        length: tokens that the model reads of a prompt; None: any number.

    Raises:
        UserError: concepts that the model cannot read.
    """
    problems = []
    for concept in concepts:
        count, found = concept.tokens.shape
        if found != width:
            problems.append(
                f"concept '{concept.name}': is of a model with {found} channels, and this one has "
                f"{width}; encode its examples by these weights: python -m app concept"
            )
        elif length is not None and count > length:
            problems.append(
                f"concept '{concept.name}': has {count} tokens, and this export reads {length} of "
                f"a prompt; make it of {concept.boxes - (count - length)} boxes"
            )
    if problems:
        raise UserError(problems)
    others = [c.name for c in concepts if weights and c.weights and c.weights != weights]
    if not others:
        return ""
    names = ", ".join(f"'{name}'" for name in others)
    return (
        f"note: {names}: encoded by other weights than these, which may read them otherwise; "
        "python -m app concept encodes them anew"
    )
