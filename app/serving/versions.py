"""Which engine answers: the models of a server by name, version and alias."""

from __future__ import annotations

import random
from asyncio import Task
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import nearest
from app.serving.engine import Engine
from app.serving.refusals import Problem, Refused


@dataclass(frozen=True)
class Table:
    """Hold who answers, at one time.

    Attributes:
        engines: by name and version.
        aliases: (name, alias) → version.
        main: name → the alias that answers where a request names neither version nor alias; without
            one, the name's first engine answers.
        default: the name that answers where a request names none.
    """

    engines: Mapping[tuple[str, str], Engine]
    aliases: Mapping[tuple[str, str], str]
    main: Mapping[str, str]
    default: str

    def main_version(self, name: str) -> str:
        """Return the version that a name alone asks for; empty where there is none."""
        if name in self.main:
            return self.aliases[name, self.main[name]]
        return next((version for model, version in self.engines if model == name), "")

    def names(self) -> list[str]:
        """Return all that a request may name."""
        return [
            *dict.fromkeys(name for name, _ in self.engines),
            *(f"{name}:{version}" for name, version in self.engines),
            *(f"{name}@{alias}" for name, alias in self.aliases),
        ]


class Models:
    """The engines of a server, of which one may be exchanged between two requests.

    Args:
        engines: one or more; the first answers where a request names none, and the first of a name
            where it names no version; if an alias stands for that one, whatever the alias means.
        aliases: (name, alias) → version.
        canary: NAME:VERSION or NAME@ALIAS, and the share of the requests that it answers, 0..1, of
            those that ask for the default and for no version.
        shadow: NAME:VERSION or NAME@ALIAS; is asked what others answer, to be compared.

    Raises:
        Refused: as of `choose`, for what canary and shadow name.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        aliases: Mapping[tuple[str, str], str] | None = None,
        canary: tuple[str, float] | None = None,
        shadow: str | None = None,
    ) -> None:
        self._canary, self._shadow = canary, shadow
        self.comparisons: set[Task[None]] = set()  # of the shadow's answers, at work
        first = {engine.name: engine.version for engine in reversed(engines)}
        known = reversed([*(aliases or {}).items()])
        self._table = Table(
            main={name: alias for (name, alias), version in known if first.get(name) == version},
            engines={_key(engine): engine for engine in engines},
            aliases=dict(aliases or {}),
            default=engines[0].name,
        )
        for named in (canary[0] if canary else None, shadow):
            if named is not None:
                self._named(named)

    @property
    def default(self) -> Engine:
        """The engine that answers where a request names none."""
        table = self._table
        return table.engines[table.default, table.main_version(table.default)]

    def all(self) -> list[Engine]:
        """Return every engine."""
        return list(self._table.engines.values())

    def aliases(self, engine: Engine) -> list[str]:
        """Return the aliases that stand for an engine."""
        named = self._table.aliases.items()
        return [alias for (name, alias), version in named if (name, version) == _key(engine)]

    @property
    def shadow(self) -> Engine | None:
        """The engine that is asked what others answer; None: none."""
        return None if self._shadow is None else self._named(self._shadow)

    def choose(self, name: str | None) -> Engine:
        """Return the engine that a request asks for; a share of the default's is the canary's.

        Args:
            name: NAME, NAME:VERSION, NAME@ALIAS, or None for the default.

        Raises:
            Refused: there is none; names those that there are.
        """
        if name is None or name == self._table.default:
            if self._canary is not None and random.random() < self._canary[1]:
                return self._named(self._canary[0])
            return self.default
        return self._named(name)

    def _named(self, name: str) -> Engine:
        table = self._table
        model, at, alias = name.partition("@")
        if at:
            version = table.aliases.get((model, alias))
        else:
            model, colon, version = name.partition(":")
            version = version if colon else table.main_version(model)
        engine = table.engines.get((model, version or ""))
        if engine is None:
            known = table.names()
            remedy = f"there is {', '.join(known)}.{nearest(name, known)}"
            raise Refused(
                404, "No such model.", [Problem("model", f"'{name}' is not here", remedy)]
            )
        return engine

    def has(self, name: str, version: str) -> bool:
        """Return whether a version is here."""
        return (name, version) in self._table.engines

    def version(self, name: str, alias: str) -> str | None:
        """Return the version that an alias stands for; None: none."""
        return self._table.aliases.get((name, alias))

    def add(self, new: Engine, alias: str) -> None:
        """Let an alias stand for a new version from the next request on, as `move` does."""
        new.observer = self.default.observer
        self._table = replace(self._table, engines={**self._table.engines, _key(new): new})
        self.move(new.name, alias, new.version)

    def move(self, name: str, alias: str, version: str) -> None:
        """Let an alias stand for another version, which is here, from the next request on.

        The version that no alias stands for any more answers the requests that it has, and ends.
        """
        table = self._table
        before = table.aliases.get((name, alias))
        aliases = {**table.aliases, (name, alias): version}
        named = {(model, number) for (model, _), number in aliases.items()}
        left = {(name, before)} - named
        engines = {key: engine for key, engine in table.engines.items() if key not in left}
        self._table = replace(table, engines=engines, aliases=aliases)

    def close(self) -> None:
        """End all engines, once they have done what waits."""
        for engine in self.all():
            engine.close()


def _key(engine: Engine) -> tuple[str, str]:
    return engine.name, engine.version
