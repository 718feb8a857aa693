"""Images that show the same: kept on one side when a dataset is split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.datasets.images import open_small
from app.datasets.levels import Levels
from app.errors import UserError
from app.files import hash_file

MAX_BITS = 4  # of 64 that may differ between near-duplicates
MAX_LEVELS = 6.0  # of 256, on average, between their colours; flat images have no other difference
GRID = 8  # cells across and down
BANDS = 5  # one more than MAX_BITS: hashes that differ in so few bits share one band whole
BAND_BITS = 13
BATCH = 256  # images in flight; bounds the memory
ROBOFLOW = ".rf."  # between an image's name and the number of one augmented version of it

S = TypeVar("S")
T = TypeVar("T")
Look = tuple[int, NDArray[np.int16]]  # 64-bit dHash; (GRID, GRID, 3) mean colours, 0..255


def group(
    files: Sequence[tuple[Path, Levels | None]],
    on_image: Callable[[int], None] = lambda _: None,
    pairs: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """Return a number for each image, shared by those that show the same.

    That is: near-duplicates by a difference hash (N. Krawetz, "Kind of Like That", 2013) and by
    their colours, and versions of one image that Roboflow made.

    Args:
        files: of the images, with the range of the values of those of more than 8 bits.
        on_image: is told how many are done.
        pairs: places of images that belong together whatever they show.
    """
    looks = list(in_threads(_look, files, on_image))
    leader = list(range(len(files)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = index = leader[leader[index]]
        return index

    for one, other in (*pairs, *_same_source([path for path, _ in files]), *_alike(looks)):
        leader[find(other)] = find(one)
    return [find(index) for index in range(len(files))]


def same_files(paths: Collection[Path], others: Collection[Path]) -> list[Path]:
    """Return those of `paths` that hold the bytes of one of `others`, or are one of them.

    Files are read where two have the same size alone, so that large sets cost their sizes.
    """
    by_size: dict[int, list[Path]] = {}
    for path in others:
        by_size.setdefault(path.stat().st_size, []).append(path)
    hashes: dict[int, set[str]] = {}
    same = []
    for path in paths:
        size = path.stat().st_size
        if size in by_size:
            if size not in hashes:
                hashes[size] = set(map(hash_file, by_size[size]))
            if hash_file(path) in hashes[size]:
                same.append(path)
    return same


def in_threads(
    work: Callable[[S], T], items: Sequence[S], on_image: Callable[[int], None]
) -> Iterator[T]:
    """Return `work` of each item, in order, by a thread a core.

    Threads help because Pillow decodes without holding Python's lock.
    """
    waiting, done = iter(items), 0
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(waiting, BATCH)):
            for result in pool.map(work, batch):
                done += 1
                on_image(done)
                yield result


def _look(file: tuple[Path, Levels | None]) -> Look | None:
    """Return what tells images alike; None for one that cannot be decoded, which stays alone."""
    try:
        image = open_small(file[0], 9 * GRID, file[1])
    except UserError:
        return None
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1])
    colors = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(bits.tobytes()), colors


def _same_source(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    first: dict[str, int] = {}
    for index, path in enumerate(paths):
        source, marked, _ = path.name.partition(ROBOFLOW)
        if marked:
            yield first.setdefault(source, index), index


def _alike(looks: Sequence[Look | None]) -> Iterator[tuple[int, int]]:
    first: dict[tuple[int, bytes], int] = {}  # of equal looks one stands for all
    for index, look in enumerate(looks):
        if look is not None:
            one = first.setdefault((look[0], look[1].tobytes()), index)
            if one != index:
                yield one, index
    known = [(index, look) for index in first.values() if (look := looks[index]) is not None]
    hashes = np.array([hash for _, (hash, _) in known], dtype=np.uint64)
    colors = np.array([colors for _, (_, colors) in known])  # (images, GRID, GRID, 3)
    for band in range(BANDS):
        keys = hashes >> np.uint64(band * BAND_BITS) & np.uint64(2**BAND_BITS - 1)
        order = np.argsort(keys, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place in range(1, len(bucket)):
                here, before = bucket[place], bucket[:place]
                near = before[np.bitwise_count(hashes[before] ^ hashes[here]) <= MAX_BITS]
                levels = np.abs(colors[near] - colors[here]).mean(axis=(1, 2, 3))
                for other in near[levels <= MAX_LEVELS]:
                    yield known[other][0], known[here][0]
