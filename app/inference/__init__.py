"""`Predictor.load(path).predict(image, ["pothole"])`: what `infer.sh` does, from Python."""

from app.inference.detections import Detections
from app.inference.predictor import Predictor

__all__ = ["Detections", "Predictor"]
