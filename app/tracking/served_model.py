"""The model that MLflow keeps and serves: image bytes and prompts in, what `infer.sh` finds out.

A script, not a pickle: MLflow runs it when it loads the model, and takes what `set_model` is given.
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
    """Weights of this project, by `app.inference.Predictor`."""

    def load_context(self, context: PythonModelContext) -> None:
        from app.inference import Predictor  # here: what logs a model needs no torch

        self.predictor = Predictor.load(context.artifacts["weights"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Find what is asked for in each image.

        Args:
            model_input: a row an image: `image`, bytes of a JPEG or PNG (base64 in JSON); if there,
                `prompts`, noun phrases, else the classes of the weights; `threshold`, 0..1, else
                the weights' own.

        Returns:
            For each row `boxes_xyxy` in pixels, `scores`, `prompts` (a word each) and `masks`,
            compressed COCO RLE; highest score first.
        """
        del context, params
        return [self._answer(row) for row in model_input.to_dict("records")]

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from app.datasets.images import open_image

        prompts, threshold = row.get("prompts"), row.get("threshold")
        with tempfile.NamedTemporaryFile() as file:
            file.write(row["image"])
            file.flush()
            image = open_image(Path(file.name))
        found = self.predictor.predict(
            image,
            [] if prompts is None else list(prompts),
            threshold=None if threshold is None or pd.isna(threshold) else float(threshold),
        )
        return {
            "boxes_xyxy": found.boxes_xyxy.tolist(),
            "scores": found.scores.tolist(),
            "prompts": [found.prompts[index] for index in found.prompt_ids],
            "masks": found.masks,
        }


set_model(Sam3())
