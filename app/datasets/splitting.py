"""Split images into train, valid and test: classes balanced, near-duplicates together, seeded."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

Labels = frozenset[Hashable]


def stratify(
    labels: Sequence[Labels], groups: Sequence[int], sizes: Mapping[str, int], seed: int
) -> list[str]:
    """Return the split of each image, so that each class is shared out as the images are.

    Iterative stratification (Sechidis et al., "On the Stratification of Multi-Label Data", 2011):
    the rarest class first, each image to the split that lacks most of it. The sizes are kept but
    for groups that fit nowhere.

    Args:
        labels: the classes of each image; none is a class as well.
        groups: a number for each image; those of one number stay together.
        sizes: images of each split; they sum to all.
        seed: of what is left to chance.
    """
    units = _units(groups, seed)
    counts = [Counter(label for i in unit for label in labels[i] or {None}) for unit in units]
    left = Counter(label for count in counts for label in count)
    wanted = _wanted(counts, sizes)
    room = dict(sizes)
    chosen: dict[int, str] = {}
    waiting = {label: [n for n, count in enumerate(counts) if label in count] for label in wanted}
    while waiting:
        rarest = min(waiting, key=lambda label: (left[label], str(label)))
        for number in waiting.pop(rarest):
            if number in chosen:
                continue
            size = len(units[number])
            fitting = [s for s in room if room[s] >= size] or [max(room, key=lambda s: room[s])]
            best = max(fitting, key=lambda s: (wanted[rarest][s], room[s]))
            chosen[number] = best
            room[best] -= size
            for label, times in counts[number].items():
                wanted[label][best] -= times
                left[label] -= 1
    by_image = {i: chosen[number] for number, unit in enumerate(units) for i in unit}
    return [by_image[index] for index in range(len(labels))]


def folds(
    labels: Sequence[Labels], groups: Sequence[int], number: int | None, seed: int
) -> list[int]:
    """Return the fold of each image, from 0: classes balanced as by `stratify`, groups whole.

    Each fold has an image with labels, so that there may be fewer folds than asked for; one alone
    means that the images cannot be parted.

    Args:
        labels: the classes of each image; none is background.
        groups: a number for each image; those of one number stay together.
        number: of folds; None: one for each group that has labels (leave one out).
        seed: of what is left to chance.
    """
    labelled = {groups[index] for index, classes in enumerate(labels) if classes}
    count = min(number or len(labelled), len(labelled))
    if count < 2:
        return [0] * len(labels)
    shown = [index for index, group in enumerate(groups) if group in labelled]
    sizes = {str(k): len(shown) // count + (k < len(shown) % count) for k in range(count)}
    parts = stratify([labels[i] for i in shown], [groups[i] for i in shown], sizes, seed)
    fold_of = {groups[i]: int(part) for i, part in zip(shown, parts, strict=True)}
    members = Counter(groups)
    for empty in set(range(count)) - set(fold_of.values()):  # its room was taken by large groups
        rich = Counter(fold_of.values()).most_common(1)[0][0]
        moved = min((g for g in fold_of if fold_of[g] == rich), key=lambda g: (members[g], g))
        fold_of[moved] = empty
    for group in sorted(set(groups) - labelled):  # background, to the smallest
        filled = Counter(dict.fromkeys(range(count), 0))
        for each, fold in fold_of.items():
            filled[fold] += members[each]
        fold_of[group] = min(filled, key=lambda k: (filled[k], k))
    return [fold_of[group] for group in groups]


def names_alike(paths: Sequence[Path], pattern: str) -> tuple[list[tuple[int, int]], list[Path]]:
    """Return pairs of images whose names match a pattern alike, and the paths that do not match.

    Names are those below the folder that all images share. Alike: what the pattern's groups hold,
    or, where it has none, what it matches.
    """
    shared = os.path.commonpath([path.parent for path in paths])
    found = [re.search(pattern, path.relative_to(shared).as_posix()) for path in paths]
    others = [path for path, match in zip(paths, found, strict=True) if match is None]
    return pairs_alike([match and (match.groups() or (match[0],)) for match in found]), others


def pairs_alike(keys: Sequence[Hashable | None]) -> list[tuple[int, int]]:
    """Return pairs of places that have the same key, each with the first; None is like no other."""
    first: dict[Hashable, int] = {}
    said = [(key, index) for index, key in enumerate(keys) if key is not None]
    pairs = [(first.setdefault(key, index), index) for key, index in said]
    return [(one, other) for one, other in pairs if one != other]


def _units(groups: Sequence[int], seed: int) -> list[list[int]]:
    """Return the images that stay together, the largest groups first; else by chance."""
    members: dict[int, list[int]] = {}
    for index, number in enumerate(groups):
        members.setdefault(number, []).append(index)
    units = list(members.values())
    random.Random(seed).shuffle(units)
    return sorted(units, key=len, reverse=True)


def _wanted(
    counts: Sequence[Counter[Hashable]], sizes: Mapping[str, int]
) -> dict[Hashable, dict[str, float]]:
    """Return how many images of each class each split should have."""
    totals = Counter[Hashable]()
    for count in counts:
        totals.update(count)
    images = sum(sizes.values())
    return {
        label: {split: total * size / images for split, size in sizes.items()}
        for label, total in totals.items()
    }
