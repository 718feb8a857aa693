"""Images, prompts and boxes, as the user names them: read and checked."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.console import counted
from app.datasets.images import EXTENSIONS, FILMS, film_problem
from app.errors import UserError
from app.files import MAX_JSON_BYTES, read_text, short_hash
from app.inference.journal import FILE as JOURNAL
from app.inference.journal import read_contents
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
LIST = ".txt"
SHOWN = 20  # missing files of a list
LONGEST_NAME = 200  # bytes; a file system takes 255, with a suffix and what marks it as unfinished
SPECIALS = 2  # tokens of start and end, around those of a prompt
BOX_IN_TILE = "--tile and --box: a box lies in one tile, not in all; give one of them"
Box = tuple[float, float, float, float]  # x, y, w, h in pixels


class Sized(Protocol):
    """Has sides in pixels, as an image does, and what is left of one."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


def find_images(source: str, flag: str = "--input") -> list[Path]:
    """Return the images of a file, a folder, a glob or a list, in the order of their names.

    A list is a `.txt` with a path a line, relative to the current folder or to that of the list;
    the images come in its order. Empty lines and those that begin with # are comments.

    What a folder or a glob holds beside images is passed over, and logged: hidden files, other
    kinds of files, and the pictures that an earlier prediction has left there.

    Args:
        flag: that named the source, for messages.

    Raises:
        UserError: an address, a film, no images, or a list that names what is not there.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() == LIST:
            return _listed(path, flag)
        if path.suffix.lower() in FILMS:
            raise UserError(f"{flag} {film_problem(path)}")
        return [path]
    if path.is_dir():
        entries = list(path.iterdir())
    else:
        if "://" in source:
            raise UserError(f"{flag} {source}: addresses are not fetched; download the image first")
        found = (Path(name) for name in matches(source))
        entries = [each for each in found if not each.is_dir()]
    images, passed_over = _part(root_of(source), entries, hidden=not path.is_dir())
    there = _in_words(passed_over)
    if not images:
        what = "no images in this folder" if path.is_dir() else "no such file, folder or glob"
        there = f"there: {there}; " if there else ""
        raise UserError(f"{flag} {source}: {what} ({there}images end in {', '.join(EXTENSIONS)})")
    if there:
        log.info("%s %s: passed over: %s", flag, source, there)
    return images


def root_of(source: str) -> Path:
    """Return the folder that --input names: itself, that of a file, or the fixed part of a glob."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))


def relative_names(source: str, images: Sequence[Path]) -> list[str]:
    """Return the path of each image relative to what --input names, with slashes.

    A list may name images outside of its folder: then all are relative to the nearest folder that
    holds them all.
    """
    # abspath takes ".." away and, unlike Path.resolve, follows no links.
    root = os.path.abspath(root_of(source))  # noqa: PTH100
    paths = [os.path.abspath(image) for image in images]  # noqa: PTH100
    if any(os.path.commonpath([root, path]) != root for path in paths):
        root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    return [Path(path).relative_to(root).as_posix() for path in paths]


def _part(
    root: Path, entries: Sequence[Path], *, hidden: bool
) -> tuple[list[Path], dict[str, list[Path]]]:
    """Part the entries of a folder into images, and others by why they are passed over.

    Args:
        root: the folder, or the fixed part of a glob.
        hidden: take hidden files as well: a glob matches them only where it asks for them.
    """
    results = _earlier_results(root, entries)
    images: list[Path] = []
    passed_over: dict[str, list[Path]] = {}
    for path in sorted(entries):
        if path.name == JOURNAL:
            continue
        if path in results:
            why = "of an earlier prediction"
        elif path.name.startswith(".") and not hidden:
            why = "hidden"
        elif path.is_dir():
            why = "folder"
        elif path.suffix.lower() not in EXTENSIONS:
            why = path.suffix.lower() or "without an ending"
        elif not path.is_file():
            why = "no file or a broken link"
        else:
            images.append(path)
            continue
        passed_over.setdefault(why, []).append(path)
    return images, passed_over


def _earlier_results(root: Path, entries: Iterable[Path]) -> set[Path]:
    """Return what earlier predictions have written in `root` and the folders of `entries` below."""
    parents = {parent for folder in {path.parent for path in entries} for parent in folder.parents}
    folders = {root, *(path.parent for path in entries), *parents}
    return {
        folder / Path(*part)
        for folder in folders
        if folder == root or folder.is_relative_to(root)
        for name in read_contents(folder).files
        for part in itertools.accumulate((p,) for p in Path(name).parts)
    }


def _in_words(passed_over: Mapping[str, Sequence[Path]]) -> str:
    """Return "1 folder (cam1), 3 .txt (a.txt, …)", and what to do with folders and films."""
    parts = []
    for why, paths in passed_over.items():
        what = counted(len(paths), why) if why == "folder" else f"{len(paths)} {why}"
        parts.append(f"{what} ({paths[0].name}{', …' if len(paths) > 1 else ''})")
    hints = [film_problem(paths[0]) for why, paths in passed_over.items() if why in FILMS][:1]
    if "folder" in passed_over:
        folder = passed_over["folder"][0].parent
        hints.append(f"--input '{folder / '**' / '*'}' takes what folders hold as well")
    return "; ".join([", ".join(parts), *hints])


def matches(pattern: str) -> Iterator[str]:
    """Yield what a glob stands for. `**` enters each folder once, so that circles of links end."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207
        return
    at = parts.index("**")
    tail = list(itertools.dropwhile("**".__eq__, parts[at:])) or ["*"]
    tops = glob.glob("/".join([*parts[:at], ""])) if at else ["."]  # noqa: PTH207
    seen: set[tuple[int, int]] = set()
    for folder, inner, _ in (step for top in tops for step in os.walk(top, followlinks=True)):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in seen:
            inner.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from matches("/".join([glob.escape(folder), *tail]))


def list_lines(file: Path, flag: str = "--input") -> list[str]:
    """Return the lines of a list that are not empty; raise UserError where it cannot be read."""
    lines = (line.strip() for line in _read_text(f"{flag} {file}", file).splitlines())
    return [line for line in lines if line]


def list_entries(file: Path, flag: str = "--input") -> list[str]:
    """Return what the lines of a list name, each once: a path of what is there, else as it is.

    A path is relative to the current folder, or to that of the list. Empty lines, and those of what
    is not there that begin with #, are left out.

    Raises:
        UserError: the list cannot be read, or is empty.
    """
    found = {
        name: next((str(p) for p in (Path(name), file.parent / name) if p.exists()), name)
        for name in list_lines(file, flag)
    }
    entries = [each for each in found.values() if Path(each).exists() or not each.startswith("#")]
    if not entries:
        raise UserError(f"{flag} {file}: an empty list; give the path of an image a line")
    return list(dict.fromkeys(entries))


def _listed(file: Path, flag: str) -> list[Path]:
    """Return the images of a list, each once; raise UserError that names those that are absent."""
    paths = [Path(entry) for entry in list_entries(file, flag)]
    films = [path for path in paths if path.suffix.lower() in FILMS and path.is_file()]
    if films:
        raise UserError([f"{flag} {file}: {film_problem(path)}" for path in films[:SHOWN]])
    missing = [path for path in paths if not path.is_file()]
    if missing:
        problems = [f"{flag} {file}: {name}: no such file" for name in missing[:SHOWN]]
        if len(missing) > SHOWN:
            problems.append(f"and {len(missing) - SHOWN} more that are not there")
        raise UserError(problems)
    return paths


def parse_box(text: str, flag: str = "--box") -> Box:
    """Read `x,y,w,h` in pixels; raise UserError where it is none."""
    try:
        x, y, w, h = (float(side) for side in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text}: give four numbers, x,y,w,h in pixels") from None
    if not (w > 0 and h > 0):
        raise UserError(f"{flag} {text}: width and height must be above 0")
    return x, y, w, h


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a file: one a line in a `.txt`, else YAML or JSON.

    YAML or JSON holds a list of prompts, or the mapping that training takes: `class: prompt`, or
    `class: [prompt, …]`, of which the first is used.

    Raises:
        UserError: the file cannot be read, or holds neither.
    """
    text = _read_text(f"--prompts {file}", file)
    if file.suffix.lower() == LIST:
        return [line.strip() for line in text.splitlines() if line.strip()]
    from app.config.yaml_data import parse_yaml  # here: no other input needs it

    content = parse_yaml(text, f"--prompts {file}")
    if isinstance(content, dict):
        first = [words[:1] if isinstance(words, list) else [words] for words in content.values()]
        content = [word for words in first for word in words or [None]]
    if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
        raise UserError(f"--prompts {file}: must be a list of prompts, or class: prompt")
    return content


def _read_text(place: str, file: Path) -> str:
    try:
        return read_text(file, MAX_JSON_BYTES)  # a list may name millions of images
    except UserError as error:
        raise UserError(f"{place}: {str(error).removeprefix(f'{file}: ')}") from None


def check_prompts(
    prompts: Sequence[str], boxes_xywh: Sequence[Sequence[float]] = ()
) -> tuple[str, ...]:
    """Return the prompts with single blanks; the visual prompt where there are boxes only.

    Raises:
        UserError: a prompt has no letter or digit, or there are neither prompts nor boxes.
    """
    stripped = tuple(" ".join(prompt.split()) for prompt in prompts)
    if any(not any(c.isalnum() for c in prompt) for prompt in stripped):
        raise UserError(
            "--prompt: a prompt of no words; name what to find, as in --prompt 'pothole'"
        )
    if not stripped and not boxes_xywh:
        raise UserError("Nothing to find: give --prompt 'a noun phrase' or --box x,y,w,h")
    return stripped or (VISUAL_PROMPT,)


def normalised_boxes(boxes_xywh: Sequence[Sequence[float]], image: Sized) -> NDArray[np.float32]:
    """Return boxes as (N, 4) cxcywh, 0..1, clipped to the image.

    Args:
        boxes_xywh: pixels.

    Raises:
        UserError: a box covers nothing of the image.
    """
    boxes = np.array([list(box) for box in boxes_xywh], dtype=np.float32).reshape(-1, 4)
    size = np.array([image.width, image.height] * 2, dtype=np.float32)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    corners = corners.clip(0, size)
    for box, (left, top, right, bottom) in zip(boxes_xywh, corners.tolist(), strict=True):
        if not (right > left and bottom > top):
            raise UserError(
                f"--box {','.join(f'{side:g}' for side in box)}: covers nothing of an image of "
                f"{image.width} x {image.height} pixels; it is x,y,w,h in pixels"
            )
    corners /= size
    middles = (corners[:, :2] + corners[:, 2:]) / 2
    return np.concatenate([middles, corners[:, 2:] - corners[:, :2]], axis=1)


def safe_name(name: str, path: str) -> str:
    """Return a name to which a suffix can be put, for a file or folder of an image's outputs.

    Another one stands for dots alone, which name a folder above, and for what is too long.
    """
    if name.strip(".") and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    return f"{name.strip('.')[:40]}.{short_hash(path, 8)}".strip(".")


def check_length(
    prompts: Sequence[str], tokens: Callable[[str], Sequence[int]], context_length: int
) -> str:
    """Return a note of the prompts that a model does not read to their end; empty if it does.

    Args:
        tokens: prompt → all of its tokens, without those of start and end.
        context_length: tokens that the model reads, with those of start and end.

    Raises:
        UserError: two prompts differ only in what is not read.
    """
    read = context_length - SPECIALS
    # A token stands for a byte or more, so that short prompts need no tokenizer.
    long = [p for p in prompts if len(p.encode()) > read and len(tokens(p)) > read]
    same: dict[tuple[int, ...], list[str]] = {}
    for prompt in dict.fromkeys(prompts) if long else ():
        same.setdefault(tuple(tokens(prompt)[:read]), []).append(prompt)
    problems = [
        f"'{group[0]}' and '{group[1]}': are one prompt to this model, which reads "
        f"{read} tokens of each; shorten them"
        for group in same.values()
        if len(group) > 1
    ]
    if problems:
        raise UserError(problems)
    if not long:
        return ""
    return "\n".join(
        f"'{prompt}': has {len(tokens(prompt))} tokens, of which this model reads the "
        f"first {read}; shorten it"
        for prompt in long
    )


def output_names(names: Sequence[str]) -> list[str]:
    """Return the path of each image's files, without an ending: its own relative path's.

    Where two images differ in nothing but their ending, each keeps it. Where two are the same even
    so, a hash follows, because a number would change when images are added.

    Args:
        names: relative paths of the images, as `relative_names` returns them.
    """
    stems = [_without_ending(name) for name in names]
    shared = Counter(stems)
    chosen = [stem if shared[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]
    chosen = [
        "/".join(safe_name(part, name) for part in output.split("/"))
        for output, name in zip(chosen, names, strict=True)
    ]
    counts = Counter(chosen)
    return [
        output if counts[output] == 1 else f"{output}.{short_hash(name, 8)}"
        for output, name in zip(chosen, names, strict=True)
    ]


def _without_ending(name: str) -> str:
    """Return a path without the ending of its name; `..png` keeps it, for it is no name without."""
    path = Path(name)
    return name if path.stem.strip(".") == "" else path.with_name(path.stem).as_posix()
