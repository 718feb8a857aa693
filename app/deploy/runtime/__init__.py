"""`Runtime.load(folder).predict(image, ["pothole"])`: an exported folder, run without torch."""

from app.deploy.runtime.runtime import Runtime

__all__ = ["Runtime"]
