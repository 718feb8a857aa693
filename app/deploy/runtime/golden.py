"""`golden.npz`: the outputs of the exporter's graphs on one image, for devices to compare with.

It holds `pixels` (3, R, R) uint8, `text` and `text_mask` as the ground graph takes them, and
SAMPLES evenly spaced values of each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.deploy.runtime.manifest import REMEDY, Manifest, Tolerance
from app.errors import UserError

FILE = "golden.npz"
INPUTS = ("pixels", "text", "text_mask")
SAMPLES = 4096  # of an output
MIN_SCORE = 0.05  # boxes and masks of queries with a higher score are compared
Arrays = Mapping[str, NDArray[Any]]


def sample(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return min(n, SAMPLES) of the n values of an array of any shape."""
    return values.ravel()[_indices(values.size)].astype(np.float32)


def _indices(size: int) -> NDArray[np.int64]:
    """Return the indices of the sampled values among `size` values."""
    return np.linspace(0, size - 1, min(SAMPLES, size)).astype(np.int64)


def golden_misses(manifest: Manifest, precision: str, golden: Arrays, outputs: Arrays) -> list[str]:
    """Return what of a device's outputs differs by more than the precision's tolerance.

    Feature maps are compared by their cosine, scores by their difference. Boxes and masks of
    queries with a score above MIN_SCORE are compared: boxes by their difference, masks by the share
    of equal signs.

    Args:
        golden: content of `golden.npz`.
        outputs: whole outputs of both graphs, as of `app.deploy.runtime.runtime.Backend`.

    Raises:
        UserError: the manifest has no tolerance of this precision.
    """
    if precision not in manifest.tolerances:
        raise UserError(f"the manifest has no tolerance of {precision}. {REMEDY}")
    limits = manifest.tolerances[precision]
    names = [name for name in golden if name not in INPUTS]
    if misses := [miss for name in names for miss in _faults(name, golden, outputs)]:
        return misses
    for name in names:
        if name not in ("scores", "presence", "boxes", "masks"):
            cosine = cosine_of(golden[name], sample(outputs[name]))
            misses += _beyond(f"{name}: cosine", cosine, least=limits.cosine)
    for name in ("scores", "presence"):
        difference = np.abs(golden[name] - sample(outputs[name])).max(initial=0.0)
        misses += _beyond(f"{name}: differ by", difference, most=limits.scores)
    matches, farthest = _match_rows(golden, outputs, limits, sorted_rows=manifest.top is not None)
    misses += _beyond("boxes: differ by", farthest, most=limits.boxes)
    if "masks" in golden:
        equal = _equal_signs(golden["masks"], outputs["masks"], matches)
        misses += _beyond("masks: equal signs", equal, least=limits.mask_iou)
    return misses


def _faults(name: str, golden: Arrays, outputs: Arrays) -> list[str]:
    """Return why an output cannot be compared."""
    if name not in outputs:
        return [f"{name}: is missing"]
    output = outputs[name]
    if golden[name].shape != (min(SAMPLES, output.size),):
        return [f"{name}: has another size: {output.shape}"]
    return [] if np.isfinite(output).all() else [f"{name}: holds NaN or infinity"]


def _beyond(what: str, value: float, *, least: float = -np.inf, most: float = np.inf) -> list[str]:
    """Return a miss where a value is out of bounds, or NaN."""
    if least <= value <= most:
        return []
    bound = f"at least {least:g}" if value < least else f"at most {most:g}"
    return [f"{what} {value:.6g} ({bound})"]


def cosine_of(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the cosine of two arrays of one shape; 1 where both are all zeros."""
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    lengths = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / lengths if lengths else float(not one.any() and not other.any())


def _match_rows(
    golden: Arrays, outputs: Arrays, limits: Tolerance, *, sorted_rows: bool
) -> tuple[dict[int, int], float]:
    """Match the exporter's rows with a score above MIN_SCORE to the device's rows.

    Args:
        sorted_rows: whether the rows of a prompt are sorted by score. Rounding may then exchange
            neighbors, and drop the last row.

    Returns:
        The exporter's row → the device's row, of K * Q rows; and the largest difference of the
        sampled coordinates of matched boxes.
    """
    scores, boxes = outputs["scores"], outputs["boxes"].reshape(-1, 4)
    queries = scores.shape[1]
    golden_scores = np.full(scores.size, np.nan)  # (K * Q,), the exporter's sampled scores
    golden_scores[_indices(scores.size)] = golden["scores"]
    sampled = _indices(boxes.size)  # of all coordinates, ascending
    matches: dict[int, int] = {}
    farthest = 0.0
    for row in np.flatnonzero(golden_scores > MIN_SCORE).tolist():
        at = slice(*np.searchsorted(sampled, [4 * row, 4 * row + 4]))
        if not len(sampled[at]):  # no coordinate of this box was sampled
            continue
        candidates = np.array([row])
        if sorted_rows:
            first = row // queries * queries
            difference = np.abs(scores.ravel()[first : first + queries] - golden_scores[row])
            candidates = np.append(candidates, first + np.flatnonzero(difference <= limits.scores))
        distance = np.abs(boxes[candidates][:, sampled[at] % 4] - golden["boxes"][at]).max(axis=1)
        last = golden_scores[row // queries * queries + queries - 1]
        may_be_dropped = sorted_rows and golden_scores[row] - last <= limits.scores
        if may_be_dropped and distance.min() > limits.boxes:
            continue
        matches[row] = int(candidates[distance.argmin()])
        farthest = max(farthest, float(distance.min()))
    return matches, farthest


def _equal_signs(golden: NDArray[Any], masks: NDArray[Any], matches: Mapping[int, int]) -> float:
    """Return the share of sampled mask logits of matched rows that have the same sign."""
    pixels = masks.shape[-2] * masks.shape[-1]
    sampled = _indices(masks.size)
    rows = np.array([matches.get(row, -1) for row in (sampled // pixels).tolist()])
    if not (rows >= 0).any():
        return 1.0
    logits = masks.reshape(-1, pixels)[rows, sampled % pixels]
    return float(((logits > 0) == (golden > 0))[rows >= 0].mean())
