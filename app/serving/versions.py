"""Which engine answers: the models of a server by name, version and alias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.errors import nearest
from app.serving.engine import Engine
from app.serving.refusals import Problem, Refused


@dataclass(frozen=True)
class Table:
    """Hold who answers, at one time.

    Attributes:
        engines: by name and version.
        newest: name → the version that answers where a request names none.
        aliases: (name, alias) → version.
        default: the name that answers where a request names none.
    """

    engines: Mapping[tuple[str, str], Engine]
    newest: Mapping[str, str]
    aliases: Mapping[tuple[str, str], str]
    default: str

    def names(self) -> list[str]:
        """Return all that a request may name."""
        return [
            *self.newest,
            *(f"{name}:{version}" for name, version in self.engines),
            *(f"{name}@{alias}" for name, alias in self.aliases),
        ]


class Models:
    """The engines of a server, of which one may be exchanged between two requests.

    Args:
        engines: one or more; the first answers where a request names none.
        aliases: (name, alias) → version.
    """

    def __init__(
        self, engines: Sequence[Engine], aliases: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        self._table = Table(
            engines={_key(engine): engine for engine in engines},
            newest={engine.name: engine.version for engine in reversed(engines)},
            aliases=dict(aliases or {}),
            default=engines[0].name,
        )

    @property
    def default(self) -> Engine:
        """The engine that answers where a request names none."""
        table = self._table
        return table.engines[table.default, table.newest[table.default]]

    def all(self) -> list[Engine]:
        """Return every engine."""
        return list(self._table.engines.values())

    def aliases(self, engine: Engine) -> list[str]:
        """Return the aliases that stand for an engine."""
        named = self._table.aliases.items()
        return [alias for (name, alias), version in named if (name, version) == _key(engine)]

    def choose(self, name: str | None) -> Engine:
        """Return the engine that a request asks for.

        Args:
            name: NAME, NAME:VERSION, NAME@ALIAS, or None for the default.

        Raises:
            Refused: there is none; names those that there are.
        """
        if name is None:
            return self.default
        table = self._table
        model, at, alias = name.partition("@")
        if at:
            version = table.aliases.get((model, alias))
        else:
            model, colon, version = name.partition(":")
            version = version if colon else table.newest.get(model)
        engine = table.engines.get((model, version or ""))
        if engine is None:
            known = table.names()
            remedy = f"there is {', '.join(known)}.{nearest(name, known)}"
            raise Refused(
                404, "No such model.", [Problem("model", f"'{name}' is not here", remedy)]
            )
        return engine

    def exchange(self, new: Engine, old: Engine | None = None, alias: str | None = None) -> None:
        """Let a new engine answer from the next request on.

        Args:
            new: answers by its name from now on.
            old: answers the requests that it has, and then ends; None: nothing ends.
            alias: that stands for the new engine from now on.
        """
        table, new.observer = self._table, self.default.observer
        engines = {key: engine for key, engine in table.engines.items() if engine is not old}
        aliases = dict(table.aliases)
        if alias is not None:
            aliases[new.name, alias] = new.version
        self._table = Table(  # in one step, so that a request finds either
            engines={**engines, _key(new): new},
            newest={**table.newest, new.name: new.version},
            aliases=aliases,
            default=table.default,
        )

    def close(self) -> None:
        """End all engines, once they have done what waits."""
        for engine in self.all():
            engine.close()


def _key(engine: Engine) -> tuple[str, str]:
    return engine.name, engine.version
