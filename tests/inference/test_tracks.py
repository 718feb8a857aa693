"""Identities over frames, by drawn films whose identities are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from app.datasets.rle import decode
from app.datasets.synthetic.films import KINDS, Film, draw_film
from app.inference.detections import Detections
from app.inference.tracks import Tracker, TrackSettings, assign, iou, moved

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


def found(seen: Seen, labels: Sequence[int], score: float = 0.9) -> Detections:
    corners = np.array([box for _, box in seen], dtype=np.float32).reshape(-1, 4)
    scores = np.full(len(seen), score, dtype=np.float32)
    ids = np.array(labels, dtype=np.int64)
    return Detections(corners, scores, ids, tuple(KINDS), None, 320, 240)


def ids(tracker: Tracker[int], frames: Sequence[Detections]) -> list[list[int]]:
    """The ids in each frame, 0 of what belongs to no track, in the order of the detections."""
    told = [each for n, frame in enumerate(frames) for each in tracker.update(n, frame)]
    told += tracker.finish()
    assert [frame for frame, _ in told] == list(range(len(frames)))
    return [
        [
            next((s.track for s in sightings if np.allclose(s.box_xyxy, box)), 0)
            for box in frame.boxes_xyxy
        ]
        for frame, (_, sightings) in zip(frames, told, strict=True)
    ]


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
        film = draw_film((0, seed))
        shown = [boxes(film, frame) for frame in range(100)]
        labels = [[KINDS.index(film.things[thing].kind) for thing, _ in seen] for seen in shown]
        given = [found(*each) for each in zip(shown, labels, strict=True)]
        last: dict[int, tuple[int, int]] = {}
        for frame, numbers in enumerate(ids(Tracker(), given)):
            for (thing, _), id in zip(shown[frame], numbers, strict=True):
                before = last.get(thing)
                switches += before is not None and before[1] == frame - 1 and before[0] != id
                last[thing] = (id, frame)
                frames += 1
    assert frames > 2000
    assert switches <= 0.005 * frames


def moving(frames: Iterable[int], start: float = 10.0, score: float = 0.9) -> list[Detections]:
    """A thing that goes three pixels a frame; nothing where a number is below zero."""
    return [
        found([(0, [start + 3 * n, 20, start + 30 + 3 * n, 50])] if n >= 0 else [], [0][: n >= 0])
        for n in frames
    ]


def test_what_is_hidden_for_a_while_comes_back_as_itself() -> None:
    """For up to `patience` frames where it is expected; then it is another one."""
    tracker: Tracker[int] = Tracker(TrackSettings(patience=10))
    hidden = [*range(15), *[-1] * 7, *range(22, 40), *[-1] * 11, *range(51, 60)]
    numbers = [each for frame in ids(tracker, moving(hidden)) for each in frame]
    assert numbers == [1] * 33 + [2] * 9
    assert tracker.labels == {1: 0, 2: 0}


def test_what_is_lost_for_longer_is_known_by_its_color() -> None:
    """In its class, near the place where it was lost, and only where no other one may be meant."""
    frames = [*range(15), *[-1] * 40, *range(15, 25)]
    red, blue = np.array([[0.9, 0.1, 0.1]]), np.array([[0.1, 0.1, 0.9]])

    def last(color: np.ndarray, later: Sequence[Detections]) -> int:
        tracker: Tracker[int] = Tracker(TrackSettings(patience=10))
        told = []
        for n, frame in enumerate([*moving(frames[:-10]), *later]):
            shade = color if n >= 55 else red
            told += tracker.update(n, frame, shade[: len(frame)])
        return [s.track for _, each in [*told, *tracker.finish()] for s in each][-1]

    near, far = moving(frames[-10:]), moving(frames[-10:], start=200)
    assert last(red, near) == 1
    assert last(blue, near) == 2
    assert last(red, far) == 2
    two = [found([(0, [10, 20, 40, 50]), (0, [80, 20, 110, 50])], [0, 0]) for _ in range(15)]
    tracker: Tracker[int] = Tracker(TrackSettings(patience=10, reach=9))
    middle = [found([(0, [45, 20, 75, 50])], [0]) for _ in range(10)]
    told = []
    for n, frame in enumerate([*two, *moving([-1] * 40), *middle]):
        told += tracker.update(n, frame, red.repeat(len(frame), axis=0))
    assert [s.track for _, each in [*told, *tracker.finish()] for s in each][-1] == 3


def test_masks_tell_apart_what_boxes_do_not() -> None:
    """Two corners that fill one box, upper left and lower right, swap their scores' order."""
    shape = np.zeros((2, 60, 60), bool)
    shape[0, 10:50, 10:20] = shape[0, 10:20, 10:50] = True
    shape[1, 10:50, 40:50] = shape[1, 40:50, 10:50] = True
    masks = [coco_mask.encode(np.asfortranarray(each.astype(np.uint8))) for each in shape]
    rles = [{"size": [60, 60], "counts": mask["counts"].decode()} for mask in masks]
    frame = found([(0, [10, 10, 50, 50])] * 2, [0, 0])
    tracker: Tracker[int] = Tracker()
    told = []
    for n in range(20):
        order = [0, 1] if n % 3 else [1, 0]
        both = [rles[i] for i in order]
        told += tracker.update(n, replace(frame, masks=both, width=60, height=60))
    told += tracker.finish()
    first = told[0][1]
    of = {each.mask["counts"]: each.track for each in first if each.mask}
    assert all(of[s.mask["counts"]] == s.track for _, each in told for s in each if s.mask)


def test_an_unsure_detection_goes_on_and_begins_nothing() -> None:
    box: Seen = [(0, [10.0, 10.0, 40.0, 40.0])]
    scores = [0.2, 0.9, 0.9, 0.9, 0.2, 0.05]
    assert ids(Tracker(), [found(box, [0], score) for score in scores]) == [
        *([0], [1], [1], [1], [1], [0])
    ]
    assert ids(Tracker(), [found(box, [0], 0.4)] * 12) == [[0]] * 12  # never above `sure`
    hopeful = [found(box, [0], score) for score in (0.4, 0.4, 0.6, 0.4)]
    assert ids(Tracker(), hopeful) == [[1]] * 4


def test_classes_vote_and_keep_apart() -> None:
    """Two names of one thing are two tracks; a name that is wrong once changes nothing."""
    box = [10.0, 10.0, 40.0, 40.0]
    beside = [10.5, 10.0, 40.0, 40.0]
    both = [found([(0, box), (0, beside)], [0, 1]) for _ in range(8)]
    assert ids(Tracker(), both) == [[1, 2]] * 8
    alone: Tracker[int] = Tracker()
    frames = [found([(0, box)], [label]) for label in (0, 0, 1, 0, 0)]
    assert ids(alone, frames) == [[1]] * 5
    assert alone.labels == {1: 0}


def test_short_tracks_are_left_out() -> None:
    """Seen less than three times in its first ten frames, it is none."""
    frames = []
    for n in range(30):
        seen: Seen = [(0, [10, 10, 40, 40])]
        if n in (2, 8, 13):
            seen.append((1, [100, 100, 130, 130]))
        frames.append(found(seen, [0] * len(seen)))
    tracker: Tracker[int] = Tracker()
    numbers = ids(tracker, frames)
    assert {each[0] for each in numbers} == {1}
    assert [each[1] for each in numbers if len(each) > 1] == [0, 0, 0]
    assert tracker.labels == {1: 0}


@given(arrays(bool, (7, 6)), st.integers(-8, 8), st.integers(-9, 9))
def test_a_moved_mask_loses_what_leaves_the_image(pixels: np.ndarray, x: int, y: int) -> None:
    counts = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
    shifted = np.zeros_like(pixels)
    for row, column in np.argwhere(pixels):
        if 0 <= row + y < 7 and 0 <= column + x < 6:
            shifted[row + y, column + x] = True
    result = moved({"size": [7, 6], "counts": counts}, x, y, (7, 6))
    assert np.array_equal(decode(result), shifted)
