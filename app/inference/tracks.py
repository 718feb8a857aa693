"""Identities over frames: the detections of one frame after the other become tracks.

ByteTrack (Zhang et al., ECCV 2022, arXiv 2110.06864): sure detections are matched to where a
Kalman filter expects the tracks, then unsure ones to the tracks that are left, since what is hidden
in part scores low. Masks count beside boxes. What was lost for longer, where no speed tells its
place any more, is known again by its class, color and place. It needs NumPy alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.datasets import rle
from app.datasets.rle import Rle
from app.inference.detections import Detections
from app.inference.masks import place

Item = TypeVar("Item")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
PLACE, SPEED = 1 / 20, 1 / 160  # standard deviations, as shares of a box's height (DeepSORT)
FRESH = 0.2  # share of the newest color in that of a track
NEW = 0.7 / 0.5  # SAM 3's own tracker: score of a new object, beside that of one that goes on


@dataclass(frozen=True)
class TrackSettings:
    """Hold when detections belong together.

    Attributes:
        sure: score that a track must reach in its first `trial` frames.
        likely: score from which a detection is matched first, and may begin a track.
        unsure: score from which one is matched at all.
        overlap, unsure_overlap: least IoU with where a track is expected, of boxes and masks.
        other_class, other_color: what the IoU with a track of another class or color counts.
        patience: frames that a track is looked for where it is expected, after it was last seen.
        memory: frames that it is known again after it was last seen.
        color: most that colors of one thing, 0..1, differ in any channel.
        reach: most that it may then have moved, in sizes of its box.
        least: frames that a track must be seen in, out of its first `trial`; else it is dropped.
        fill: whether a track's gaps are filled, by its places before and after.
    """

    sure: float = 0.5
    likely: float = 0.3
    unsure: float = 0.1
    overlap: float = 0.1
    unsure_overlap: float = 0.4
    other_class: float = 0.6
    other_color: float = 0.5
    patience: int = 30
    memory: int = 300
    color: float = 0.1
    reach: float = 2.0
    least: int = 3
    trial: int = 10
    fill: bool = False

    @property
    def delay(self) -> int:
        """Return after how many further frames a frame's tracks are known."""
        return max(self.trial, self.patience) if self.fill else self.trial


@dataclass(frozen=True)
class Sighting:
    """Hold where a track is in a frame.

    Attributes:
        track: id, from 1 in the order in which the tracks are first seen.
        label: the class that most of its detections so far speak for, an index of the prompts.
        box_xyxy: pixels.
        score: of the detection, 0..1; of a filled gap the lower one of both its ends.
        mask: RLE of the frame's size; None without a mask head.
        filled: whether it was not detected, but lies between two frames where it was.
    """

    track: int
    label: int
    box_xyxy: Box
    score: float
    mask: Rle | None = None
    filled: bool = False

    @property
    def box_xywh(self) -> list[float]:
        """Return the box in pixels, as COCO has it."""
        left, top, right, bottom = self.box_xyxy
        return [left, top, right - left, bottom - top]


class _Place(NamedTuple):
    """Hold a detection of a track: its frame, and what a sighting takes from it."""

    frame: int
    box: Box
    score: float
    mask: Rle | None


@dataclass(eq=False)
class _Track:
    """Hold what has been seen of one thing.

    Attributes:
        mean, spread: of the Kalman filter, (8,) and (8, 8): center, width, height, and their speeds
            a frame, in pixels.
        first, last: frames in which it was seen.
        count, best: of its detections, and of their scores.
        votes: of each class, the sum of its scores.
        bounds, center, size: of its last mask, and of its last box.
        start: center of its first box.
        color: (3,) RGB, 0..1; None where no colors are given.
        places: its detections in frames that are not told yet.
        told: the last one that was.
        id: 0 before it is told.
    """

    mean: Floats
    spread: Floats
    first: int
    last: int = -1
    count: int = 0
    best: float = 0.0
    votes: dict[int, float] = field(default_factory=dict)
    bounds: rle.Indices | None = None
    center: Floats = field(default_factory=lambda: np.zeros(2))
    size: float = 0.0
    start: Floats = field(default_factory=lambda: np.zeros(2))
    color: Floats | None = None
    places: deque[_Place] = field(default_factory=deque)
    told: _Place | None = None
    id: int = 0

    @property
    def label(self) -> int:
        return max(self.votes, key=lambda label: (self.votes[label], -label))

    @property
    def box(self) -> Floats:
        """Return where it is expected, (4,) xyxy in pixels."""
        x, y, width, height = self.mean[:4]
        half = np.maximum([width, height], 1e-3) / 2
        return np.array([x - half[0], y - half[1], x + half[0], y + half[1]])

    def expected_bounds(self, height: int) -> rle.Indices | None:
        """Return its last mask, moved to where it is expected.

        What leaves the image at the bottom comes in at the top, a column further: too little to
        matter for an overlap.
        """
        if self.bounds is None:
            return None
        x, y = np.rint(self.mean[:2] - self.center).astype(np.int64)
        return self.bounds + (x * height + y)


class Tracker(Generic[Item]):
    """Give detections the ids of tracks, a frame after the other.

    A frame is told some frames later, `TrackSettings.delay`, since only then it is known which of
    its detections belong to tracks. Memory does not grow with the number of frames.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self.settings = settings or TrackSettings()
        self.labels: dict[int, int] = {}  # of each track that was told: its class by now
        self._frame = -1
        self._live: list[_Track] = []
        self._lost: list[_Track] = []
        self._waiting: deque[tuple[Item, list[_Track | None], tuple[int, int]]] = deque()

    def update(
        self, item: Item, found: Detections, colors: Floats | None = None
    ) -> list[tuple[Item, list[Sighting]]]:
        """Take the next frame's detections; return the frame that is known by now, if one is.

        Args:
            item: what the caller calls the frame; it comes back with its sightings.
            found: of the frame, from a score of `unsure` on.
            colors: (N, 3) mean RGB of each, 0..1; None: nothing is known again by its color.
        """
        settings = self.settings
        self._frame += 1
        bounds = None if found.masks is None else [rle.to_bounds(mask) for mask in found.masks]
        owners = self._match(found, bounds, colors)
        self._waiting.append((item, owners, (found.height, found.width)))
        for number, track in enumerate(owners):
            if track is None:
                continue
            was_one = self._is_one(track)
            self._see(track, found, number)
            track.bounds = None if bounds is None else bounds[number]
            if colors is not None:
                before = colors[number] if track.color is None else track.color
                track.color = before + FRESH * (colors[number] - before)
            if not was_one and self._is_one(track) and (known := self._known_again(track)):
                self._join(known, track)
        lost = [track for track in self._live if not self._goes_on(track)]
        self._live = [track for track in self._live if track not in lost]
        self._lost += [track for track in lost if self._is_one(track)]
        self._lost = [t for t in self._lost if self._frame - t.last < settings.memory]
        return [self._tell()] if len(self._waiting) > settings.delay else []

    def finish(self) -> list[tuple[Item, list[Sighting]]]:
        """Return the frames that are left: there are no more."""
        return [self._tell() for _ in range(len(self._waiting))]

    def _match(
        self, found: Detections, bounds: Sequence[rle.Indices] | None, colors: Floats | None
    ) -> list[_Track | None]:
        """Return the track of each detection; begin one for those that are new."""
        settings = self.settings
        for track in self._live:
            _predict(track)
        owners: list[_Track | None] = [None] * len(found)
        scores = found.scores
        likely = np.flatnonzero(scores >= settings.likely)
        unsure = np.flatnonzero((scores >= settings.unsure) & (scores < settings.likely))
        left = list(self._live)
        for chosen, least in ((likely, settings.overlap), (unsure, settings.unsure_overlap)):
            if chosen is unsure:  # what was lost before is not found again by an unsure glimpse
                left = [track for track in left if track.last == self._frame - 1]
            for row, column in assign(self._overlaps(left, found, chosen, bounds, colors), least):
                owners[int(chosen[column])] = left[row]
            left = [track for track in left if not any(track is owner for owner in owners)]
        for number in likely:
            if owners[int(number)] is None:
                track = _begin(found.boxes_xyxy[number], self._frame)
                self._live.append(track)
                owners[int(number)] = track
        return owners

    def _overlaps(
        self,
        tracks: Sequence[_Track],
        found: Detections,
        chosen: Ints,
        bounds: Sequence[rle.Indices] | None,
        colors: Floats | None,
    ) -> Floats:
        """Return what tracks have in common with detections, less where class or color differ."""
        if not tracks or not len(chosen):
            return np.zeros((len(tracks), len(chosen)))
        common = iou(
            np.stack([track.box for track in tracks]), found.boxes_xyxy[chosen].astype(np.float64)
        )
        for row, track in enumerate(tracks):
            expected = track.expected_bounds(found.height)
            near = np.flatnonzero(common[row])
            if bounds is not None and expected is not None and len(near):
                masks = rle.iou(expected, [bounds[chosen[column]] for column in near])
                common[row, near] = (common[row, near] + masks) / 2
            if colors is not None and track.color is not None:
                apart = np.abs(colors[chosen] - track.color).max(axis=1)
                common[row, apart > self.settings.color] *= self.settings.other_color
        same = np.array([track.label for track in tracks])[:, None] == found.prompt_ids[chosen]
        return np.where(same, common, common * self.settings.other_class)

    def _see(self, track: _Track, found: Detections, number: int) -> None:
        """Let a track take in its detection of this frame."""
        box = found.boxes_xyxy[number].astype(np.float64)
        if track.count:
            _correct(track, box)
        track.last = self._frame
        track.count += 1
        label, score = int(found.prompt_ids[number]), float(found.scores[number])
        track.votes[label] = track.votes.get(label, 0.0) + score
        track.best = max(track.best, score)
        mask = None if found.masks is None else found.masks[number]
        track.center, track.size = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max())
        if track.count == 1:
            track.start = track.center
        left, top, right, bottom = box.tolist()
        track.places.append(_Place(self._frame, (left, top, right, bottom), score, mask))

    def _known_again(self, track: _Track) -> _Track | None:
        """Return the lost track that a new one goes on; None where none is, or several may be."""
        settings = self.settings
        alike: list[tuple[float, int, _Track]] = []
        for other in [*self._live, *self._lost]:
            if other.last >= track.first or not self._is_one(other):
                continue
            if track.color is None or other.color is None or other.label != track.label:
                continue
            apart = float(np.abs(other.color - track.color).max())
            moved_by = float(np.hypot(*(other.center - track.start)))
            if apart < settings.color and moved_by < settings.reach * max(other.size, track.size):
                alike.append((apart, len(alike), other))
        alike.sort()
        if not alike:
            return None
        if len(alike) > 1 and alike[1][0] < max(2 * alike[0][0], settings.color / 2):
            return None
        return alike[0][2]

    def _join(self, known: _Track, track: _Track) -> None:
        """Let a lost track go on as a new one began."""
        known.mean, known.spread, known.bounds = track.mean, track.spread, track.bounds
        known.center, known.size, known.color = track.center, track.size, track.color
        known.last = track.last
        known.count += track.count
        known.best = max(known.best, track.best)
        known.places += track.places
        for label, votes in track.votes.items():
            known.votes[label] = known.votes.get(label, 0.0) + votes
        for _, owners, _ in self._waiting:
            owners[:] = [known if owner is track else owner for owner in owners]
        self._lost = [other for other in self._lost if other is not known]
        self._live = [other for other in self._live if other is not known and other is not track]
        self._live.append(known)

    def _is_one(self, track: _Track) -> bool:
        """Return whether a track was seen often and surely enough."""
        return track.count >= self.settings.least and track.best >= self.settings.sure

    def _goes_on(self, track: _Track) -> bool:
        settings = self.settings
        if not self._is_one(track) and self._frame - track.first >= settings.trial:
            return False
        return self._frame - track.last < settings.patience

    def _tell(self) -> tuple[Item, list[Sighting]]:
        """Return the frame that has waited longest, and the tracks in it."""
        frame = self._frame + 1 - len(self._waiting)
        item, owners, size = self._waiting.popleft()
        sightings = []
        for track in owners:
            if track is None or not self._is_one(track):
                continue
            if not track.id:
                track.id = len(self.labels) + 1
            track.told = track.places.popleft()
            self.labels[track.id] = track.label
            _, box, score, mask = track.told
            sightings.append(Sighting(track.id, track.label, box, score, mask))
        if self.settings.fill:
            later = [owner for _, others, _ in self._waiting for owner in others if owner]
            for track in dict.fromkeys(later):
                if track.told is not None and track.told.frame < frame < track.places[0].frame:
                    sightings.append(_between(track, track.told, track.places[0], frame, size))
        return item, sorted(sightings, key=lambda each: each.track)


def _between(
    track: _Track, before: _Place, after: _Place, frame: int, size: tuple[int, int]
) -> Sighting:
    """Return where a track is between two of its places; its mask is the nearer one's, moved."""
    share = (frame - before.frame) / (after.frame - before.frame)
    box = np.array(before.box) * (1 - share) + np.array(after.box) * share
    nearer = before if share <= 0.5 else after
    move = (box[:2] + box[2:] - np.array(nearer.box)[:2] - np.array(nearer.box)[2:]) / 2
    mask = None
    if nearer.mask is not None:
        mask = moved(nearer.mask, round(float(move[0])), round(float(move[1])), size)
    left, top, right, bottom = box.tolist()
    score = min(before.score, after.score)
    return Sighting(track.id, track.label, (left, top, right, bottom), score, mask, filled=True)


def moved(mask: Rle, x: int, y: int, size: tuple[int, int]) -> Rle:
    """Return a mask moved by whole pixels; what leaves the image (height, width) is gone."""
    height, width = size
    crop, left, top = rle.decode_crop(mask)
    left, top = left + x, top + y
    rows = slice(max(top, 0), max(min(top + crop.shape[0], height), 0))
    columns = slice(max(left, 0), max(min(left + crop.shape[1], width), 0))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return place(np.zeros((0, 0), dtype=bool), 0, 0, height, width)
    kept = crop[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return place(kept, columns.start, rows.start, height, width)


def iou(one: Floats, other: Floats) -> Floats:
    """Return the IoU of boxes (N, 4) and (M, 4), xyxy, as (N, M)."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), axis=1) for b in (one, other)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)


def assign(gains: Floats, least: float) -> list[tuple[int, int]]:
    """Return the pairs of rows and columns of the greatest sum, each at least `least`.

    The Hungarian method with potentials, O(n^3): what scipy's `linear_sum_assignment` does, without
    scipy, which a Jetson need not have.
    """
    gains = np.where(gains >= least, gains, 0.0)
    if not gains.size:
        return []
    flipped = gains.shape[0] > gains.shape[1]
    costs = -(gains.T if flipped else gains)
    rows, columns = costs.shape
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, np.int64)  # 1 + row of each column; column 0 is a helper
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        slack = np.full(columns + 1, np.inf)
        came_from = np.zeros(columns + 1, np.int64)
        used = np.zeros(columns + 1, bool)
        while owner[column]:
            used[column] = True
            at = owner[column]
            open_ = np.flatnonzero(~used[1:]) + 1
            cost = costs[at - 1, open_ - 1] - row_price[at] - column_price[open_]
            better = cost < slack[open_]
            slack[open_[better]] = cost[better]
            came_from[open_[better]] = column
            next_ = open_[np.argmin(slack[open_])]
            step = slack[next_]
            row_price[owner[used]] += step
            column_price[used] -= step
            slack[open_] -= step
            column = int(next_)
        while column:
            owner[column] = owner[came_from[column]]
            column = int(came_from[column])
    pairs = [(int(owner[c]) - 1, c - 1) for c in range(1, columns + 1) if owner[c]]
    pairs = sorted((c, r) if flipped else (r, c) for r, c in pairs)
    return [(r, c) for r, c in pairs if gains[r, c] >= least and gains[r, c] > 0]


# --- where a track is expected: a Kalman filter of constant speed, as SORT has it ----------------


def _begin(box_xyxy: Floats, frame: int) -> _Track:
    place = _middle_and_sides(box_xyxy)
    height = max(place[3], 1.0)
    spread = np.diag([2 * PLACE * height] * 4 + [10 * SPEED * height] * 4) ** 2
    return _Track(np.concatenate([place, np.zeros(4)]), spread, frame)


def _predict(track: _Track) -> None:
    """Move a track by a frame."""
    height = max(float(track.mean[3]), 1.0)
    move = np.eye(8)
    move[:4, 4:] = np.eye(4)
    noise = np.diag([PLACE * height] * 4 + [SPEED * height] * 4) ** 2
    track.mean = move @ track.mean
    track.spread = move @ track.spread @ move.T + noise


def _correct(track: _Track, box_xyxy: Floats) -> None:
    """Let a track be where a detection is, as far as either is sure of it."""
    height = max(float(track.mean[3]), 1.0)
    seen = track.spread[:4, :4] + np.eye(4) * (PLACE * height) ** 2
    gain = np.linalg.solve(seen, track.spread[:4, :]).T  # (8, 4)
    track.mean = track.mean + gain @ (_middle_and_sides(box_xyxy) - track.mean[:4])
    track.spread = track.spread - gain @ seen @ gain.T


def _middle_and_sides(box_xyxy: Floats) -> Floats:
    left, top, right, bottom = box_xyxy
    return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
