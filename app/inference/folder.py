"""Images on disk → overlays and one predictions.json."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.config import load_model_config
from app.datasets.images import EXTENSIONS, open_image
from app.errors import UserError
from app.files import atomic_path, write_json
from app.inference.outputs import coco_results, draw_detections
from app.inference.predictor import Predictor, check_prompts
from app.model import weights
from app.model.build import build_model
from app.model.device import choose_device, choose_precision

log = logging.getLogger("app")
RESULTS = "predictions.json"
THRESHOLD = 0.5  # where the weights say none


def predict_folder(
    source: str,
    checkpoint: str,
    output: Path,
    *,
    prompts: Sequence[str],
    boxes: Sequence[str],
    threshold: float | None,
    max_detections: int,
    size: str | None,
    resolution: int | None,
    device: str,
    precision: str,
    overwrite: bool,
) -> list[str]:
    """Predict on every image that `source` stands for; see `python -m app infer --help`.

    Returns:
        What went wrong with single images: one bad image costs only itself.

    Raises:
        UserError: anything that concerns the whole, before anything is written.
    """
    images = find_images(source)
    boxes_xywh = [parse_box(text) for text in boxes]
    check_prompts(prompts, boxes_xywh)
    if (output / RESULTS).exists() and not overwrite:
        raise UserError(
            f"--output-dir {output}: holds {RESULTS} already. Replace it with --overwrite, or name "
            "another folder."
        )
    predictor = _predictor(checkpoint, size, resolution, device, precision)
    if threshold is None:
        threshold = _threshold(checkpoint)
    begun = time.monotonic()
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for image_id, (path, name) in enumerate(zip(images, _names(images), strict=True), start=1):
        try:
            image = open_image(path)
            detections = predictor.predict(
                image,
                prompts,
                boxes_xywh=boxes_xywh,
                threshold=threshold,
                max_detections=max_detections,
            )
        except UserError as error:
            failed += error.problems
            continue
        category_ids = list(range(1, len(detections.prompts) + 1))
        for result in coco_results(detections, image_id, category_ids):
            prompt = detections.prompts[result["category_id"] - 1]
            results.append({**result, "file_name": path.name, "prompt": prompt})
        with atomic_path(output / name) as temporary:
            draw_detections(image, detections).save(temporary)
        log.info("%s: %d found → %s", path.name, len(detections), output / name)
    if len(failed) == len(images):
        raise UserError(failed)
    write_json(output / RESULTS, results)
    for problem in failed:
        log.error("failed: %s", problem)
    done = len(images) - len(failed)
    log.info(
        "%d of %d images, %d objects, in %.1f s and %s: %s",
        done,
        len(images),
        len(results),
        time.monotonic() - begun,
        str(predictor.precision).removeprefix("torch."),
        output / RESULTS,
    )
    return failed


def find_images(source: str) -> list[Path]:
    """The images that a file, a folder or a glob stands for, in the order of their names."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS]
    else:
        if "://" in source:
            raise UserError(
                f"--input {source}: addresses are not fetched; download the image first"
            )
        matches = (Path(name) for name in glob.glob(source, recursive=True))  # noqa: PTH207
        found = [p for p in matches if p.suffix.lower() in EXTENSIONS]
    if not found:
        what = "no images in this folder" if path.is_dir() else "no such file, folder or glob"
        raise UserError(f"--input {source}: {what} (images end in {', '.join(EXTENSIONS)})")
    return sorted(found)


def parse_box(text: str) -> tuple[float, float, float, float]:
    """`x,y,w,h` in pixels; raises UserError."""
    try:
        x, y, w, h = (float(side) for side in text.split(","))
    except ValueError:
        raise UserError(f"--box {text}: give four numbers, x,y,w,h in pixels") from None
    if not (w > 0 and h > 0):
        raise UserError(f"--box {text}: width and height must be above 0")
    return x, y, w, h


def _predictor(
    checkpoint: str, size: str | None, resolution: int | None, device: str, precision: str
) -> Predictor:
    if checkpoint != "none":
        return Predictor.load(
            checkpoint, device=device, precision=precision, size=size, resolution=resolution
        )
    changes = [f"model.resolution={resolution}"] if resolution else []
    config = load_model_config(size or "nano", changes)
    log.info("weights: random; what is found means nothing")
    torch.manual_seed(0)
    target = choose_device(device)
    model = build_model(config).to(target)
    return Predictor(model, config, choose_precision(precision, target, config))


def _threshold(checkpoint: str) -> float:
    """The threshold that the weights were calibrated to, or the usual one; says which."""
    header = weights.read_header(Path(checkpoint)) if checkpoint != "none" else None
    if header is None or header.threshold is None:
        log.info("threshold: %g (--threshold decides by hand)", THRESHOLD)
        return THRESHOLD
    log.info(
        "threshold: %.3f, the best on the validation images (--threshold decides by hand)",
        header.threshold,
    )
    return header.threshold


def _names(images: Sequence[Path]) -> list[str]:
    """Overlay names: the stem, or the whole name where two images share a stem."""
    stems = [path.stem for path in images]
    names = [p.stem if stems.count(p.stem) == 1 else p.name for p in images]
    return [
        f"{name}.png" if names.count(name) == 1 else f"{name}.{index}.png"
        for index, name in enumerate(names, start=1)
    ]
