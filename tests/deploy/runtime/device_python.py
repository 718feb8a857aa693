"""Import modules on a bare Python: packages that it lacks are names that take anything.

python3.10 device_python.py "numpy PIL …" app.console …
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types


def stand_in(name):
    """Return a class of exceptions, or what takes anything."""
    if name.startswith("__"):
        raise AttributeError(name)
    for ending, kind in (("Warning", Warning), ("Error", Exception)):
        if name.endswith(ending):
            return type(name, (kind,), {})
    return Anything()


class Anything:
    """Answers to every name, call and operator of a module's top level."""

    def __getattr__(self, name):
        return stand_in(name)

    def __call__(self, *_, **__):
        return self

    def __mro_entries__(self, _):
        return ()

    def __iter__(self):
        return iter(())

    __getitem__ = __or__ = __ror__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __call__
    __truediv__ = __neg__ = __lt__ = __gt__ = __call__


class Package(types.ModuleType):
    """A module with every name."""

    __path__: list = []  # noqa: RUF012

    def __getattr__(self, name):
        return stand_in(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are named."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Package(spec.name)

    def exec_module(self, module):
        pass


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder(sys.argv[1].split()))
    for each in sys.argv[2:]:
        importlib.import_module(each)
    print(".".join(map(str, sys.version_info[:2])), len(sys.argv) - 2)
