"""`Predictor.load(path).predict(image, ["pothole"])`: what `infer.sh` does, from Python."""

from typing import TYPE_CHECKING, Any

from app.inference.detections import Detections

if TYPE_CHECKING:
    from app.inference.predictor import Predictor

__all__ = ["Detections", "Predictor"]


def __getattr__(name: str) -> Any:
    """`Predictor` when it is asked for: the rest of the room needs no torch."""
    if name == "Predictor":
        from app.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
