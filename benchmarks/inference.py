"""Images a second and memory, ours beside upstream's Sam3Processor; exits 1 below the goals.

    .venv/bin/python -m benchmarks.inference --checkpoint outputs/overfit/run/weights/best
    .venv/bin/python -m benchmarks.inference --model sam3 --images 1 --precision bf16

Each side has a process of its own and is warmed up on an image that is not timed: it has seen the
prompts, whose text features ours keeps, and none of the images. Ours ends with encoded masks,
upstream's with masks as tensors. In float32 both must find the same.

Without --checkpoint the weights are random, and so are the masks: noise over half the image, an
outline everywhere, which is all that ours looks at. The threshold is one that some 20 detections a
prompt pass.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from sam3.model.sam3_image_processor import Sam3Processor
from torch.nn import functional as F

from app.config.compose import load_model_config
from app.datasets.images import open_image
from app.datasets.synthetic.shapes import make_shapes
from app.inference import Detections, Predictor
from app.inference.masks import encode_masks
from app.model.build import build_model
from app.model.device import autocast, choose_device, choose_precision

GOALS = {1: 1.1, 20: 1.5}  # times upstream's speed, by the number of prompts
COMPARED = 2  # images
TOLERANCE = 1e-4  # fp32: of scores, of boxes by the image's side, of masks by their pixels
DISCS = {"small": (0.02, 0.09), "large": (0.2, 0.45)}  # their radius, in sides
MASKS_MS = {  # one core, 100 masks; by their kind, height and width
    **{("small", 1008, 1008): 40, ("large", 1008, 1008): 100},
    **{("small", 3000, 4000): 250, ("large", 3000, 4000): 500},
}
FOUND = 20  # detections a prompt


@dataclass(frozen=True)
class Side:
    """The results of one side.

    Attributes:
        threshold: least score.
        speed: images a second.
        memory: peak of the process and of the GPU, GB.
        found: in the first images, prompt by prompt.
    """

    threshold: float
    speed: float
    memory: str
    found: list[list[Detections]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="of random weights")
    parser.add_argument("--checkpoint", help="trained weights")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, sides = Path(name) / "set", {"width": 1024, "height": 768}
        make_shapes(folder, train=options.images + 1, valid=0, fog=0, seed=0, **sides)
        missed = [p for p, goal in GOALS.items() if compare(options, folder, p) < goal]
    sys.exit(0 if masks_alone() and not missed else 1)


def compare(options: argparse.Namespace, folder: Path, count: int) -> float:
    """Print what both sides take for so many prompts; returns the ratio of their speeds.

    Exits where they find different things.
    """
    ours = _in_a_process(options, folder, count, None)
    theirs = _in_a_process(options, folder, count, ours.threshold)
    for one, other in zip(ours.found, theirs.found, strict=True):
        alike = [_agree(*pair, ours.threshold) for pair in zip(one, other, strict=True)]
        if options.precision == "fp32" and not all(alike):
            sys.exit(f"{count} prompt(s): not what upstream finds")
    ratio = ours.speed / theirs.speed
    print(
        f"{count} prompt(s): {ours.speed:.2f} images a second, upstream {theirs.speed:.2f}: "
        f"{ratio:.2f} times (goal {GOALS[count]})\n"
        f"  peak memory {ours.memory}, upstream {theirs.memory}",
        flush=True,
    )
    return ratio


def _in_a_process(*arguments: Any) -> Side:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def measure(options: argparse.Namespace, folder: Path, count: int, threshold: float | None) -> Side:
    """Measure ours, which chooses the threshold, or upstream's at that threshold."""
    predictor = _predictor(options)
    prompts = [f"thing number {index}" for index in range(count)]
    spare, *images = [open_image(path) for path in sorted(folder.rglob("*.png"))]
    if threshold is None:
        best = predictor.predict(spare, prompts, threshold=0.0, max_detections=FOUND * count)
        threshold = float(best.scores[-1])
        find = _ours(predictor, prompts, threshold)
    else:
        find = _theirs(predictor, prompts, threshold)
    find(spare)
    begun = time.monotonic()
    for image in images:
        find(image)
    speed = len(images) / (time.monotonic() - begun)
    memory = _peak(predictor.device)
    found = [find(image, kept=True) for image in images[:COMPARED]]
    return Side(threshold, speed, memory, found)


def _predictor(options: argparse.Namespace) -> Predictor:
    choice = {"device": options.device, "precision": options.precision}
    if options.checkpoint:
        return Predictor.load(options.checkpoint, **choice)
    torch.manual_seed(0)
    config = load_model_config(options.model)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device, config)
    return Predictor(build_model(config).to(device), config, precision)


def _ours(
    predictor: Predictor, prompts: list[str], threshold: float
) -> Callable[..., list[Detections]]:
    def find(image: Image.Image, kept: bool = False) -> list[Detections]:
        limit = len(prompts) * 1000
        found = predictor.predict(image, prompts, threshold=threshold, max_detections=limit)
        of_each = range(len(prompts)) if kept else ()
        return [found.select(np.flatnonzero(found.prompt_ids == prompt)) for prompt in of_each]

    return find


def _theirs(
    predictor: Predictor, prompts: list[str], threshold: float
) -> Callable[..., list[Detections]]:
    processor = Sam3Processor(
        predictor.model,
        predictor.config.resolution,
        device=str(predictor.device),
        confidence_threshold=threshold,
    )

    @autocast(predictor.device, predictor.precision)
    def find(image: Image.Image, kept: bool = False) -> list[Detections]:
        state = processor.set_image(image)
        found = []
        for prompt in prompts:
            answer = processor.set_text_prompt(prompt, state)
            answer["scores"].cpu()  # waits for the GPU
            if kept:
                found.append(_detections(answer, prompt, image))
            processor.reset_all_prompts(state)
        return found

    return find


def _detections(answer: dict[str, Any], prompt: str, image: Image.Image) -> Detections:
    masks = answer["masks"][:, 0].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    scores = answer["scores"].float().cpu().numpy()
    return Detections(
        boxes_xyxy=answer["boxes"].float().cpu().numpy().clip(0, [*image.size, *image.size]),
        scores=scores,
        prompt_ids=np.zeros(len(scores), dtype=np.int64),
        prompts=(prompt,),
        masks=coco_mask.encode(np.asfortranarray(masks)),
        width=image.width,
        height=image.height,
    )


def _agree(ours: Detections, theirs: Detections, threshold: float) -> bool:
    """Return whether each has its like on the other side, but for those at the very threshold."""
    far = np.abs(ours.boxes_xyxy[:, None] - theirs.boxes_xyxy).max(2)  # (N, M) pixels
    like = np.abs(ours.scores[:, None] - theirs.scores) <= TOLERANCE
    like &= far <= TOLERANCE * max(ours.width, ours.height)
    overlaps = coco_mask.iou(ours.masks, theirs.masks, [0] * len(theirs))
    iou = np.reshape(overlaps, like.shape)
    areas = coco_mask.area(ours.masks)[:, None] + coco_mask.area(theirs.masks).astype(float)
    like &= areas * (1 - iou) / (1 + iou) <= 1 + TOLERANCE * areas  # pixels in one mask alone
    sure = [side.scores > threshold + TOLERANCE for side in (ours, theirs)]
    return bool(like.any(1)[sure[0]].all() and like.any(0)[sure[1]].all())


def _peak(device: torch.device) -> str:
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if device.type != "cuda":
        return f"{process:.2f} GB"
    return f"{process:.2f} GB, of the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"


def masks_alone() -> bool:
    """Print the milliseconds of one core for 100 masks; returns whether the goals are reached.

    Both small masks and large ones, in images of the model's size and of 12 megapixels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reached = True
    for (kind, height, width), goal in MASKS_MS.items():
        logits = discs(100, 288, *DISCS[kind])
        ours = _milliseconds(partial(encode_masks, logits.numpy(), height, width))
        plain = 10 * _milliseconds(partial(_encoded_plainly, logits[:10], height, width))
        print(
            f"100 {kind} masks encoded at {width} x {height} in {ours:.0f} ms (goal {goal}), "
            f"plainly in {plain:.0f}"
        )
        reached &= ours <= goal
    torch.set_num_threads(threads)
    return reached


def _encoded_plainly(logits: torch.Tensor, height: int, width: int) -> None:
    whole = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)
    binary = (whole[:, 0].sigmoid() > 0.5).permute(1, 2, 0).numpy().astype(np.uint8)
    coco_mask.encode(np.asfortranarray(binary))


def _milliseconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def discs(count: int, side: int, least: float = 0.02, most: float = 0.09) -> torch.Tensor:
    """Return logits of discs anywhere, some cut off by the edge, with uneven outlines.

    Args:
        least, most: radius, in sides.
    """
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    center = torch.rand(count, 2, 1, 1, generator=random) * side
    radius = side * (least + (most - least) * torch.rand(count, 1, 1, generator=random))
    distance = ((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2).sqrt()
    noise = torch.randn(count, side, side, generator=random)
    return ((radius - distance) * 1.5 + 0.3 * noise).clamp(-20, 20)


if __name__ == "__main__":
    main()
