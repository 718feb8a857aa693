"""`golden.npz`: what the exporter's graphs answered on one image, for a device to find again.

`pixels` (3, R, R) uint8, `text` and `text_mask` as the ground graph takes them, and of each output
SAMPLES evenly spaced values. Needs no torch, and runs on Python 3.10.
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
SEEN = 0.05  # score from which a query says something, so that its box and mask are compared
Arrays = Mapping[str, NDArray[Any]]


def sample(values: NDArray[Any]) -> NDArray[np.float32]:
    """(min(n, SAMPLES),) of the n values of an array of any shape."""
    return values.ravel()[_places(values.size)].astype(np.float32)


def _places(size: int) -> NDArray[np.int64]:
    return np.linspace(0, size - 1, min(SAMPLES, size)).astype(np.int64)


def golden_misses(manifest: Manifest, precision: str, golden: Arrays, outputs: Arrays) -> list[str]:
    """What a device's answers miss of the exporter's, beyond what the precision is held to.

    Feature maps are compared by their cosine, scores by their difference, boxes and masks of
    queries with a score above SEEN by their difference and by the share of equal signs.

    Args:
        golden: as `golden.npz` holds it.
        outputs: of both graphs, whole; see `app.deploy.runtime.runtime.Backend`.

    Raises:
        UserError: the manifest holds this precision to nothing.
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
    twins, farthest = _twins(golden, outputs, limits, sorted_rows=manifest.top is not None)
    misses += _beyond("boxes: differ by", farthest, most=limits.boxes)
    if "masks" in golden:
        equal = _equal_signs(golden["masks"], outputs["masks"], twins)
        misses += _beyond("masks: equal signs", equal, least=limits.mask_iou)
    return misses


def _faults(name: str, golden: Arrays, outputs: Arrays) -> list[str]:
    if name not in outputs:
        return [f"{name}: is not answered"]
    found = outputs[name]
    if golden[name].shape != (min(SAMPLES, found.size),):
        return [f"{name}: has another size: {found.shape}"]
    return [] if np.isfinite(found).all() else [f"{name}: holds what is no number"]


def _beyond(what: str, value: float, *, least: float = -np.inf, most: float = np.inf) -> list[str]:
    if least <= value <= most:
        return []
    bound = f"at least {least:g}" if value < least else f"at most {most:g}"
    return [f"{what} {value:.6g} ({bound})"]


def cosine_of(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The cosine of two arrays of one shape; 1 where both are 0 throughout."""
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    lengths = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / lengths if lengths else float(not one.any() and not other.any())


def _twins(
    golden: Arrays, outputs: Arrays, limits: Tolerance, *, sorted_rows: bool
) -> tuple[dict[int, int], float]:
    """For each row of the exporter's that says something, the row of the device's that is it.

    Args:
        sorted_rows: the rows of a prompt are in the order of their scores, in which rounding may
            exchange neighbours, and put the last one out.

    Returns:
        Rows of (K * Q,), and the largest difference between boxes of a pair, in known values.
    """
    scores, boxes = outputs["scores"], outputs["boxes"].reshape(-1, 4)
    queries = scores.shape[1]
    known = np.full(scores.size, np.nan)
    known[_places(scores.size)] = golden["scores"]
    places = _places(boxes.size)
    twins: dict[int, int] = {}
    farthest = 0.0
    for row in np.flatnonzero(known > SEEN).tolist():
        at = slice(*np.searchsorted(places, [4 * row, 4 * row + 4]))
        if not len(places[at]):
            continue
        options = np.array([row])
        if sorted_rows:
            first = row // queries * queries
            apart = np.abs(scores.ravel()[first : first + queries] - known[row])
            options = np.append(options, first + np.flatnonzero(apart <= limits.scores))
        apart = np.abs(boxes[options][:, places[at] % 4] - golden["boxes"][at]).max(axis=1)
        last = known[row // queries * queries + queries - 1]
        may_be_out = sorted_rows and known[row] - last <= limits.scores
        if may_be_out and apart.min() > limits.boxes:
            continue
        twins[row] = int(options[apart.argmin()])
        farthest = max(farthest, float(apart.min()))
    return twins, farthest


def _equal_signs(golden: NDArray[Any], masks: NDArray[Any], twins: Mapping[int, int]) -> float:
    """The share of known mask logits, of rows that have a twin, on the same side of 0."""
    pixels = masks.shape[-2] * masks.shape[-1]
    places = _places(masks.size)
    mine = np.array([twins.get(row, -1) for row in (places // pixels).tolist()])
    if not (mine >= 0).any():
        return 1.0
    found = masks.reshape(-1, pixels)[mine, places % pixels]
    return float(((found > 0) == (golden > 0))[mine >= 0].mean())
