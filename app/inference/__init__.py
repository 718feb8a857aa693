"""Prediction from Python: `Predictor.load(path).predict(image, ["pothole"])`, as in `infer.sh`."""

from typing import TYPE_CHECKING, Any

from app.inference.detections import Detections

if TYPE_CHECKING:
    from app.inference.predictor import Predictor

__all__ = ["Detections", "Predictor"]


def __getattr__(name: str) -> Any:
    """Import `Predictor` only when it is used, because the rest of the package needs no torch."""
    if name == "Predictor":
        from app.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
