"""Folds: every image once, groups whole, each with something to score."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.datasets.splitting import folds

IMAGES = st.lists(
    st.tuples(st.sets(st.integers(0, 2), max_size=2), st.integers(0, 9)), min_size=1, max_size=30
)


@given(images=IMAGES, number=st.one_of(st.none(), st.integers(2, 6)), seed=st.integers(0, 3))
def test_groups_are_whole_and_every_fold_has_objects(images, number, seed) -> None:
    labels = [frozenset(classes) for classes, _ in images]
    groups = [group for _, group in images]
    found = folds(labels, groups, number, seed)
    assert len(found) == len(images)
    assert all(
        len({f for f, g in zip(found, groups, strict=True) if g == group}) == 1
        for group in set(groups)
    )
    labelled = {g for g, classes in zip(groups, labels, strict=True) if classes}
    count = min(number or len(labelled), len(labelled))
    assert set(found) == set(range(max(count, 1)))
    if count > 1:
        shown = {f for f, classes in zip(found, labels, strict=True) if classes}
        assert shown == set(range(count))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_sizes_and_classes_are_balanced(number: int) -> None:
    labels = [frozenset({index % 3}) for index in range(30)]
    found = folds(labels, range(30), number, 0)
    sizes = Counter(found).values()
    assert max(sizes) - min(sizes) <= 1
    pairs = Counter(zip(found, labels, strict=True)).values()
    assert max(pairs) - min(pairs) <= 2


def test_leave_one_out_spreads_the_background() -> None:
    labels = [frozenset({0})] * 4 + [frozenset()] * 4
    assert sorted(Counter(folds(labels, range(8), None, 0)).items()) == [
        (0, 2), (1, 2), (2, 2), (3, 2)
    ]  # fmt: skip


def test_a_seed_decides() -> None:
    labels = [frozenset({0})] * 20
    assert folds(labels, range(20), 4, 1) == folds(labels, range(20), 4, 1)
    assert folds(labels, range(20), 4, 1) != folds(labels, range(20), 4, 2)
