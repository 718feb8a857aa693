"""Malformed COCO, polygons and RLE."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.datasets.conftest import sound_document

NAN, INF = float("nan"), float("inf")
ODD_NUMBERS = [None, True, 0, -1, 1, 3, 7, 2**31, 2**32, 2**63, 10**400, 0.5, 1e9, -1e9, 1e308]
ODD_TEXTS = ["", "..", "/etc/passwd", "a.png", "b\0", "\ud800", "05L5", "0" * 300, "images", "."]
odd = st.recursive(
    st.sampled_from([*ODD_NUMBERS, NAN, INF, -INF, *ODD_TEXTS])
    | st.floats()
    | st.integers(-50, 1300),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.lists(st.lists(st.floats(-90, 90), min_size=4, max_size=9), max_size=3)
        | st.dictionaries(st.sampled_from(["size", "counts", "id", "name"]), inner, max_size=3)
        | st.fixed_dictionaries({"size": st.builds(lambda: [30, 40]), "counts": inner})
    ),
    max_leaves=8,
)


@st.composite
def spoiled_documents(draw: st.DrawFn, make: Callable[[], Any] = sound_document) -> Any:
    """A sound document with up to three values replaced or removed, at any depth."""
    holder = {"document": copy.deepcopy(make())}
    for _ in range(draw(st.integers(1, 3))):
        target: Any = holder
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            key = draw(st.sampled_from(keys))
            child = target[key]
            if not isinstance(child, dict | list) or not child or draw(st.integers(0, 4)) == 0:
                break
            target = child
        if target is not holder and draw(st.integers(0, 3)) == 0:
            del target[key]
        else:
            target[key] = draw(odd)
    return holder["document"]


def points(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=6, max_size=24).map(lambda p: p[: len(p) & ~1])


polygons = st.one_of(
    st.lists(points(-30, 60), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from([*ODD_NUMBERS, NAN, INF, -INF, 3.5, 12, 25]), max_size=9)),
)


def runs_of(cuts: list[int]) -> list[int]:
    """Run lengths that fill the 1,200 pixels of a 40 x 30 mask."""
    return np.diff([0, *sorted(cuts), 1200]).tolist()


full_runs = st.lists(st.integers(0, 1200), max_size=12).map(runs_of)
counts = st.one_of(
    full_runs,
    st.lists(st.integers(-5, 1300) | st.sampled_from([2**31, 2**32, 2**63, 10**30]), max_size=8),
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12),
    st.text(max_size=6),
    odd,
)
