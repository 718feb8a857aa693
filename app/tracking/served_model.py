"""The model that MLflow stores and serves: image bytes and prompts → what `infer.sh` finds.

MLflow stores this script, not a pickle. It runs the script to load the model, and takes the object
that `set_model` is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Sam3(PythonModel):
    """Serves weights of this project by `app.inference.Predictor`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights."""
        from app.inference import Predictor  # here, because the process that logs needs no torch

        self.predictor = Predictor.load(context.artifacts["weights"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Find objects in each image.

        Args:
            model_input: one row for each image, with the columns `image`, bytes of a JPEG or PNG
                (base64 in JSON); optionally `prompts`, noun phrases (default: the classes of the
                weights), and `threshold`, 0..1 (default: that of the weights).

        Returns:
            For each row a dict of `boxes_xyxy` in pixels, `scores`, `prompts` (one for each object)
            and `masks`, compressed COCO RLE; highest score first.
        """
        del context, params
        return [self._predict_row(row) for row in model_input.to_dict("records")]

    def _predict_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from app.datasets.images import open_image

        prompts, threshold = row.get("prompts"), row.get("threshold")
        with tempfile.NamedTemporaryFile() as file:
            file.write(row["image"])
            file.flush()
            image = open_image(Path(file.name), self.predictor.levels)
        detections = self.predictor.predict(
            image,
            [] if prompts is None else list(prompts),
            threshold=None if threshold is None or pd.isna(threshold) else float(threshold),
        )
        return {
            "boxes_xyxy": detections.boxes_xyxy.tolist(),
            "scores": detections.scores.tolist(),
            "prompts": [detections.prompts[index] for index in detections.prompt_ids],
            "masks": detections.masks,
        }


set_model(Sam3())
