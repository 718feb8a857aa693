"""The differences between exported graphs and the model that they came from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.console import counted
from app.datasets.coco import Dataset
from app.datasets.square import to_square
from app.deploy.graphs import FEATURES
from app.deploy.precision import TYPES, narrow
from app.deploy.runtime import manifest as manifests
from app.deploy.runtime.golden import cosine_of
from app.deploy.runtime.manifest import Manifest, Tolerance
from app.deploy.runtime.onnx_backend import choose_precisions
from app.deploy.runtime.runtime import Runtime
from app.errors import UserError
from app.evaluation.validate import validate
from app.files import write_json
from app.inference.predictor import Predictor, normalise, query_scores

log = logging.getLogger("app")
ROUNDED = ".rounded"  # in the names of graphs that are made to measure a half, and removed
_REMEDIES = {  # of a precision that is too far from the model
    "fp32": "fp32 should be the model itself: give --images of another kind, and report it.",
    "fp16": "Instead of fp16: bf16, which has fp32's range, or fp32.",
    "bf16": "Instead of bf16: fp16, which rounds less, or fp32.",
    "int8": "For int8: calibrate on more of your images (--images DIR --measure-on 100), train for "
    "longer, as weights of a short run round badly, or take fp16.",
}
Outputs = Mapping[str, NDArray[np.float32]]  # of a pass, by the names of `model_outputs`

# Some three times the differences that were measured on nano and small.
TOLERANCES = {
    "fp32": Tolerance(cosine=0.99999, scores=1e-4, boxes=1e-4, mask_iou=0.999),
    "fp16": Tolerance(cosine=0.999, scores=0.02, boxes=0.01, mask_iou=0.98),
    "bf16": Tolerance(cosine=0.995, scores=0.1, boxes=0.03, mask_iou=0.95),
    "int8": Tolerance(cosine=0.98, scores=0.2, boxes=0.05, mask_iou=0.9),
}


@dataclass(frozen=True)
class Difference:
    """The measured values of what a `Tolerance` limits.

    Attributes:
        cosine: the least cosine of all feature maps.
        scores: the largest difference of a score or of a presence.
        boxes: the largest difference of a box's side, as a share of the image's side.
        mask_iou: the mean IoU of a mask.
        objects: number of boxes and masks that were compared.
        images: number of images.
    """

    cosine: float = 1.0
    scores: float = 0.0
    boxes: float = 0.0
    mask_iou: float = 1.0
    objects: int = 0
    images: int = 0

    def join(self, other: Difference) -> Difference:
        """Return the difference over the images of both."""
        objects = self.objects + other.objects
        iou = self.mask_iou * self.objects + other.mask_iou * other.objects
        return Difference(
            cosine=min(self.cosine, other.cosine),
            scores=max(self.scores, other.scores),
            boxes=max(self.boxes, other.boxes),
            mask_iou=iou / objects if objects else 1.0,
            objects=objects,
            images=self.images + other.images,
        )

    def misses(self, tolerance: Tolerance) -> list[str]:
        """Return `scores 0.3 (at most 0.1)` for each value that is out of bounds, or NaN."""
        problems = []
        for field in fields(tolerance):
            value, limit = getattr(self, field.name), getattr(tolerance, field.name)
            least = field.name in ("cosine", "mask_iou")
            if not (value >= limit if least else value <= limit):
                bound = "at least" if least else "at most"
                problems.append(f"{field.name} {value:.6g} ({bound} {limit:g})")
        return problems

    def to_json(self) -> dict[str, float]:
        """Return the values by name."""
        return asdict(self)


def model_outputs(predictor: Predictor, image: Image.Image, prompts: Sequence[str]) -> Outputs:
    """Return the features and the outputs of the model for one image and P prompts.

    Returns:
        `fpn0`…`fpn2` and `position` (1, D, side, side), `scores` (P, Q), `presence` (P,), `boxes`
        (P, Q, 4) cxcywh, 0..1, and where there is a mask head `masks` (P, Q, h, w) logits.
    """
    features, answers = predictor.answers(image, prompts)
    maps = [*features["backbone_fpn"], features["vision_pos_enc"][-1]]
    outputs = dict(zip(FEATURES, maps, strict=True))
    outputs |= {"scores": query_scores(answers), "boxes": answers["pred_boxes"]}
    outputs["presence"] = answers["presence_logit_dec"].reshape(-1).sigmoid()
    if "pred_masks" in answers:
        outputs["masks"] = answers["pred_masks"]
    return {name: value.float().cpu().numpy() for name, value in outputs.items()}


def compare(
    expected: Outputs, actual: Outputs, *, top: int | None = None, above: float = 0.0
) -> Difference:
    """Return the difference of the graphs' outputs from the model's, of one image.

    Args:
        expected: of the model.
        actual: of the graphs.
        top: number of queries that the graphs return for each prompt, as in `Manifest`.
        above: boxes and masks of queries with a higher score of the model are compared.
    """
    scores, boxes, masks = expected["scores"], expected["boxes"], expected.get("masks")
    if top is not None:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        scores = np.take_along_axis(scores, best, 1)
        boxes = np.take_along_axis(boxes, best[..., None], 1)
        masks = None if masks is None else np.take_along_axis(masks, best[..., None, None], 1)
    is_object = scores > above
    iou = 1.0
    if masks is not None and is_object.any():
        iou = _mean_iou(masks[is_object] > 0, actual["masks"][is_object] > 0)
    return Difference(
        cosine=min(cosine_of(expected[name], actual[name]) for name in FEATURES),
        scores=max(
            _largest(scores, actual["scores"]), _largest(expected["presence"], actual["presence"])
        ),
        boxes=_largest(boxes[is_object], actual["boxes"][is_object]),
        mask_iou=iou,
        objects=int(is_object.sum()),
        images=1,
    )


def graph_outputs(
    runtime: Runtime, image: Image.Image, prompts: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of the graphs, by the names of `model_outputs`."""
    pixels = normalise(to_square(image, runtime.manifest.resolution)).numpy()
    features = runtime.backend.image(pixels)
    return {**features, **runtime.backend.ground(features, *runtime.text(prompts))}


def prompts_by_pass(prompts: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Return all prompts, `count` to a pass, the last pass filled up from the first prompt on."""
    some = prompts or ("object",)
    return [
        tuple(some[index % len(some)] for index in range(first, first + count))
        for first in range(0, len(some), count)
    ]


def measure(
    predictor: Predictor,
    folder: Path,
    manifest: Manifest,
    asked: Sequence[str],
    pictures: Sequence[Image.Image],
    valid: Dataset | None,
    max_detections: int,
) -> dict[str, Any]:
    """Compare each precision with the model; return the differences and AP of those that pass.

    Args:
        folder: the graphs, with the files that the manifest describes.
        asked: precisions that the user wants; fp32 is always there.
        valid: labelled images, for AP.

    Raises:
        UserError: fp32, or all that was asked for, is beyond its tolerance; names each miss.
    """
    passes = prompts_by_pass(manifest.prompts or manifest.classes, manifest.prompts_a_pass)
    reference = _figures(predictor, valid, max_detections)
    parity: dict[str, Any] = {}
    misses: dict[str, list[str]] = {}
    above = best = 0.0  # fp32, the first, must agree on every query; others on detections
    for precision in manifest.tolerances:
        runtime = load_precision(folder, manifest, precision)
        difference = Difference()
        for picture, prompts in zip(pictures, itertools.cycle(passes), strict=False):
            expected = model_outputs(predictor, picture, prompts)
            actual = graph_outputs(runtime, picture, prompts)
            difference = difference.join(compare(expected, actual, top=manifest.top, above=above))
            best = max(best, float(expected["scores"].max()))
        above = manifest.threshold if best > manifest.threshold else 0.0
        row: dict[str, Any] = difference.to_json()
        line = (
            f"{precision}: features' cosine {difference.cosine:.6f}, scores within "
            f"{difference.scores:.2g}, boxes within {difference.boxes:.2g}, mask IoU "
            f"{difference.mask_iou:.4f} of {counted(difference.objects, 'object')} on "
            f"{counted(difference.images, 'image')}"
        )
        for key, value in _figures(runtime, valid, max_detections).items():
            row[key], row[f"model/{key}"] = value, reference[key]
            line += f", {key} {value:.3f} (the model's {reference[key]:.3f})"
        log.info("%s", line)
        if missed := difference.misses(manifest.tolerances[precision]):
            misses[precision] = missed
        else:
            parity[precision] = row
    problems = [f"  {precision}: {miss}" for precision, each in misses.items() for miss in each]
    remedies = [f"  {_REMEDIES[precision]}" for precision in misses]
    if misses and not above:
        remedies.append(
            "  The model finds nothing on these; give --images that show what it knows."
        )
    if "fp32" in misses or not any(precision in parity for precision in asked):
        state = "The graphs are too far from the model; nothing is left of the export:"
        raise UserError([state, *problems, *remedies])
    if misses:
        log.warning("left out, because it is too far from the model: %s", ", ".join(misses))
        for line in (*problems, *remedies):
            log.warning("%s", line)
    return parity


def _figures(
    predictor: Predictor | Runtime, valid: Dataset | None, max_detections: int
) -> dict[str, float]:
    """Return box and mask AP on labelled images; empty where there are none."""
    if valid is None:
        return {}
    figures = validate(predictor, valid, max_detections=max_detections).figures
    return {key: figures[key] for key in ("bbox/AP", "segm/AP") if key in figures}


def load_precision(folder: Path, manifest: Manifest, precision: str) -> Runtime:
    """Load the graphs of one precision as a CPU can run them: a half rounded, in float32.

    Writes the rounded graphs, and a manifest that names them, to `folder`.
    """
    levels = choose_precisions(manifest, "fp32" if precision in TYPES else precision)
    graphs = {graph: manifest.graphs[graph][level] for graph, level in levels.items()}
    files = dict(manifest.files)
    for graph in ("image", "ground") if precision in TYPES else ():
        name = graphs[graph] = f"{graph}{ROUNDED}.onnx"
        narrow(folder / f"{graph}.onnx", folder / name, precision, emulated=True)
        files |= {file.name: manifests.identity(file) for file in folder.glob(f"{name}*")}
    described = replace(
        manifest, graphs={graph: {"fp32": name} for graph, name in graphs.items()}, files=files
    )
    write_json(folder / manifests.FILE, described.to_json())
    return Runtime.load(folder, backend="onnxruntime", precision="fp32")


def _largest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the largest absolute difference; 0 of empty arrays."""
    return float(np.abs(one - other).max(initial=0.0))


def _mean_iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the mean IoU of pairs of masks (N, h, w); 1 for a pair of empty ones."""
    both = (one & other).sum((1, 2))
    either = (one | other).sum((1, 2))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())
