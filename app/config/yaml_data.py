"""YAML that may come from anyone: data only, within bounds of size, depth and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml

from app.errors import UserError
from app.files import read_text

MAX_BYTES = 1 << 20  # 10 s of PyYAML's
MAX_DEPTH = 64  # lists and mappings within each other
MAX_NODES = 50_000  # with what aliases stand for, each time they are written
MAX_DIGITS = 64  # characters of a number
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_TAGS = _NUMBERS | {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "bool", "null", "seq", "map", "merge")
}


def read_yaml(file: Path) -> Any:
    """Read YAML that is data only; raise UserError that names the place."""
    return parse_yaml(read_text(file, MAX_BYTES), str(file))


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML that is data only; raise UserError whose line starts with `place`."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{place}: has more than the {MAX_BYTES} characters that a YAML may have")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise UserError(f"{place}: broken YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Loads plain values, and refuses what only grows when it is walked through.

    Dates stay the text that they are written as: no setting is a date.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}  # anchor → nodes below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and count what it and its aliases stand for."""
        event, before = self.peek_event(), self._nodes
        if isinstance(event, yaml.AliasEvent) and event.anchor not in self._sizes:
            self._refuse(f"'*{event.anchor}' stands within itself, or for nothing")
        is_alias = isinstance(event, yaml.AliasEvent)
        self._nodes += self._sizes[event.anchor] if is_alias else 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_NODES} values, or more than {MAX_DEPTH} deep")
        node: yaml.Node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias and event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        if node.tag not in _TAGS:
            self._refuse(f"the tag '{node.tag}' stands for no plain value")
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            self._refuse(f"a number of {len(node.value)} characters")
        if "\0" in node.value:
            self._refuse("a text with the character NUL")
        return node

    def _refuse(self, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
