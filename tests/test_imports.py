"""The order of the rooms and the absence of circles, from the imports themselves.

That the runtime of exported folders needs no torch is in deploy/runtime/test_imports.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

# A module imports from its own room and from rooms above it.
SHARED = ("errors", "files", "console", "page", "signals")  # what every room may use
ROOMS = (
    *("config", "datasets", "model", "inference", "evaluation", "training", "launch"),
    *(
        "compression",
        "planning",
        "sweeps",
        "scale",
        "tracking",
        "upstream_trainer",
        "deploy",
        "serving",
        "ring",
        "cli",
        "__main__",
    ),
)

# What breaks the order today. An entry that is mended must be taken out.
KNOWN: set[str] = set()


@dataclass(frozen=True)
class Import:
    """An import of a module of app/.

    Attributes:
        lazy: within a function, and so only where the function is called.
        typing: for a type checker alone.
    """

    source: str
    target: str
    lazy: bool
    typing: bool


@cache
def modules() -> dict[str, Path]:
    """Return the files of app/ by the names of their modules."""
    named = {}
    for file in sorted((REPOSITORY / "app").rglob("*.py")):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


@cache
def imports() -> tuple[Import, ...]:
    """Return every import of a module of app/ by another one."""
    return tuple(
        Import(name, target, lazy, typing)
        for name, file in modules().items()
        for node, lazy, typing in _statements(ast.parse(file.read_bytes()))
        for target in _targets(name, file.name == "__init__.py", node)
        if target != name
    )


def _statements(
    node: ast.AST, lazy: bool = False, typing: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy, typing
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _statements(ast.Module([part], []), lazy, True)
            for part in child.orelse:
                yield from _statements(ast.Module([part], []), lazy, typing)
        else:
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, lazy or inner, typing)


def _targets(module: str, package: bool, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of app/ that a statement names, not the packages that hold them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules())
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        above = parts[: len(parts) - node.level + package]
        base = ".".join([*above, base] if base else above)
    names = [f"{base}.{alias.name}" for alias in node.names]
    yield from (name for name in names if name in modules())
    if base in modules() and any(name not in modules() for name in names):
        yield base


def _rank(module: str) -> int:
    """Return the place of a module's room; 0 for what every room may use."""
    room = module.split(".")[1]
    return 0 if room in SHARED else 1 + ROOMS.index(room)


def test_every_module_has_a_room() -> None:
    rooms = {name.split(".")[1] for name in modules() if "." in name}
    assert rooms - {*SHARED, *ROOMS, "assets"} == set()
    assert len(imports()) > 300


def test_a_room_imports_from_itself_and_from_rooms_above() -> None:
    """Also within functions. app/__init__.py alone may prove the pin of upstream."""
    wrong = {
        f"{one.source} -> {one.target}"
        for one in imports()
        if not one.typing and "." in one.source and "." in one.target
        if _rank(one.target) > _rank(one.source)
    }
    wrong |= {
        f"{one.source} -> {one.target}"
        for one in imports()
        if one.source == "app" and not one.target.startswith("app.model.upstream")
    }
    assert sorted(wrong - KNOWN) == []
    assert sorted(KNOWN - wrong) == [], "mended: take them out of KNOWN"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """As they are loaded: what a function imports later closes no circle."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for one in imports():
        if not one.lazy and not one.typing:
            graph[one.source].add(one.target)
    assert [sorted(circle) for circle in _circles(graph)] == []


def _circles(graph: dict[str, set[str]]) -> Iterator[frozenset[str]]:
    """Yield the sets of modules of which each leads to all others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        ahead, waiting = set(), [start]
        while waiting:
            for target in graph[waiting.pop()] - ahead:
                ahead.add(target)
                waiting.append(target)
        reached[start] = ahead
    for name, ahead in reached.items():
        circle = frozenset(other for other in ahead if name in reached[other])
        if name in circle and name == min(circle):
            yield circle


def test_a_circle_is_recognised() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert list(_circles(graph)) == [frozenset("abc")]


def test_statements_are_read_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from . import files
from .model import build, weights as stored
from app.datasets.coco import Dataset
import app.errors
if TYPE_CHECKING:
    from app.console import say
def later():
    import app.page
"""
    named = ("app", "app.files", "app.model.build", "app.model", "app.datasets.coco", "app.errors")
    known = dict.fromkeys((*named, "app.console", "app.page"), Path())
    monkeypatch.setitem(_targets.__globals__, "modules", lambda: known)
    found = [
        (target, lazy, typing)
        for node, lazy, typing in _statements(ast.parse(code))
        for target in _targets("app.signals", False, node)
    ]
    assert found == [
        ("app.files", False, False),
        ("app.model.build", False, False),
        ("app.model", False, False),
        ("app.datasets.coco", False, False),
        ("app.errors", False, False),
        ("app.console", False, True),
        ("app.page", True, False),
    ]
