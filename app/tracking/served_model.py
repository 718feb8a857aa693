"""The model that MLflow stores and serves: image bytes and prompts → what `infer.sh` finds.

MLflow stores this script, not a pickle. It runs the script to load the model, and takes the object
that `set_model` is given.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

if TYPE_CHECKING:
    from app.datasets.levels import Levels


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
            model_input: one row for each image, with the columns `image`, bytes of a JPEG or PNG,
                or these in base64; optionally `prompts`, noun phrases or one as a text (default:
                the classes of the weights), and `threshold`, 0..1 (default: that of the weights).

        Returns:
            For each row a dict of `boxes_xyxy` in pixels, `scores`, `prompts` (one for each object)
            and `masks`, compressed COCO RLE; highest score first.

        Raises:
            ValueError: names the row and what is wrong with it.
        """
        del context, params
        from app.errors import UserError

        answers = []
        for number, row in enumerate(model_input.to_dict("records")):
            try:
                answers.append(self._predict_row(row))
            except UserError as error:
                raise ValueError(f"row {number}: {error}") from None
        return answers

    def _predict_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompts, threshold = row.get("prompts"), row.get("threshold")
        if prompts is None or isinstance(prompts, float):  # NaN, where other rows have some
            prompts = []
        detections = self.predictor.predict(
            _read_image(row.get("image"), self.predictor.levels),
            prompts if isinstance(prompts, str) else list(prompts),
            threshold=None if threshold is None or pd.isna(threshold) else float(threshold),
        )
        return {
            "boxes_xyxy": detections.boxes_xyxy.tolist(),
            "scores": detections.scores.tolist(),
            "prompts": [detections.prompts[index] for index in detections.prompt_ids],
            "masks": detections.masks,
        }


def _read_image(content: object, levels: Levels | None) -> Image.Image:
    """Return an image of the bytes of a file, or of their base64, as text or as bytes.

    Args:
        levels: of images of more than 8 bits, as the weights know it.

    Raises:
        UserError: it is neither.
    """
    from app.datasets.images import ImageError, open_image
    from app.errors import UserError

    if not isinstance(content, bytes | str) or not content:
        kind = type(content).__name__
        raise UserError(f"image: must be the bytes of a JPEG or PNG, or their base64; it is {kind}")
    with tempfile.NamedTemporaryFile() as file:
        try:
            # The first bytes of an image file are no letters of base64's.
            text = content if isinstance(content, str) else content.decode("ascii")
            text = text.rpartition(",")[2]  # behind "data:image/png;base64,"
            file.write(base64.b64decode("".join(text.split()), validate=True))
        except ValueError:
            if isinstance(content, str):
                raise UserError("image: is text, and no base64; send base64 of a file") from None
            file.write(content)
        file.flush()
        try:
            return open_image(Path(file.name), levels)
        except ImageError as error:
            raise UserError(f"image: cannot be read as an image ({error.reason})") from None


set_model(Sam3())
