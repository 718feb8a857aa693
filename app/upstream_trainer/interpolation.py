"""The interpolations of a YAML of upstream's: references to its own keys, and arithmetic.

OmegaConf's other resolvers read the environment, import what they are given, or make text and lists
of any length. References that double what they refer to, time and again, have no end in practice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app.errors import UserError

MOST = 200_000  # values and characters of a YAML whose references are followed
DEEPEST = 100  # levels, and references to references
LONGEST = 2_000  # characters of a value with references
Path = tuple[str, ...]  # of a value: the keys and indices that lead to it
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_PARTS = re.compile(r"[.\[\]]+")
_VALUE = "\0"  # stands for what an inner interpolation gives


def register_resolvers() -> None:
    """Register those resolvers of upstream's (train_utils.py:48) that only compute."""
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def check_interpolations(config: DictConfig) -> None:
    """Raise UserError where a value refers to anything but keys and numbers of the YAML itself.

    Each problem names the key and the value.
    """
    content = OmegaConf.to_container(config, resolve=False)
    _Size(content).of((), content)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return value


RESOLVERS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: _number(x) + _number(y),
    "subtract": lambda x, y: _number(x) - _number(y),
    "times": lambda *factors: math.prod(map(_number, factors)),
    "divide": lambda x, y: _number(x) / _number(y),
    "int": int,
    "ceil_int": lambda x: math.ceil(_number(x)),
    "string": str,
}


class _Size:
    """Counts the values and characters that a YAML has once its references are followed."""

    def __init__(self, content: Any) -> None:
        self.content = content
        self.known: dict[Path, int] = {}
        self.depth = 0

    def of(self, path: Path, node: Any) -> int:
        """Return the size of what stands at a path; raise UserError where it has no end."""
        if path in self.known:
            return self.known[path]
        self.known[path] = MOST  # until it is counted: what refers to itself is too large
        self.depth += 1
        if self.depth > DEEPEST:
            raise UserError(f"{_key(path)}: more than {DEEPEST} levels or references deep")
        children = _children(node)
        if children:
            size = 1 + sum(self.of((*path, name), child) for name, child in children.items())
        else:
            size = 1 + (self._of_text(path, node) if isinstance(node, str) else 0)
        self.depth -= 1
        if size > MOST:
            raise UserError(f"{_key(path)}: refers to itself, or grows without an end")
        self.known[path] = size
        return size

    def _of_text(self, path: Path, text: str) -> int:
        """Count a text, from its innermost interpolation outwards."""
        size, left = len(text), text
        if "${" in text and len(text) > LONGEST:
            raise UserError(f"{_key(path)}: references in a text of {len(text)} characters")
        while found := _INNERMOST.search(left):
            name, colon, _ = found[1].partition(":")
            if colon and name.strip() not in RESOLVERS:
                raise UserError(
                    f"{_key(path)}: {text!r}: of resolvers there are {', '.join(RESOLVERS)}; "
                    "write the value itself"
                )
            if not colon:
                size += self._of_reference(path, name.strip())
            left = left[: found.start()] + _VALUE + left[found.end() :]
        if "${" in left:
            raise UserError(f"{_key(path)}: {text!r}: is not understood; write the value itself")
        return size

    def _of_reference(self, path: Path, name: str) -> int:
        """Count what a reference leads to; where a part of it is computed, all that it could be."""
        relative = name.lstrip(".")
        dots = len(name) - len(relative)
        parts = [*path[:-dots], *_PARTS.split(relative)] if dots else _PARTS.split(relative)
        node: Any = self.content
        at: Path = ()
        for part in filter(None, parts):
            children = _children(node)
            if part not in children:
                return self.of(at, node) if _VALUE in part else 0  # OmegaConf says what is missing
            node, at = children[part], (*at, part)
        return self.of(at, node)


def _children(node: Any) -> dict[str, Any]:
    items = enumerate(node) if isinstance(node, list) else {}
    return {str(key): child for key, child in (node.items() if isinstance(node, dict) else items)}


def _key(path: Path) -> str:
    return ".".join(path) or "the YAML"
