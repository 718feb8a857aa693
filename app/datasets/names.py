"""The image file that a label means, whatever system wrote its name: one rule for every format.

A name is taken as it is written where such a file is there. Else it is read as its writer meant it:
a backslash parts folders, a drive, an address or a leading slash is left out, `..` and all before
it too, `%20` is a blank, letters are compared in Unicode's composed form. The one image file then
counts that ends as the name does; letter case and a missing ending are forgiven. Where several
could be meant, none is. No file outside the dataset's folder is ever opened.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from app.datasets.faults import Findings
from app.datasets.images import EXTENSIONS

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DRIVE = re.compile(r"[A-Za-z]:(?=[\\/])")
SHOWN = 3  # files that a name may mean, in a message
MAX_NAME = 4096  # characters, as long as a path can be on Linux


@dataclass(frozen=True)
class Named:
    """A file that a name means; `how` says what was forgiven, None where nothing was."""

    path: Path
    how: str | None = None


class Names:
    """The image files of a split, found by the names that its labels give them.

    Args:
        roots: folders in which a name may begin, in this order, each with its `images/`.
        home: the dataset's folder, which no file may leave; the roots unless given.
        search: the folder that is searched, at any depth, for what no root has; the first root
            unless given.
    """

    def __init__(
        self, roots: Sequence[Path], home: Path | None = None, search: Path | None = None
    ) -> None:
        self.roots = list(dict.fromkeys(path for root in roots for path in (root, root / "images")))
        self.homes = [folder.resolve() for folder in ([home] if home else roots)]
        self.search = search or roots[0]

    def locate(
        self, name: str, place: str, findings: Findings, near: Path | None = None
    ) -> Path | None:
        """Return the file, its links followed; report how it was found, or that it was not."""
        found = self.find(name, near)
        if isinstance(found, str):
            several = found.startswith("may be")
            findings.add("ambiguous name" if several else "image missing", place, name, found)
            return None
        path = found.path.resolve()
        if not any(path.is_relative_to(home) for home in self.homes):
            remedy = f"is a link that leads out of the dataset, to {path}; copy the file there"
            findings.add("link", place, name, remedy)
            return None
        if found.how:
            findings.add("other name", place, name, found.how)
        return path

    def paths(self, names: Iterable[object]) -> set[Path]:
        """Return the files that these names mean, links followed; pass over what is no name."""
        found = (self.find(name) for name in names if isinstance(name, str) and name.strip())
        return {named.path.resolve() for named in found if isinstance(named, Named)}

    def find(self, name: str, near: Path | None = None) -> Named | str:
        """Return the file that a name means, or why there is none, as a remedy.

        Args:
            near: folder of the label, from which the name may lead.
        """
        if near and (led := self._led_from(near, name)):
            return Named(led)
        if (written := self._written(name)) is not None:
            return Named(written)
        for parts in readings(name):
            if found := self._ending_in(parts):
                if len(found) == 1:
                    return Named(found[0], f"is read as {self._shown(found[0])}")
                listed = ", ".join(self._shown(path) for path in found[:SHOWN])
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                return f"may be {listed}{more}: write the folder into the name, or keep one"
        places = " and ".join(map(str, dict.fromkeys([self.search, *self.roots[:2]])))
        return f"no such file in {places}; add it, or mend its name"

    def _led_from(self, near: Path, name: str) -> Path | None:
        path = Path(os.path.normpath(near / name.replace("\\", "/")))
        try:
            inside = any(path.is_relative_to(home) for home in self.homes)
            return path if inside and path.is_file() else None
        except (OSError, ValueError):  # too long, NUL
            return None

    def _written(self, name: str) -> Path | None:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        for root in self.roots:
            try:
                if (root / name).is_file():
                    return root / name
            except (OSError, ValueError):  # too long, NUL, a folder that may not be read
                continue
        return None

    def _ending_in(self, parts: Sequence[str]) -> list[Path]:
        """Return the files whose path ends most like these parts: one where it is clear."""
        keys = [fold(part) for part in parts]
        found = self._by_name.get(keys[-1], [])
        if not found and not keys[-1].endswith(EXTENSIONS):
            found = self._by_stem.get(keys[-1], [])
        likeness = {
            path: (
                _shared_folders(path, keys),
                unicodedata.normalize("NFC", path.name) == parts[-1],
                -self._rank(path),
            )
            for path in found
        }
        best = max(likeness.values(), default=None)
        return [path for path in found if likeness[path] == best]

    def _rank(self, path: Path) -> int:
        """Return the place of the file's folder among the roots, the last where it is none."""
        return self.roots.index(path.parent) if path.parent in self.roots else len(self.roots)

    def _shown(self, path: Path) -> str:
        home = self.homes[0]
        return str(
            path.resolve().relative_to(home) if path.resolve().is_relative_to(home) else path
        )

    @cached_property
    def _files(self) -> list[Path]:
        return list(walk_images(self.search))

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        return _index(self._files, lambda path: path.name)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        return _index(self._files, lambda path: path.stem)


def readings(name: str) -> Iterator[list[str]]:
    """Yield the folders and the file that a name may mean, composed (NFC); the plainest first."""
    name = name[:MAX_NAME].strip().replace("\0", "")
    texts = [name]
    if ADDRESS.match(name) or name.startswith("/data/"):  # as Label Studio writes what it holds
        address = urlsplit(name)
        texts = [*parse_qs(address.query).get("d", []), address.path]
    for text in texts:
        for plain in dict.fromkeys((text, unquote(text))):
            parts = [part for part in re.split(r"[\\/]+", DRIVE.sub("", plain)) if part != "."]
            if ".." in parts:
                parts = parts[len(parts) - parts[::-1].index("..") :]
            if parts := [unicodedata.normalize("NFC", part) for part in parts if part.strip()]:
                yield parts


def fold(name: str) -> str:
    """Return a name as it is compared where letter case and Unicode form are forgiven."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def walk_images(folder: Path, endings: tuple[str, ...] = EXTENSIONS) -> Iterator[Path]:
    """Yield the image files under a folder, at any depth, in order, without hidden ones.

    Links to folders are not followed.

    Args:
        endings: of the files' names, in small letters.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(parent, name)


def _index(paths: Sequence[Path], part: Callable[[Path], str]) -> dict[str, list[Path]]:
    index: dict[str, list[Path]] = {}
    for path in paths:
        index.setdefault(fold(part(path)), []).append(path)
    return index


def _shared_folders(path: Path, keys: Sequence[str]) -> int:
    """Count the folders before the file's name in which a path and the folded parts agree."""
    count = 0
    for own, wanted in zip(path.parts[-2::-1], keys[-2::-1], strict=False):
        if fold(own) != wanted:
            break
        count += 1
    return count
