"""Images, prompts and boxes, as the user names them: read and checked."""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.datasets.images import EXTENSIONS
from app.errors import UserError
from app.files import MAX_JSON_BYTES, read_text, short_hash
from app.model.vocabulary import VISUAL_PROMPT

LIST = ".txt"
SHOWN = 20  # missing files of a list
LONGEST_NAME = 200  # bytes; a file system takes 255, with a suffix and what marks it as unfinished
BOX_IN_TILE = "--tile and --box: a box lies in one tile, not in all; give one of them"
Box = tuple[float, float, float, float]  # x, y, w, h in pixels


def find_images(source: str) -> list[Path]:
    """Return the images of a file, a folder, a glob or a list, in the order of their names.

    A list is a `.txt` with a path a line, relative to the current folder or to that of the list;
    the images come in its order.

    Raises:
        UserError: an address, no images, or a list that names what is not there.
    """
    path = Path(source)
    if path.is_file():
        return _listed(path) if path.suffix.lower() == LIST else [path]
    if path.is_dir():
        images = [p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS]
    else:
        if "://" in source:
            raise UserError(
                f"--input {source}: addresses are not fetched; download the image first"
            )
        matches = (Path(name) for name in _matches(source))
        images = [p for p in matches if p.suffix.lower() in EXTENSIONS]
    if not images:
        what = "no images in this folder" if path.is_dir() else "no such file, folder or glob"
        raise UserError(f"--input {source}: {what} (images end in {', '.join(EXTENSIONS)})")
    return sorted(set(images))


def _matches(pattern: str) -> Iterator[str]:
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
        yield from _matches("/".join([glob.escape(folder), *tail]))


def _listed(file: Path) -> list[Path]:
    """Return the images of a list, each once; raise UserError that names those that are absent."""
    names = [line.strip() for line in _read_text(f"--input {file}", file).splitlines()]
    places = {name: (Path(name), file.parent / name) for name in names if name}
    files = {name: next((p for p in paths if p.is_file()), None) for name, paths in places.items()}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        problems = [f"--input {file}: {name}: no such file" for name in missing[:SHOWN]]
        if len(missing) > SHOWN:
            problems.append(f"and {len(missing) - SHOWN} more that are not there")
        raise UserError(problems)
    if not files:
        raise UserError(f"--input {file}: an empty list; give the path of an image a line")
    return list(dict.fromkeys(path for path in files.values() if path is not None))


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


def normalised_boxes(
    boxes_xywh: Sequence[Sequence[float]], image: Image.Image
) -> NDArray[np.float32]:
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


def safe_name(name: str, path: Path) -> str:
    """Return a name to which a suffix can be put, for a file or folder of an image's outputs.

    Another one stands for dots alone, which name a folder above, and for what is too long.
    """
    if name.strip(".") and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    return f"{name.strip('.')[:40]}.{short_hash(str(path), 8)}".strip(".")


def output_names(images: Sequence[Path]) -> list[str]:
    """Return a name for the files of each image: its stem, or its name where two share a stem.

    Where two share the name as well, a hash of the path follows, because a number would change
    when images are added.
    """
    stems = Counter(path.stem for path in images)
    names = [safe_name(path.stem if stems[path.stem] == 1 else path.name, path) for path in images]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name}.{short_hash(str(path), 8)}"
        for name, path in zip(names, images, strict=True)
    ]
