"""Images a second, ours beside upstream's Sam3Processor on the same; exits 1 below the goals.

    .venv/bin/python -m benchmarks.inference --checkpoint outputs/overfit/run/weights/best
    .venv/bin/python -m benchmarks.inference --model sam3 --images 1 --precision bf16

Without --checkpoint the weights are random, and so are the masks: noise over half the image, which
costs ours its way of enlarging them only where they are. The threshold is one that some 20
detections a prompt pass. What is found must be the same, in float32. Ours ends with encoded masks,
upstream's with masks as tensors.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from sam3.model.sam3_image_processor import Sam3Processor
from torch.nn import functional as F

from app.config import load_model_config
from app.datasets.images import open_image
from app.datasets.shapes import make_shapes
from app.inference import Predictor
from app.inference.masks import encode_masks
from app.model.build import build_model
from app.model.device import choose_device, choose_precision

GOALS = {1: 1.1, 20: 1.5}  # times upstream's speed, by the number of prompts
TOLERANCE = 1e-4  # of scores, fp32
MASKS_MS = 40  # one core, 100 masks
FOUND = 20  # detections a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="of random weights")
    parser.add_argument("--checkpoint", help="trained weights")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of both")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = load_model_config(options.model)
    if options.checkpoint:
        predictor = Predictor.load(
            options.checkpoint, device=options.device, precision=options.precision
        )
    else:
        device = choose_device(options.device)
        precision = choose_precision(options.precision, device, config)
        predictor = Predictor(build_model(config).to(device), config, precision)
    images = _images(options.images)
    missed = [p for p, goal in GOALS.items() if compare(predictor, images, p) < goal]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.2f} GB", end="")
    on_gpu = predictor.device.type == "cuda"
    print(f", of the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if on_gpu else "")
    sys.exit(1 if masks_alone() > MASKS_MS or missed else 0)


def _images(count: int) -> list[Image.Image]:
    """Shapes on a plain ground, 1024 x 768."""
    with tempfile.TemporaryDirectory() as folder:
        make_shapes(Path(folder) / "set", train=count, valid=0, width=1024, height=768, seed=0)
        return [open_image(path) for path in sorted(Path(folder).rglob("*.png"))]


def compare(predictor: Predictor, images: list[Image.Image], count: int) -> float:
    """Print both speeds; returns the ratio. Exits where they find different things."""
    prompts = [f"thing number {index}" for index in range(count)]
    halved = predictor.precision == torch.bfloat16
    first = predictor.predict(images[0], prompts, threshold=0.0, max_detections=FOUND * count)
    threshold = float(first.scores[-1])
    processor = Sam3Processor(
        predictor.model,
        predictor.config.resolution,
        device=str(predictor.device),
        confidence_threshold=threshold,
    )

    def ours(image: Image.Image) -> np.ndarray:
        limit = len(prompts) * 1000
        return predictor.predict(image, prompts, threshold=threshold, max_detections=limit).scores

    @torch.autocast(predictor.device.type, torch.bfloat16, enabled=halved)
    def theirs(image: Image.Image) -> np.ndarray:
        state = processor.set_image(image)
        scores = []
        for prompt in prompts:
            scores.append(processor.set_text_prompt(prompt, state)["scores"])
            processor.reset_all_prompts(state)
        return torch.cat(scores).sort(descending=True).values.cpu().numpy()

    if not _same(ours(images[0]), theirs(images[0])) and not halved:
        sys.exit(f"{count} prompt(s): not what upstream finds")
    speeds = [len(images) / _seconds(predict, images) for predict in (ours, theirs)]
    ratio = speeds[0] / speeds[1]
    print(
        f"{count} prompt(s): {speeds[0]:.2f} images a second, upstream {speeds[1]:.2f}: "
        f"{ratio:.2f} times (goal {GOALS[count]})",
        flush=True,
    )
    return ratio


def masks_alone() -> float:
    """Print and return the milliseconds of one core for 100 masks, 288 to 1008 pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logits = discs(100, 288)
    ours = _milliseconds(lambda: encode_masks(logits, 1008, 1008))
    plain = _milliseconds(lambda: _encoded_plainly(logits, 1008))
    torch.set_num_threads(threads)
    print(
        f"100 masks encoded at 1008 px in {ours:.0f} ms (goal {MASKS_MS}), plainly in {plain:.0f}"
    )
    return ours


def _encoded_plainly(logits: torch.Tensor, side: int) -> None:
    whole = F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    binary = (whole.sigmoid() > 0.5).permute(1, 2, 0).numpy().astype(np.uint8)
    coco_mask.encode(np.asfortranarray(binary))


def _milliseconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def discs(count: int, side: int) -> torch.Tensor:
    """Logits of discs anywhere, some cut off by the edge, with uneven outlines."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    center = torch.rand(count, 2, 1, 1, generator=random) * side
    radius = side * (0.02 + 0.07 * torch.rand(count, 1, 1, generator=random))
    distance = ((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2).sqrt()
    noise = torch.randn(count, side, side, generator=random)
    return ((radius - distance) * 1.5 + 0.3 * noise).clamp(-20, 20)


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """But for those at the very threshold."""
    shared = min(len(ours), len(theirs))
    few = abs(len(ours) - len(theirs)) <= 1
    return few and np.allclose(ours[:shared], theirs[:shared], atol=TOLERANCE)


def _seconds(predict: Callable[[Image.Image], np.ndarray], images: list[Image.Image]) -> float:
    begun = time.monotonic()
    for image in images:
        predict(image)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
