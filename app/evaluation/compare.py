"""Compare two runs on the same images: their figures, and intervals of the differences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from app.datasets.coco import Category, Dataset
from app.errors import UserError
from app.evaluation import record
from app.evaluation.concepts import SCORE, Presence, concept_counts, figures_of
from app.evaluation.intervals import (
    EVERYTHING,
    GROUPS,
    Interval,
    gain_interval,
    groups,
    student,
)
from app.evaluation.matching import Overlaps, overlaps
from app.evaluation.metrics import accumulate, iou_types
from app.evaluation.off_prompt import firing_of
from app.evaluation.record import Record
from app.evaluation.report_page import HEADLINE, KIND, ONCE
from app.evaluation.run_files import RunFiles, read_run
from app.evaluation.summary import FEW, Figures
from app.files import flatten

Counts = NDArray[np.float64]
RESAMPLINGS = 500
SHOWN = 20  # settings that differ
CLASSES = 50  # more get no interval: each costs its own
_SHOWN = {  # hotcoco's name: ours
    **{"AP": "AP", "AP50": "AP50", "AP75": "AP75"},
    **{"APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"},
    **{"AR1": "AR_1", "AR10": "AR_10", "AR100": "AR_100"},
}


@dataclass(frozen=True)
class Line:
    """Hold a figure of both runs, and the 95 % interval of their difference."""

    name: str
    one: float
    other: float
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float:
        return self.other - self.one

    @property
    def is_sure(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Comparison:
    """Hold the lines of a comparison: figures first, then a line a class.

    Attributes:
        settings: lines that name the settings in which two runs differ; empty where a folder does
            not hold them.
    """

    lines: tuple[Line, ...]
    images: int
    settings: tuple[str, ...]


def compare(one: Path, other: Path, resamplings: int = RESAMPLINGS) -> Comparison:
    """Compare two folders of runs or evaluations on the same images.

    The intervals are paired: the same images are left out for both runs, or drawn with replacement,
    and the figures are computed from the others (`intervals`).

    Raises:
        UserError: a folder holds no evaluation, or they were scored on different truths.
    """
    first, second = record.read(one), record.read(other)
    files = read_run(one), read_run(other)
    if not _is_same(first.truth, second.truth):
        raise UserError(
            f"{one} ({first.split}) and {other} ({second.split}): were scored on different images "
            "or labels. Score both weights on one split with python -m app evaluate"
        )
    kinds = [t for t in iou_types(first.truth, first.results) if t in _kinds(second)]
    lines = [line for kind in kinds for line in _figures(first, second, kind)]
    lines += [line for kind in kinds for line in _concepts(first, second, kind, resamplings)]
    lines += _stored_concepts(*files, {line.name for line in lines})
    lines += _firing(first, second, kinds[-1], resamplings)
    lines += [line for kind in kinds for line in _classes(first, second, kind)]
    settings = tuple(_other_settings(*files))
    return Comparison(tuple(lines), len(first.truth.images), settings)


def label(name: str) -> str:
    """Return the name of a figure as the report has it: "box AP" for bbox/AP."""
    kind, _, rest = name.partition("/")
    if kind not in KIND:
        return {**ONCE, "off_prompt/classes": "off-prompt firing on classes"}.get(name, name)
    figure, _, of_class = rest.partition("/")
    figure = HEADLINE.get(figure, figure.replace("_", " "))
    return f"{KIND[kind]} {figure}{f' of {of_class}' if of_class else ''}"


def _other_settings(one: RunFiles, other: RunFiles) -> list[str]:
    if not (one.all_settings and other.all_settings):
        return []
    first, second = flatten(one.all_settings), flatten(other.all_settings)
    differing = [
        f"  {key}: {first.get(key)}, {second.get(key)}"
        for key in {**first, **second}
        if first.get(key) != second.get(key) and key != "output_dir"
    ]
    if not differing:
        return ["settings: the same in both"]
    more = [f"  and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
    return ["settings that differ, of the first and of the second:", *differing[:SHOWN], *more]


def _stored_concepts(one: RunFiles, other: RunFiles, known: Collection[str]) -> list[Line]:
    """Return cgF1 as both runs have it in metrics.json, where the classes alone define none.

    It counts nouns that no image shows as well. It has no interval, because these are not kept.
    """
    names = [f"{kind}/{name}" for kind in KIND for name in ("cgF1", "IL_MCC")]
    return [
        Line(name, one.figures[name], other.figures[name])
        for name in names
        if name not in known and name in one.figures and name in other.figures
    ]


def _is_same(one: Dataset, other: Dataset) -> bool:
    """Return whether both have the same labels on the same images, in any folder."""

    def content(truth: Dataset) -> tuple[object, ...]:
        names = [(category.id, category.name) for category in truth.categories]
        return [image.id for image in truth.images], names, truth.annotations

    return content(one) == content(other)


def _kinds(of: Record) -> tuple[str, ...]:
    return iou_types(of.truth, of.results)


def _figures(one: Record, other: Record, kind: str) -> list[Line]:
    compared = _compared(one, other, kind)
    ids, without_one = [image.id for image in one.truth.images], []
    for part in groups(len(ids)) if len(ids) > 1 else ():
        rest = set(ids) - {ids[place] for place in part}
        without_one.append(_compared(_subset(one, rest), _subset(other, rest), kind))
    having = len({a.image_id for a in one.truth.annotations if not a.iscrowd})
    lines = []
    for name, ours in _SHOWN.items():
        figures = compared["metrics_a"][name], compared["metrics_b"][name]
        if figures[0] <= -1:  # hotcoco's mark of what the truth does not define
            continue
        interval = EVERYTHING
        if all(each["metrics_a"][name] > -1 for each in without_one):  # not of one image alone
            differences = [each["deltas"][name] for each in without_one]
            interval = student(figures[1] - figures[0], differences, min(having, GROUPS))
        lines.append(Line(f"{kind}/{ours}", *figures, _finite(interval)))
    return lines


def _subset(whole: Record, images: Collection[int]) -> Record:
    results = [result for result in whole.results if result["image_id"] in images]
    return replace(whole, truth=whole.truth.subset(images), results=results)


def _finite(interval: Interval) -> tuple[float, float] | None:
    return (interval.low, interval.high) if np.isfinite(interval.high) else None


def _classes(one: Record, other: Record, kind: str) -> list[Line]:
    """Return AP of each class that has objects."""
    categories = one.truth.categories
    there = {annotation.category_id for annotation in one.truth.annotations}
    lines = []
    for category in categories:
        if category.id not in there:
            continue
        first, second = _only(one, category), _only(other, category)
        compared = _compared(first, second, kind)
        interval = None
        if len(categories) <= CLASSES:
            bounds = gain_interval(first.truth, first.results, second.results, kind)[1]
            interval = (bounds.low, bounds.high)
        figures = compared["metrics_a"]["AP"], compared["metrics_b"]["AP"]
        lines.append(Line(f"{kind}/AP/{category.name}", *figures, interval))
    return lines


def _only(whole: Record, category: Category) -> Record:
    """Return all images with labels and results of one class."""
    annotations = tuple(a for a in whole.truth.annotations if a.category_id == category.id)
    truth = replace(whole.truth, annotations=annotations, categories=(category,))
    results = [result for result in whole.results if result["category_id"] == category.id]
    return replace(whole, truth=truth, results=results)


def _compared(one: Record, other: Record, kind: str) -> Mapping[str, Any]:
    first, second = (accumulate(run.truth, run.results, kind) for run in (one, other))
    compared: Mapping[str, Any] = hotcoco.compare(first, second, n_bootstrap=0)
    return compared


def _concepts(one: Record, other: Record, kind: str, resamplings: int) -> list[Line]:
    """Return cgF1 and its factors, of classes alone, because nouns may differ from run to run."""
    categories = [category.id for category in one.truth.categories]

    def figures(counts: Counts) -> dict[str, float]:
        of_concepts = figures_of(counts, Presence())
        names = [name for name in ("cgF1", "pmF1", "IL_MCC") if name in of_concepts]
        return {f"{kind}/{name}": of_concepts[name] for name in names}

    counts = [
        [concept_counts(image, categories) for image in _images(r, kind)] for r in (one, other)
    ]
    return _lines(counts, figures, resamplings)


def _firing(one: Record, other: Record, kind: str, resamplings: int) -> list[Line]:
    """Return the mean number of detections of classes that an image lacks."""

    def figures(counts: Counts) -> dict[str, float]:
        return {"off_prompt/classes": counts[0] / counts[1]}

    counts = [[(firing_of(image, SCORE), 1) for image in _images(r, kind)] for r in (one, other)]
    return _lines(counts, figures, resamplings)


def _images(of: Record, kind: str) -> tuple[Overlaps, ...]:
    return overlaps(of.truth, of.results, kind)


def _lines(
    counts: Sequence[Any], figures: Callable[[Counts], dict[str, float]], resamplings: int
) -> list[Line]:
    """Return the lines of figures that are functions of counts, summed over the images.

    Args:
        counts: of both runs, (images, K).
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in counts)
    images = len(first)
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamplings)
    pairs = [(figures(draw @ first), figures(draw @ second)) for draw in draws]
    lines = []
    sums = first.sum(axis=0), second.sum(axis=0)
    one, other = map(figures, sums)
    rests = range(images if images < FEW else 0)
    without_one = [
        (figures(sums[0] - first[i]), figures(sums[1] - second[i])) for i in rests if images > 1
    ]
    for name in [name for name in one if name in other]:
        interval = EVERYTHING
        if drawn := _differences(pairs, name):
            interval = Interval(*map(float, np.percentile(drawn, [2.5, 97.5])))
        if rests:
            few = _differences(without_one, name)
            interval = interval.joined(student(other[name] - one[name], few, len(few)))
        lines.append(Line(name, one[name], other[name], _finite(interval)))
    return lines


def _differences(pairs: Sequence[tuple[Figures, Figures]], name: str) -> list[float]:
    return [b[name] - a[name] for a, b in pairs if name in a and name in b]
