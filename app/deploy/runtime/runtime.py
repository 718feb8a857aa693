"""`Runtime.load(folder).predict(image, ["pothole"])`: run an exported folder without torch.

Needs numpy, Pillow and a backend: ONNX Runtime or TensorRT. Tiles, thresholds, NMS and masks are
those of the predictor, by the same code (`app.inference`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
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
from app.inference.concepts import Concept
from app.inference.concepts import check as check_concepts
from app.inference.detections import Detections
from app.inference.finder import Encoded, Prepared, Query, StagedFinder
from app.inference.inputs import Sized
from app.inference.masks import encode_masks
from app.inference.postprocess import Candidates, best_queries, join_passes, to_detections

BACKENDS = ("onnxruntime", "tensorrt")
STAGES = ("pre", "model", "post")


class Backend(Protocol):
    """Runs the graphs of an exported folder.

    Attributes:
        name: one of BACKENDS.
        precision: the one whose tolerance its outputs are held to.
    """

    name: str
    precision: str

    def image(self, pixels: NDArray[np.float32]) -> Mapping[str, Any]:
        """Return the features of an image by name, where they were computed: on the GPU, if any.

        Args:
            pixels: (1, 3, R, R), -1..1.
        """

    def ground(
        self, features: Any, text: NDArray[np.float32], text_mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs of K prompts.

        Args:
            features: as `image` returned them.
            text: (K, L, D).
            text_mask: (K, L), True where there is no token.

        Returns:
            `scores` (K, Q) float32, `presence` (K,), `boxes` (K, Q, 4) cxcywh, 0..1, and where the
            model makes masks `masks` (K, Q, h, w) logits.
        """

    def text(self, tokens: NDArray[np.int64]) -> Texts:
        """Return the features of a prompt (1, L, D), and (1, L), True where there is no token.

        Args:
            tokens: (1, L).
        """


class Runtime(StagedFinder):
    """An exported folder, with the interface of `app.inference.Predictor`.

    Args:
        folder: the exported folder.
        manifest: its manifest.
        backend: has loaded its graphs.
        words: prompts → their features.

    Attributes:
        seconds: stage (pre, model, post) → time spent in it so far.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, words: Words) -> None:
        self.folder, self.manifest, self.backend = folder, manifest, backend
        self.prompts, self.threshold = tuple(manifest.classes), manifest.threshold
        self.levels, self.scores = manifest.levels, manifest.scores
        self.text = words
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._context_length = manifest.context_length

    @classmethod
    def load(
        cls, folder: Path | str, *, backend: str = "auto", precision: str | None = None
    ) -> Runtime:
        """Load an exported folder, after comparing its files with the hashes of its manifest.

        Args:
            backend: onnxruntime, tensorrt, or auto: tensorrt where it is installed.
            precision: fp32, fp16, bf16 or int8; None for the fastest that suits the backend.

        Raises:
            UserError: no such backend or precision, or a file that is not what the manifest says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        loaded = load_backend(folder, manifest, backend, precision)
        if manifest.prompts is None:
            return cls(folder, manifest, loaded, AnyWords(folder, manifest, loaded.text))
        return cls(folder, manifest, loaded, StoredWords(folder, manifest))

    def _tokens(self, prompt: str) -> Sequence[int]:
        """Return all tokens of a prompt; none where its features are stored."""
        return self.text.ids(prompt) if isinstance(self.text, AnyWords) else ()

    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        """Return what is in each image, seen as a whole: a prediction from end to end."""
        self._refuse_boxes(query)
        detections = []
        for image in images:
            with self._timed("pre"):
                prepared = self.prepare(image)
            with self._timed("model"):
                encoded = self.encode([prepared])
            best = self.ground(encoded, query)[0]
            with self._timed("post"):
                detections.append(self.finish(best, query, image))
        return detections

    def _refuse_boxes(self, query: Query) -> None:
        if query.boxes_xywh or query.negative_boxes_xywh:
            raise UserError(
                f"{self.folder}: an exported model takes words, not example boxes; give them to "
                "the weights it was made of (./infer.sh --checkpoint)"
            )

    def prepare(self, image: Image.Image) -> Prepared:
        """Return an image as the image graph's input (1, 3, R, R), -1..1."""
        pixels = to_pixels(to_square(image, self.manifest.resolution))
        return Prepared(pixels, image.width, image.height)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded]:
        """Return the outputs of the image graph for each image."""
        shapes = self.manifest.shapes["image"]  # of the pixels as well
        nbytes = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name != "pixels")
        return [
            Encoded(self.backend.image(image.pixels), image.width, image.height, nbytes)
            for image in images
        ]

    def ground(self, images: Sequence[Encoded], query: Query) -> list[Candidates]:
        """Return the best queries on each image."""
        self._refuse_boxes(query)
        per_pass = self.manifest.prompts_a_pass  # K
        prompts = query.prompts
        with self._timed("pre"):
            filled = [*prompts, *[prompts[0]] * (-len(prompts) % per_pass)]  # whole passes
            text, text_mask = self._texts(filled)  # (P, L, D), (P, L)
        best = []
        for image in images:
            passes = []
            for first in range(0, len(filled), per_pass):
                part = slice(first, first + per_pass)
                with self._timed("model"):
                    outputs = self.backend.ground(image.features, text[part], text_mask[part])
                with self._timed("post"):
                    asked = len(prompts) - first  # behind them are those that fill the pass up
                    passes.append(_choose(outputs, first, asked, query))
            best.append(join_passes(passes, query.max_detections))  # N, the highest score first
        return best

    def _texts(self, prompts: Sequence[str]) -> Texts:
        """Return features (P, L, D) and mask (P, L) of prompts: of words, and of concepts."""
        known = {p: self.concepts[name] for p, name in enumerate(prompts) if name in self.concepts}
        if not known:
            return self.text(prompts)
        width, length = next(iter(known.values())).tokens.shape[1], self._context_length
        features = np.zeros((len(prompts), length, width), dtype=np.float32)
        mask = np.ones((len(prompts), length), dtype=np.bool_)
        if words := [p for p in range(len(prompts)) if p not in known]:
            features[words], mask[words] = self.text([prompts[p] for p in words])
        for place, concept in known.items():
            features[place, : len(concept.tokens)] = concept.tokens
            mask[place, : len(concept.tokens)] = False
        return features, mask

    def _check_concepts(self, concepts: Sequence[Concept]) -> str:
        width = self.manifest.shapes["ground"]["text"][-1]
        return check_concepts(concepts, width, "", self._context_length)

    def finish(self, candidates: Candidates, query: Query, image: Sized) -> Detections:
        """Return candidates as detections of an image, with their masks."""
        masks = None
        if candidates.mask_logits is not None:  # N of (h, w)
            masks = encode_masks(candidates.mask_logits, image.height, image.width)
        return to_detections(candidates, masks, query.prompts, image.width, image.height)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begun = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begun

    def check(self) -> list[str]:
        """Compare this device's outputs with those of the exporter; return each miss.

        Raises:
            UserError: the folder holds no outputs to compare with.
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
    """Load the graphs of a folder.

    Raises:
        UserError: no such backend, or none is installed; and what the backend raises.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(
            f"--backend {name}: there is auto, {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}"
        )
    installed = [each for each in BACKENDS if importlib.util.find_spec(each) is not None]
    if name == "auto":
        if not installed:
            raise UserError(
                "Nothing here runs an exported model: pip install onnxruntime (or onnxruntime-gpu, "
                "with CUDA); on a Jetson use the image of docs/jetson.md, which has TensorRT"
            )
        name = installed[-1]
    if name == "tensorrt":
        from app.deploy.runtime.tensorrt import TensorRTBackend

        return TensorRTBackend(folder, manifest, precision)
    from app.deploy.runtime.onnx_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, manifest, precision)


def _choose(
    outputs: Mapping[str, NDArray[Any]], first: int, asked: int, query: Query
) -> Candidates:
    """Return the highest scores of a pass of K prompts on one image.

    Args:
        outputs: of the ground graph, (K, Q, …).
        first: index of its first prompt among all.
        asked: how many of its prompts were asked for, at most.
    """
    scores = outputs["scores"][:asked]
    prompt_ids, query_ids = best_queries(scores, query.threshold, query.max_detections)
    masks = outputs.get("masks")
    return Candidates(
        scores=scores[prompt_ids, query_ids],
        prompt_ids=prompt_ids + first,
        boxes_cxcywh=outputs["boxes"][prompt_ids, query_ids],
        mask_logits=None if masks is None else list(masks[prompt_ids, query_ids]),
        best_score=float(scores.max()),
    )


def _to_numpy(value: Any) -> NDArray[Any]:
    """Return an array, copied from the GPU where it lies there."""
    array: NDArray[Any] = value if isinstance(value, np.ndarray) else value.numpy()
    return array
