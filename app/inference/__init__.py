"""`Predictor.load(path).predict(image, ["pothole"])`: what `infer.sh` does, from Python."""

from app.inference.predictor import Detections, Predictor

__all__ = ["Detections", "Predictor"]
