"""The figure that decides which weights are best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from app.errors import UserError, nearest

LESS_IS_BETTER = "off_prompt/"  # figures so named count what should not be


def metric_name(figures: Mapping[str, object], metric: str) -> str:
    """Return the name of the figure.

    Args:
        figures: what a validation gave.
        metric: `evaluation.metric`; auto: mask AP, or box AP from a model without masks.
    """
    if metric == "auto":
        return "segm/AP" if "segm/AP" in figures else "bbox/AP"
    if metric not in figures:
        raise UserError(
            f"evaluation.metric={metric}: validation gives no such figure; it gives "
            f"{', '.join(figures)}.{nearest(metric, figures)}"
        )
    return metric


def gain(name: str, value: float, best: float | None) -> float:
    """Return by how much a figure is better than the best so far; infinite for the first."""
    if best is None:
        return math.inf
    return best - value if name.startswith(LESS_IS_BETTER) else value - best
