"""Drift: whether what a server finds is distributed as it was on the validation images."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from app.inference.detections import Detections
from app.inference.finder import Finder, Query
from app.model.score_counts import BINS, bins_of

WINDOW = 1000  # newest detections, and newest images, of a class that are compared
LEAST = 100  # of them; the index of fewer is mostly chance
LEAST_IN_GROUP = 10  # validation detections, likewise
MOST_GROUPS = 10  # of neighbouring bins
MOST_CLASSES = 50  # that are watched: each has some fifty series


@dataclass
class Class:
    """Hold what was found of one class.

    Attributes:
        counts: BINS numbers of all detections so far, by score.
        newest: bins of the newest detections.
        shown: of the newest images, whether the class was found there.
    """

    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    shown: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))


class Drift:
    """Watches the classes of one finder, those with the most validation detections first.

    Only questions count that validation asked too: a class by its words alone, with a threshold
    that is not above the finder's. Of the answers, the scores above the finder's threshold count.
    """

    def __init__(self, finder: Finder) -> None:
        self.validation = finder.scores
        self.classes = frozenset(finder.prompts)
        self._threshold = finder.threshold
        known = {} if finder.scores is None else finder.scores.counts
        names = sorted(finder.prompts, key=lambda name: -sum(known.get(name, ())))
        self._classes = {name: Class() for name in names[:MOST_CLASSES]}
        self._lock = threading.Lock()  # engines add, requests for figures read

    def add(self, queries: Sequence[Query], found: Detections) -> None:
        """Count what the queries, one after the other, were answered about one image."""
        above = found.scores > self._threshold
        with self._lock:
            for index, (query, prompt) in enumerate(each_prompt(queries)):
                has_boxes = query.boxes_xywh or query.negative_boxes_xywh
                one = self._classes.get(prompt)
                if one is None or has_boxes or query.threshold > self._threshold:
                    continue
                bins = bins_of(found.scores[above & (found.prompt_ids == index)]).tolist()
                one.newest.extend(bins)
                one.shown.append(bool(bins))
                for each in bins:
                    one.counts[each] += 1

    def counts(self) -> dict[str, list[int]]:
        """Return class → numbers of all detections so far, by score."""
        with self._lock:
            return {name: list(one.counts) for name, one in self._classes.items()}

    def indices(self) -> dict[str, float]:
        """Return class → population stability index of its newest detections, where it has one."""
        if self.validation is None:
            return {}
        with self._lock:
            newest = {name: list(one.newest) for name, one in self._classes.items()}
        found = {}
        for name, bins in newest.items():
            expected = self.validation.counts.get(name, [])
            index = stability_index(expected, [bins.count(each) for each in range(BINS)])
            if index is not None:
                found[name] = index
        return found

    def shares(self) -> dict[str, float]:
        """Return class → share of the newest images that show it."""
        with self._lock:
            return {
                name: sum(one.shown) / len(one.shown)
                for name, one in self._classes.items()
                if len(one.shown) >= LEAST
            }

    def validation_shares(self) -> dict[str, float]:
        """Return class → share of the validation images that show it, as the model says."""
        if self.validation is None or not self.validation.images:
            return {}
        shown, images = self.validation.found, self.validation.images
        return {name: shown.get(name, 0) / images for name in self._classes}


def each_prompt(queries: Sequence[Query]) -> Iterator[tuple[Query, str]]:
    """Yield each prompt with its query, as joined detections number the prompts."""
    for query in queries:
        for prompt in query.prompts:
            yield query, prompt


def stability_index(expected: Sequence[int], actual: Sequence[int]) -> float | None:
    """Return the population stability index of two histograms: Σ (a - e) ln(a / e) of shares.

    0.1 is a slight change, 0.25 a large one. Bins are joined with their neighbours until each
    group has a tenth of the expected numbers, and LEAST_IN_GROUP: of two samples of one
    distribution, the index is some groups / numbers, so that small groups would look like drift.
    Half of one is added to each number, because an empty group has no logarithm.

    Returns:
        None where `actual` has fewer than LEAST, or `expected` too few for two groups.
    """
    least = max(LEAST_IN_GROUP, sum(expected) / MOST_GROUPS)
    groups: list[tuple[int, int]] = []
    e = a = 0
    for one, other in zip(expected, actual, strict=False):
        e, a = e + one, a + other
        if e >= least:
            groups.append((e, a))
            e = a = 0
    if len(groups) < 2 or sum(actual) < LEAST:
        return None
    groups[-1] = groups[-1][0] + e, groups[-1][1] + a
    totals = [sum(column) + len(groups) / 2 for column in zip(*groups, strict=True)]
    shares = [((e + 0.5) / totals[0], (a + 0.5) / totals[1]) for e, a in groups]
    return sum((a - e) * math.log(a / e) for e, a in shares)
