"""The tracker of SAM 3, by upstream's own predictor of films: frames one by one, memory bounded.

A folder of `export --format sam3` holds the tuned detector beside the published tracker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image

from app.datasets.square import to_square
from app.errors import UserError
from app.inference.masks import to_rle
from app.inference.postprocess import THRESHOLD
from app.inference.predictor import normalise
from app.inference.settings import Settings
from app.inference.tracks import NEW, Box, Sighting
from app.model import published, weights
from app.model.device import choose_device
from app.model.upstream import video

Item = TypeVar("Item")
PRECISIONS = ("auto", "bf16")


def propagating(settings: Settings) -> Callable[[], Propagator[Any]]:
    """Return what makes a propagator for each film, of one model.

    Args:
        settings: whose checkpoint is a file of SAM 3 with its tracker, or a folder of
            `export --format sam3`.

    Raises:
        UserError: other weights, or a precision that upstream's tracker does not run in.
    """
    model = load(settings)
    return lambda: Propagator(model, settings.prompts)


def load(settings: Settings) -> Any:
    """Return upstream's model; a new object must reach the settings' threshold."""
    if settings.precision not in PRECISIONS:
        raise UserError(
            f"--engine sam3: runs in bf16, as upstream does, and not in {settings.precision}"
        )
    file = weights.find_file(Path(settings.checkpoint))
    state = weights.read_tensors(file)
    if published.release(state) != "3.0":
        raise UserError(
            f"--engine sam3: {file} holds no tracker of SAM 3. Make a file that does of weights "
            f"that began as Meta's sam3.pt: python -m app export {settings.checkpoint} --format "
            "sam3 --output outputs/sam3, and give --checkpoint outputs/sam3"
        )
    try:
        model = video.build(state, choose_device(settings.device))
    except RuntimeError as error:
        lines = [line.strip()[:500] for line in str(error).splitlines()[1:4]]
        raise UserError(
            [f"{file}: upstream's build_sam3_video_model refuses it:", *lines]
        ) from None
    threshold = THRESHOLD if settings.threshold is None else settings.threshold
    model.new_det_thresh, model.score_threshold_detection = threshold, threshold / NEW
    return model


class Propagator(Generic[Item]):
    """Follows prompts through frames, as `tracks.Tracker` follows detections.

    Args:
        model: as `load` returns it; several films may share it.
        prompts: noun phrases, each followed by itself.
    """

    def __init__(self, model: Any, prompts: Sequence[str]) -> None:
        self.labels: dict[int, int] = {}  # of each object that was told: its prompt
        self._model, self._prompts = model, prompts
        self._sessions: list[video.Session] = []
        self._tracks: dict[tuple[int, int], int] = {}  # prompt and its object → track
        self._waiting: deque[tuple[Item, list[Any]]] = deque()

    def update(self, item: Item, image: Image.Image) -> list[tuple[Item, list[Sighting]]]:
        """Take the next frame; return the frame that is known by now, if one is."""
        model = self._model
        if not self._sessions:
            self._sessions = [
                video.Session(model, prompt, image.height, image.width) for prompt in self._prompts
            ]
        pixels = normalise(to_square(image, model.tracker.image_size).to(model.device))
        features = video.encode(model, pixels)
        found = [session.take(pixels, features) for session in self._sessions]
        self._waiting.append((item, found))
        return [self._tell()] if len(self._waiting) >= model.hotstart_delay else []

    def finish(self) -> list[tuple[Item, list[Sighting]]]:
        """Return the frames that are left: there are no more."""
        return [self._tell() for _ in range(len(self._waiting))]

    def _tell(self) -> tuple[Item, list[Sighting]]:
        item, found = self._waiting.popleft()
        sightings = []
        for label, (session, one) in enumerate(zip(self._sessions, found, strict=True)):
            objects = session.tell(one)
            for id, score, box, mask in zip(
                objects["out_obj_ids"].tolist(),
                objects["out_probs"].tolist(),
                objects["out_boxes_xywh"].tolist(),
                objects["out_binary_masks"],
                strict=True,
            ):
                track = self._tracks.setdefault((label, id), len(self._tracks) + 1)
                self.labels[track] = label
                sightings.append(
                    Sighting(track, label, _corners(box, *mask.shape), score, to_rle(mask))
                )
        return item, sightings


def _corners(box: Sequence[float], height: int, width: int) -> Box:
    """Return x1, y1, x2, y2 in pixels of a box xywh, 0..1."""
    x, y, w, h = box
    return x * width, y * height, (x + w) * width, (y + h) * height
