"""Identities over frames, by drawn films whose identities are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from app.datasets.synthetic.films import KINDS, Film, draw_film
from app.deploy.runtime.tracks import Tracker, TrackSettings, assign, iou

Seen = list[tuple[int, list[float]]]


def boxes(film: Film, frame: int, fps: float = 20.0) -> Seen:
    """The exact boxes of what is seen in a frame, each with its thing."""
    found: Seen = []
    for thing, mask in enumerate(film.frame(frame / fps)[1]):
        if mask.sum() >= 16:
            rows, columns = np.nonzero(mask)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.append((thing, [float(side) for side in corners]))
    return found


def follow(tracker: Tracker, seen: Seen, labels: list[int], score: float = 0.9) -> list[int]:
    corners = np.array([box for _, box in seen]).reshape(-1, 4)
    return tracker.update(corners, np.full(len(seen), score), labels).tolist()


@settings(deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(0, 7), st.integers(0, 7)), elements=st.floats(0, 1))
)
def test_pairs_have_the_greatest_sum(gains: np.ndarray) -> None:
    rows, columns = linear_sum_assignment(-gains)
    pairs = assign(gains, 0.0)
    assert sum(gains[pair] for pair in pairs) == pytest.approx(gains[rows, columns].sum())
    for axis in (0, 1):
        chosen = [pair[axis] for pair in pairs]
        assert len(set(chosen)) == len(chosen)
    assert all(gains[pair] >= 0.5 for pair in assign(gains, 0.5))


def test_overlaps_are_those_of_pycocotools() -> None:
    from pycocotools import mask as coco_mask

    random = np.random.default_rng(0)
    corners = random.uniform(0, 50, (12, 4))
    corners[:, 2:] += corners[:, :2]
    plain = corners.copy()
    plain[:, 2:] -= plain[:, :2]
    expected = coco_mask.iou(plain[:5].tolist(), plain[5:].tolist(), [0] * 7)
    assert iou(corners[:5], corners[5:]) == pytest.approx(np.array(expected))


def test_identities_last_in_films() -> None:
    """A thing that is seen all the time keeps its id, whatever crosses it."""
    switches = frames = 0
    for seed in range(10):
        film, tracker = draw_film((0, seed)), Tracker()
        last: dict[int, tuple[int, int]] = {}
        for frame in range(100):
            seen = boxes(film, frame)
            labels = [KINDS.index(film.things[thing].kind) for thing, _ in seen]
            for (thing, _), id in zip(seen, follow(tracker, seen, labels), strict=True):
                before = last.get(thing)
                switches += before is not None and before[1] == frame - 1 and before[0] != id
                last[thing] = (id, frame)
                frames += 1
    assert frames > 2000
    assert switches <= 0.005 * frames


def test_what_is_hidden_for_a_while_comes_back_as_itself() -> None:
    tracker = Tracker(TrackSettings(patience=10))
    ids = []
    for frame in range(40):
        x = 10.0 + 3 * frame
        seen: Seen = [] if 15 <= frame < 22 else [(0, [x, 20, x + 30, 50])]
        ids += follow(tracker, seen, [0] * len(seen))
    assert set(ids) == {1}
    for _ in range(11):
        follow(tracker, [], [])
    assert follow(tracker, [(0, [130, 20, 160, 50])], [0]) == [2]


def test_an_unsure_detection_goes_on_and_begins_nothing() -> None:
    tracker = Tracker()
    box = [10.0, 10.0, 40.0, 40.0]
    assert follow(tracker, [(0, box)], [0], 0.3) == [-1]
    assert follow(tracker, [(0, box)], [0], 0.9) == [1]
    assert follow(tracker, [(0, box)], [0], 0.2) == [1]
    assert follow(tracker, [(0, box)], [0], 0.05) == [-1]


def test_classes_vote_and_keep_apart() -> None:
    """Two names of one thing are two tracks; a name that is wrong once changes nothing."""
    tracker = Tracker()
    box = [10.0, 10.0, 40.0, 40.0]
    for frame in range(8):
        labels = [0, 1]
        assert follow(tracker, [(0, box), (0, box)], labels) == [1, 2], frame
    assert follow(tracker, [(0, box)], [0], 0.9) == [1]
    alone = Tracker()
    for label in (0, 0, 1, 0, 0):
        assert follow(alone, [(0, box)], [label]) == [1]
    (track,) = alone.finished()
    assert track.label == 0
    assert track.frames == [0, 1, 2, 3, 4]
    assert track.votes == {0: pytest.approx(3.6), 1: pytest.approx(0.9)}


def test_short_tracks_are_left_out() -> None:
    tracker = Tracker()
    for frame in range(5):
        seen: Seen = [(0, [10, 10, 40, 40])]
        if frame == 2:
            seen.append((1, [100, 100, 130, 130]))
        follow(tracker, seen, [0] * len(seen))
    assert [track.id for track in tracker.finished()] == [1]
    assert len(tracker.tracks) == 2
