"""Figures of tracks: HOTA, IDF1 and MOTA, by TrackEval, of each class and as their mean.

HOTA: Luiten et al., IJCV 2021, arXiv 2009.07736; IDF1: Ristani et al., 2016, arXiv 1609.01775;
MOTA: Bernardin and Stiefelhagen, 2008.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.geometry import box_fault, mask_fault
from app.errors import UserError
from app.files import read_json

THRESHOLD = 0.5  # IoU from which IDF1 and MOTA take two objects for one
KEYS = ("video_id", "frame_id", "track_id", "category_id")
Figures = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """An object in a frame.

    Attributes:
        track, label: ids of the thing that it is, and of its class.
        shape: compressed COCO RLE, or a box [x, y, width, height] in pixels.
    """

    track: int
    label: int
    shape: Any


Film = list[list[Seen]]  # of each frame


@dataclass(frozen=True)
class Films:
    """Hold films by id, and the names of their classes by id.

    Attributes:
        names, fps: of each film; frames a second.
        images: of the frames of each: id and file, which is relative to the JSON's folder.
    """

    films: Mapping[int, Film]
    classes: Mapping[int, str]
    names: Mapping[int, str] = field(default_factory=dict)
    fps: Mapping[int, float] = field(default_factory=dict)
    images: Mapping[int, Sequence[tuple[int, str]]] = field(default_factory=dict)


def read_films(file: Path) -> Films:
    """Read a COCO-VID JSON: COCO's, with `videos`, and with `track_id`s of the annotations.

    Raises:
        UserError: each place that is not so.
    """
    document = read_json(file)
    if not isinstance(document, dict) or not isinstance(document.get("videos"), list):
        raise UserError(f"{file}: is no COCO-VID: it has no list of 'videos'")
    problems: list[str] = []
    videos = {video["id"]: video for video in document["videos"] if _has(video)}
    lengths = {id: video["length"] for id, video in videos.items()}
    images: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(document.get("images", [])):
        frame = image.get("frame_id")
        if image.get("video_id") not in lengths or not isinstance(frame, int):
            problems.append(f"{file}: images[{number}]: has no video_id and frame_id of a video")
        elif not 0 <= frame < lengths[image["video_id"]]:
            problems.append(f"{file}: images[{number}].frame_id is {frame}: beyond its video")
        else:
            images[image["id"]] = image
    films: dict[int, Film] = {id: [[] for _ in range(n)] for id, n in lengths.items()}
    classes = {each["id"]: str(each["name"]) for each in document.get("categories", [])}
    for number, each in enumerate(document.get("annotations", [])):
        place, image = f"{file}: annotations[{number}]", images.get(each.get("image_id"))
        if image is None or each.get("category_id") not in classes:
            problems.append(f"{place}: is of no image and class that are listed")
            continue
        if not isinstance(each.get("track_id"), int):
            problems.append(f"{place}.track_id is {each.get('track_id')!r}: must be a whole number")
            continue
        mask, size = each.get("segmentation"), (image["width"], image["height"])
        shape = mask if isinstance(mask, dict) and isinstance(mask.get("counts"), str) else None
        fault = mask_fault(mask, *size) if shape else box_fault(each.get("bbox"), *size)
        if fault:
            problems.append(f"{place}: {fault[1]}")
            continue
        seen = Seen(each["track_id"], each["category_id"], shape or each["bbox"])
        films[image["video_id"]][image["frame_id"]].append(seen)
    if problems:
        raise UserError(problems)
    names = {id: str(video.get("name", id)) for id, video in videos.items()}
    fps = {id: _fps(video) for id, video in videos.items()}
    frames = {id: [(0, "")] * length for id, length in lengths.items()}
    for id, image in images.items():
        frames[image["video_id"]][image["frame_id"]] = id, str(image.get("file_name", ""))
    return Films(films, classes, names, fps, frames)


def score_tracks(truth: Films, found: Films) -> Figures:
    """Return HOTA, DetA, AssA, IDF1 and MOTA (0..1), and the number of switched identities.

    Each is the mean of the classes that the truth has; `name/HOTA` is that of one class.

    Raises:
        UserError: the films are not the same, or the truth shows nothing.
    """
    lengths = [{id: len(film) for id, film in each.films.items()} for each in (truth, found)]
    if lengths[0] != lengths[1]:
        raise UserError(
            "the films of both are not the same: their ids and numbers of frames differ"
        )
    labels = {label for film in truth.films.values() for frame in film for label in _labels(frame)}
    if not labels:
        raise UserError("the truth shows nothing to follow")
    known = {name: label for label, name in found.classes.items()}
    figures: dict[str, list[float]] = defaultdict(list)
    per_class: Figures = {}
    for label in sorted(labels):
        name = truth.classes[label]
        one = _score_class(truth, found, label, known.get(name))
        for key, value in one.items():
            figures[key].append(value)
        per_class[f"{name}/HOTA"] = one["HOTA"]
    means = {
        key: float(np.sum(values) if key == "switches" else np.mean(values))
        for key, values in figures.items()
    }
    return means | per_class


def _score_class(truth: Films, found: Films, label: int, other: int | None) -> Figures:
    from trackeval.metrics import CLEAR, HOTA, Identity  # takes a second

    settings = {"THRESHOLD": THRESHOLD, "PRINT_CONFIG": False}
    metrics = {"hota": HOTA(), "clear": CLEAR(settings), "identity": Identity(settings)}
    results: dict[str, dict[str, Any]] = {name: {} for name in metrics}
    for id, film in truth.films.items():
        data = _data(film, found.films[id], label, other)
        for name, metric in metrics.items():
            results[name][str(id)] = metric.eval_sequence(data)
    whole = {name: metrics[name].combine_sequences(each) for name, each in results.items()}
    return {
        "HOTA": float(np.mean(whole["hota"]["HOTA"])),
        "DetA": float(np.mean(whole["hota"]["DetA"])),
        "AssA": float(np.mean(whole["hota"]["AssA"])),
        "IDF1": float(whole["identity"]["IDF1"]),
        "MOTA": float(whole["clear"]["MOTA"]),
        "switches": float(whole["clear"]["IDSW"]),
    }


def _data(truth: Film, found: Film, label: int, other: int | None) -> dict[str, Any]:
    """Return a film as TrackEval takes it: ids from 0, and the IoU of all pairs of each frame."""
    frames = []
    for shown, seen in zip(truth, found, strict=True):
        ours = [each for each in shown if each.label == label]
        theirs = [each for each in seen if each.label == other]
        frames.append((ours, theirs))
    ids: list[dict[int, int]] = [{}, {}]
    listed: list[list[NDArray[np.int64]]] = [[], []]
    for pair in frames:
        for side, objects in enumerate(pair):
            places = [ids[side].setdefault(each.track, len(ids[side])) for each in objects]
            listed[side].append(np.array(places, dtype=np.int64))
    return {
        "gt_ids": listed[0],
        "tracker_ids": listed[1],
        "num_gt_ids": len(ids[0]),
        "num_tracker_ids": len(ids[1]),
        "num_gt_dets": sum(map(len, listed[0])),
        "num_tracker_dets": sum(map(len, listed[1])),
        "num_timesteps": len(frames),
        "similarity_scores": [_overlaps(ours, theirs) for ours, theirs in frames],
    }


def _overlaps(ours: Sequence[Seen], theirs: Sequence[Seen]) -> NDArray[np.float64]:
    """Return IoUs (N, M): of masks where all have one, else of boxes."""
    if not ours or not theirs:
        return np.zeros((len(ours), len(theirs)))
    shapes = [[each.shape for each in side] for side in (ours, theirs)]
    if not all(isinstance(shape, dict) for side in shapes for shape in side):
        shapes = [[_box(shape) for shape in side] for side in shapes]
    found = coco_mask.iou(shapes[1], shapes[0], [False] * len(ours))
    return np.asarray(found, dtype=np.float64).T


def _box(shape: Any) -> list[float]:
    box = coco_mask.toBbox(shape).tolist() if isinstance(shape, dict) else shape
    return [float(side) for side in box]


def _labels(frame: Sequence[Seen]) -> set[int]:
    return {each.label for each in frame}


def _fps(video: Mapping[str, Any]) -> float:
    fps = video.get("fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps <= 1000 else 25.0


def _has(video: Any) -> bool:
    return isinstance(video, dict) and all(isinstance(video.get(k), int) for k in ("id", "length"))
