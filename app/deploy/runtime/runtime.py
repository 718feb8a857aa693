"""`Runtime.load(folder).predict(image, ["pothole"])`: an exported folder, without torch.

Needs numpy, Pillow and a backend: ONNX Runtime or TensorRT. Runs on Python 3.10. What comes before
the graphs and after them is the predictor's own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.deploy.runtime.golden import FILE as GOLDEN
from app.deploy.runtime.golden import INPUTS, golden_misses
from app.deploy.runtime.manifest import REMEDY, Manifest, read_manifest
from app.deploy.runtime.square import to_pixels, to_square
from app.deploy.runtime.text import AnyWords, StoredWords, Texts, Words, check_named
from app.errors import UserError, nearest
from app.inference.detections import Detections
from app.inference.inputs import check_prompts
from app.inference.postprocess import Best, best_queries, find_all, to_detections

BACKENDS = ("onnxruntime", "tensorrt")
STAGES = ("pre", "model", "post")


class Backend(Protocol):
    """What runs the graphs of a folder, whose shapes `app.deploy.runtime.manifest` describes.

    Attributes:
        name: of BACKENDS.
        precision: what its answers are held to.
    """

    name: str
    precision: str

    def image(self, pixels: NDArray[np.float32]) -> Mapping[str, Any]:
        """(1, 3, R, R), -1..1 → features by their names, kept where they were computed."""

    def ground(
        self, features: Any, text: NDArray[np.float32], text_mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Features, (K, L, D) and (K, L), True where there is no token → what answers K prompts.

        Returns:
            `scores` (K, Q) float32, `presence` (K,), `boxes` (K, Q, 4) cxcywh, 0..1, and where the
            model makes masks `masks` (K, Q, h, w) logits.
        """

    def text(self, tokens: NDArray[np.int64]) -> Texts:
        """(1, L) → (1, L, D), and (1, L), True where there is no token."""


class Runtime:
    """An exported folder that answers prompts, as `app.inference.Predictor` does.

    Args:
        manifest: of the folder.
        backend: that has loaded its graphs.
        words: what knows its prompts.

    Attributes:
        seconds: stage (pre, model, post) → spent in it so far.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, words: Words) -> None:
        self.folder, self.manifest, self.backend = folder, manifest, backend
        self.text = words
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @classmethod
    def load(
        cls, folder: Path | str, *, backend: str = "auto", precision: str | None = None
    ) -> Runtime:
        """Load an exported folder, proved whole by what its manifest says of each file.

        Args:
            backend: onnxruntime, tensorrt, or auto: tensorrt where it is installed.
            precision: fp32, fp16, bf16 or int8; None: the fastest that the backend should take.

        Raises:
            UserError: no such backend or precision, or a folder that is not what its manifest
                says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        loaded = load_backend(folder, manifest, backend, precision)
        if manifest.prompts is None:
            return cls(folder, manifest, loaded, AnyWords(folder, manifest, loaded.text))
        return cls(folder, manifest, loaded, StoredWords(folder, manifest))

    def predict(
        self,
        image: Image.Image,
        prompts: Sequence[str] = (),
        *,
        threshold: float | None = None,
        max_detections: int = 100,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> Detections:
        """Find what the prompts name in one image.

        Args:
            image: RGB, upright.
            prompts: noun phrases; without any, the classes of the folder.
            threshold: 0..1, least score; None takes the folder's.
            max_detections, nms, tile, overlap: as in `Predictor.predict`.

        Raises:
            UserError: a prompt that is empty, or not in the vocabulary.
        """
        return self.predict_batch(
            [image],
            prompts,
            threshold=threshold,
            max_detections=max_detections,
            nms=nms,
            tile=tile,
            overlap=overlap,
        )[0]

    def predict_batch(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str] = (),
        *,
        threshold: float | None = None,
        max_detections: int = 100,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> list[Detections]:
        """Like `predict`, for several images, one after the other."""
        words = check_prompts(prompts or self.manifest.classes)
        find = functools.partial(
            self._find,
            prompts=words,
            texts=self._passes(words),
            threshold=self.manifest.threshold if threshold is None else threshold,
            max_detections=max_detections,
        )
        return find_all(find, images, nms=nms, tile=tile, overlap=overlap)

    def _passes(self, prompts: Sequence[str]) -> list[Texts]:
        """What the ground graph takes, K prompts each; the last are filled up with the first."""
        count = self.manifest.prompts_a_pass
        with self._timed("pre"):
            filled = [*prompts, *[prompts[0]] * (-len(prompts) % count)]
            features, mask = self.text(filled)
            return [
                (features[start : start + count], mask[start : start + count])
                for start in range(0, len(filled), count)
            ]

    def _find(
        self,
        images: Sequence[Image.Image],
        *,
        prompts: tuple[str, ...],
        texts: Sequence[Texts],
        threshold: float,
        max_detections: int,
    ) -> list[Detections]:
        """What is in each image as a whole."""
        found = []
        for image in images:
            with self._timed("pre"):
                pixels = to_pixels(to_square(image, self.manifest.resolution))
            with self._timed("model"):
                features = self.backend.image(pixels)
            passes = []
            for number, text in enumerate(texts):
                with self._timed("model"):
                    outputs = self.backend.ground(features, *text)
                with self._timed("post"):
                    first = number * self.manifest.prompts_a_pass
                    asked = len(prompts) - first  # behind them are those that fill the pass up
                    passes.append(_best(outputs, first, asked, threshold, max_detections))
            with self._timed("post"):
                found.append(to_detections(passes, prompts, *image.size, max_detections))
        return found

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begun

    def check(self) -> list[str]:
        """What this device misses of what the exporter's graphs answered; nothing where all fits.

        Raises:
            UserError: the folder holds nothing to compare with.
        """
        check_named(self.folder, self.manifest, GOLDEN)
        try:
            with np.load(self.folder / GOLDEN, allow_pickle=False) as content:
                golden = dict(content)
            pixels, text, mask = (golden[name] for name in INPUTS)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.folder / GOLDEN}: cannot be read ({error}). {REMEDY}") from None
        features = self.backend.image(to_pixels(pixels))
        outputs = self.backend.ground(features, text, mask)
        outputs |= {name: _to_numpy(value) for name, value in features.items()}
        return golden_misses(self.manifest, self.backend.precision, golden, outputs)


def load_backend(
    folder: Path, manifest: Manifest, name: str = "auto", precision: str | None = None
) -> Backend:
    """The graphs of a folder, loaded; raises UserError."""
    if name not in ("auto", *BACKENDS):
        raise UserError(
            f"--backend {name}: there is auto, {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}"
        )
    there = [each for each in BACKENDS if importlib.util.find_spec(each) is not None]
    if name == "auto":
        if not there:
            raise UserError(
                "Nothing here runs an exported model: pip install onnxruntime (or onnxruntime-gpu, "
                "with CUDA); on a Jetson use the image of docs/jetson.md, which has TensorRT"
            )
        name = there[-1]
    if name == "tensorrt":
        from app.deploy.runtime.tensorrt import TensorRTBackend

        return TensorRTBackend(folder, manifest, precision)
    from app.deploy.runtime.onnx_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, manifest, precision)


def _best(
    outputs: Mapping[str, NDArray[Any]], first: int, asked: int, threshold: float, limit: int
) -> Best:
    """The highest scores of a pass.

    Args:
        first: index of its first prompt among all.
        asked: how many of its prompts were asked for, at most.
    """
    scores = outputs["scores"][:asked]
    prompts, queries = best_queries(scores, threshold, limit)
    masks = outputs.get("masks")
    return Best(
        scores=scores[prompts, queries],
        prompt_ids=prompts + first,
        boxes=outputs["boxes"][prompts, queries],
        logits=None if masks is None else masks[prompts, queries],
    )


def _to_numpy(value: Any) -> NDArray[Any]:
    """An array, also of what is kept on a GPU."""
    array: NDArray[Any] = value if isinstance(value, np.ndarray) else value.numpy()
    return array
