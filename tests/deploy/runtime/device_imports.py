"""Imports as on a device: what is installed is refused, but for the packages that it has."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Collection
from typing import Any


def allow_only(packages: Collection[str]) -> None:
    """Let this process find no other installed package; built-in modules and own files stay."""

    class Refuse(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            spec = super().find_spec(name, path, target)
            place = str(spec.origin or "") if spec else ""
            if "site-packages" in place and name.partition(".")[0] not in packages:
                return None
            return spec

    importers = importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter
    sys.meta_path[:] = [*importers, Refuse]
