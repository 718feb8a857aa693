"""Identities over frames: the detections of one frame after the other become tracks.

ByteTrack (Zhang et al., ECCV 2022, arXiv 2110.06864): sure detections are matched to where a
Kalman filter expects the tracks, then unsure ones to the tracks that are left, since what is hidden
in part scores low. It needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PLACE, SPEED = 1 / 20, 1 / 160  # standard deviations, as shares of a box's height (DeepSORT)


@dataclass(frozen=True)
class TrackSettings:
    """Hold when detections belong together.

    Attributes:
        sure: score from which a detection is matched first, and may begin a track.
        unsure: score from which one is matched at all.
        overlap, unsure_overlap: least IoU with where a track is expected.
        other_class: what the IoU with a track of another class counts.
        patience: frames that a track is looked for after it was last seen.
        least: frames that a track must be seen in.
    """

    sure: float = 0.5
    unsure: float = 0.1
    overlap: float = 0.2
    unsure_overlap: float = 0.4
    other_class: float = 0.6
    patience: int = 30
    least: int = 3


@dataclass
class Track:
    """What has been seen of one thing.

    Attributes:
        frames: in which it was seen, in order.
        detections: of each of these frames, its place in what `update` was given.
        votes: of each class, the sum of its scores.
    """

    id: int
    mean: Floats  # (8,) center, width, height and their speeds a frame, in pixels
    spread: Floats  # (8, 8)
    frames: list[int] = field(default_factory=list)
    detections: list[int] = field(default_factory=list)
    votes: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> int:
        """Return the class that most speaks for."""
        return max(self.votes, key=lambda label: (self.votes[label], -label))

    @property
    def box_xyxy(self) -> Floats:
        """Return where it is expected, (4,) in pixels."""
        x, y, width, height = self.mean[:4]
        half = np.maximum([width, height], 1e-3) / 2
        return np.array([x - half[0], y - half[1], x + half[0], y + half[1]])

    def saw(self, frame: int, detection: int, label: int, score: float) -> None:
        """Take in that it was seen."""
        self.frames.append(frame)
        self.detections.append(detection)
        self.votes[label] = self.votes.get(label, 0.0) + score


class Tracker:
    """Gives detections the ids of tracks, a frame after the other."""

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self.settings = settings or TrackSettings()
        self.frame = -1
        self.tracks: list[Track] = []  # all that there were
        self._live: list[Track] = []

    def update(self, boxes_xyxy: Floats, scores: Floats, labels: Sequence[int]) -> Ints:
        """Return the id of each detection of the next frame, -1 of what belongs to no track.

        Args:
            boxes_xyxy: (N, 4) in pixels.
            scores: (N,) 0..1.
            labels: class of each.
        """
        settings = self.settings
        self.frame += 1
        for track in self._live:
            _predict(track)
        boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
        kinds = np.asarray(labels, np.int64)
        ids = np.full(len(boxes), -1, np.int64)
        left = list(range(len(self._live)))
        sure = np.flatnonzero(scores >= settings.sure)
        unsure = np.flatnonzero((scores >= settings.unsure) & (scores < settings.sure))
        for chosen, least in ((sure, settings.overlap), (unsure, settings.unsure_overlap)):
            if least is settings.unsure_overlap:
                # What was lost before is not found again by an unsure glimpse.
                left = [at for at in left if self._live[at].frames[-1] == self.frame - 1]
            tracks = [self._live[at] for at in left]
            overlaps = self._overlaps(tracks, boxes[chosen], kinds[chosen])
            for row, column in assign(overlaps, least):
                track, number = tracks[row], int(chosen[column])
                _correct(track, boxes[number])
                track.saw(self.frame, number, int(kinds[number]), float(scores[number]))
                ids[number] = track.id
            seen = {id for id in ids.tolist() if id >= 0}
            left = [at for at in left if self._live[at].id not in seen]
        for number in sure:
            if ids[number] < 0:
                track = _begin(len(self.tracks) + 1, boxes[number])
                track.saw(self.frame, int(number), int(kinds[number]), float(scores[number]))
                ids[number] = track.id
                self.tracks.append(track)
                self._live.append(track)
        last = self.frame - settings.patience
        self._live = [track for track in self._live if track.frames[-1] >= last]
        return ids

    def finished(self) -> list[Track]:
        """Return the tracks that were seen often enough, in the order of their ids."""
        return [track for track in self.tracks if len(track.frames) >= self.settings.least]

    def _overlaps(self, tracks: Sequence[Track], boxes: Floats, labels: Ints) -> Floats:
        """Return what each track has in common with each box, less where classes differ."""
        if not tracks or not len(boxes):
            return np.zeros((len(tracks), len(boxes)))
        common = iou(np.stack([track.box_xyxy for track in tracks]), boxes)
        same = np.array([track.label for track in tracks])[:, None] == labels
        return np.where(same, common, common * self.settings.other_class)


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


def _begin(id: int, box_xyxy: Floats) -> Track:
    place = _place(box_xyxy)
    height = max(place[3], 1.0)
    spread = np.diag([2 * PLACE * height] * 4 + [10 * SPEED * height] * 4) ** 2
    return Track(id, np.concatenate([place, np.zeros(4)]), spread)


def _predict(track: Track) -> None:
    """Move a track by a frame."""
    height = max(float(track.mean[3]), 1.0)
    move = np.eye(8)
    move[:4, 4:] = np.eye(4)
    noise = np.diag([PLACE * height] * 4 + [SPEED * height] * 4) ** 2
    track.mean = move @ track.mean
    track.spread = move @ track.spread @ move.T + noise


def _correct(track: Track, box_xyxy: Floats) -> None:
    """Let a track be where a detection is, as far as either is sure of it."""
    height = max(float(track.mean[3]), 1.0)
    seen = track.spread[:4, :4] + np.eye(4) * (PLACE * height) ** 2
    gain = np.linalg.solve(seen, track.spread[:4, :]).T  # (8, 4)
    track.mean = track.mean + gain @ (_place(box_xyxy) - track.mean[:4])
    track.spread = track.spread - gain @ seen @ gain.T


def _place(box_xyxy: Floats) -> Floats:
    left, top, right, bottom = box_xyxy
    return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
