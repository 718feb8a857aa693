"""Prove and measure a GPU, in 8 minutes at most; exits 1 where a goal is missed.

    .venv/bin/python -m benchmarks.gpu                          # all parts, at the full size
    .venv/bin/python -m benchmarks.gpu full predict --json gpu.json
    .venv/bin/python -m benchmarks.gpu --size small             # on a card of 8 GB

Weights are random but for nano's own, so nothing is downloaded. Parts are independent: one that
fails is told, and the next begins. Goals of speed are those of an H100; for another GPU they are in
proportion to the products of matrices that it does in a second, which are measured first.

docs/gpu.md says how to send the table.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from sam3.model.utils.misc import copy_data_to_device

from app.config.compose import load_config, load_model_config
from app.config.schema import Config
from app.console import show_problems
from app.datasets.build import Splits, load_splits
from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError
from app.inference.finder import Query
from app.inference.predictor import Predictor
from app.model.build import build_model
from app.model.bundled import bundled_nano
from app.model.device import autocast, choose_device, choose_precision
from app.model.halves import hold_all
from app.planning.plan import CUDA_CONTEXT, Planner
from app.training import features, method
from app.training.batches import Batches, query_dataset
from app.training.losses import LabelLosses
from app.training.prepare import Prepared, Request
from app.training.step import Step, build_accelerator

ROOT = Path(__file__).resolve().parents[1]
H100 = 798  # TFLOP/s of products in bfloat16, as measured on one
MINUTES = 8
WARMING = 3  # calls that are not timed
PLANNED = (0.9, 1.25)  # of what is taken
COLORS = ["red", "green", "blue", "yellow", "orange"]
KINDS = ["circle", "rectangle", "triangle", "star", "ring"]


@dataclass(frozen=True)
class Figure:
    """A value beside the least and the most that it may be, and that of another program."""

    name: str
    value: float | str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    peer: str = ""

    @property
    def reached(self) -> bool:
        if isinstance(self.value, str):
            return True
        low, high = self.least, self.most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        low, high = self.least, self.most
        if low is not None and high is not None:
            goal = f"{low:g} to {high:g}"
        elif low is not None:
            goal = f">= {low:.4g}"
        else:
            goal = "" if high is None else f"<= {high:.4g}"
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        missed = "" if self.reached else "  MISSED"
        return f"{self.name:46} {value:>12} {self.unit:9} {goal:14} {self.peer}{missed}".rstrip()


@dataclass(frozen=True)
class Bench:
    """Hold what parts have in common.

    Attributes:
        folder: to write in.
        size: of the model that stands for the full one.
        rounds: timed calls, whose median counts.
        device: the GPU.
    """

    folder: Path
    size: str
    rounds: int
    device: torch.device

    @functools.cached_property
    def speed(self) -> float:
        """Return the TFLOP/s of products of matrices in the GPU's own half precision."""
        half = self.precision(load_config(["model=nano"]))
        side = 8192
        a = torch.ones(side, side, device=self.device, dtype=half)
        return 2 * side**3 / self.milliseconds(lambda: a @ a) / 1e9

    def precision(self, config: Config) -> torch.dtype:
        return choose_precision(config.training.precision, self.device, config.model)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Return the median time of a call, to the end of what it launches."""
        for _ in range(WARMING):
            work()
        seconds = []
        for _ in range(self.rounds):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return 1000 * statistics.median(seconds)

    def shapes(self, classes: int) -> Splits:
        """Return drawn images of three classes or of 25."""
        folder = self.folder / f"shapes-{classes}"
        many = {"label_by": "both", "kinds": KINDS, "colors": COLORS} if classes > 3 else {}
        if not folder.exists():
            make_shapes(folder, train=20, valid=6, width=320, height=240, seed=3, **many)
        return load_splits(folder)


def machine(bench: Bench) -> Iterator[Figure]:
    """Say what is here, and how fast it is by itself."""
    yield Figure("GPU", torch.cuda.get_device_name())
    yield Figure("torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    yield Figure("memory", torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")
    yield Figure("products in half precision", bench.speed, "TFLOP/s", peer=f"H100: {H100}")
    source = torch.empty(1 << 30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = bench.milliseconds(lambda: target.copy_(source))
    yield Figure("memory read and written", 2 * source.nbytes / copied / 1e9, "TB/s")
    few = torch.zeros(1024, device=bench.device)
    begun = time.perf_counter()
    for _ in range(5000):
        torch.add(few, few)
    yield Figure("host: one operation", (time.perf_counter() - begun) / 5e-3, "us")


def nano(bench: Bench) -> Iterator[Figure]:
    """Train nano by the command, resume it, adapt it with a batch size that is found."""
    bench.shapes(3)
    words = ["train", "--dataset-dir", str(bench.folder / "shapes-3"), "--model", "nano"]
    words += ["evaluation.pictures=1", "--output-dir"]
    run, adapted = str(bench.folder / "run"), str(bench.folder / "lora")
    for name, more in {
        "train": [run, "--epochs", "2"],
        "resume": [run, "--epochs", "3", "--resume"],
        "lora, batch auto": [adapted, "--epochs", "1", "--method", "lora", "--batch-size", "auto"],
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "app", *words, *more], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        yield Figure(f"nano {name}: exit code", done.returncode, most=0)
    figures = json.loads((bench.folder / "run" / "metrics.json").read_text())
    yield Figure("nano: mask AP gained", figures["segm/AP"] - figures["baseline/segm/AP"])


def parity(bench: Bench) -> Iterator[Figure]:
    """Compare the CPU with the GPU, both in float32: a prediction, and a step's loss and gradients.

    The losses are those of boxes and scores: those of masks draw their points on each device.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    start, words = bundled_nano(), ["red thing", "cross", "blue circle"]
    assert start is not None
    try:
        found = []
        for device in ("cpu", "cuda"):
            predictor = Predictor.load(start, device=device, precision="fp32")
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            found.append(predictor.predict(image, words, threshold=0.3))
        sides = [_loss_and_gradients(bench, torch.device(name)) for name in ("cpu", "cuda")]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    ours, theirs = found
    difference = abs(len(ours) - len(theirs))
    yield Figure("parity: detections more or less", difference, most=0)
    if len(ours) and not difference:
        a, b = ours.bool_masks(), theirs.bool_masks()
        both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
        boxes, scores = (
            float(np.abs(getattr(ours, name) - getattr(theirs, name)).max())
            for name in ("boxes_xyxy", "scores")
        )
        yield Figure("parity: boxes off by", boxes, "pixels", most=0.5)
        yield Figure("parity: scores off by", scores, most=1e-3)
        yield Figure("parity: masks, IoU", float((both / np.maximum(either, 1)).min()), least=0.99)
    (loss, gradients), (other, others) = sides
    yield Figure("parity: loss off by", abs(other / loss - 1), most=1e-4)
    worst = max(
        float((others[name] - gradient).norm() / gradient.norm())
        for name, gradient in gradients.items()
        if gradient.norm() > 1e-6
    )
    yield Figure("parity: gradients off by", worst, most=1e-2)
    yield Figure("presence, sure: gradient", _gradient_of_sure_presence(bench), most=1e-6)


def _loss_and_gradients(bench: Bench, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Return the loss of nano's first step, and its gradients by name."""
    config, splits = load_config(["transforms=none"]), bench.shapes(3)
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher)).to(device)
    criterion: Any = instantiate(config.loss.criterion, _convert_="all")
    criterion.loss_fns_find = criterion.loss_fns_find[:2]
    method.set_training(model)
    planner = Planner(Prepared(Request(()), config, splits, None, ()))
    batch = planner.heaviest_batch(config)
    generator = torch.Generator().manual_seed(0)
    batch.img_batch = torch.rand(batch.img_batch.shape, generator=generator) * 2 - 1
    losses = LabelLosses(criterion, torch.float32)
    loss = losses(model, copy_data_to_device(batch, device))["loss"]
    loss.backward()
    gradients = {
        n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None
    }
    return float(loss), gradients


def _gradient_of_sure_presence(bench: Bench) -> float:
    """Return the gradient of a presence logit whose sigmoid rounds to 1, and which is right."""
    from sam3.train.loss import loss_fns

    logit = torch.tensor([[20.0]], device=bench.device, requires_grad=True)
    loss = loss_fns.sigmoid_focal_loss(logit, torch.ones_like(logit), 1, 0.5, 0.0)
    [gradient] = torch.autograd.grad(loss, logit)
    return abs(gradient.item())


def full(bench: Bench) -> Iterator[Figure]:
    """Train all of the model: time and memory of an update with masks at the full resolution."""
    theirs = "0.53 on a B200, batch 1 (sam3#189)"
    yield from _update(bench, "full, batch 1", ["training.batch_size=1"], peer=theirs)
    kept = ["training.batch_size=1", "model.activation_checkpointing=false"]
    yield from _update(bench, "full, batch 1, nothing recomputed", kept)
    four = ["training.batch_size=4"]
    yield from _update(bench, "full, batch 4", four, images_per_second=10, peer=theirs)
    yield from _update(bench, "full, 20 prompts", ["training.batch_size=1"], classes=25)
    for name, precision in (("float16", "fp16"), ("float32", "fp32")):
        words = ["training.batch_size=1", f"training.precision={precision}"]
        yield from _update(bench, f"full, {name}", words)


def adapters(bench: Bench) -> Iterator[Figure]:
    """Train less than all of the model, and nano."""
    yield from _update(bench, "lora, batch 1", ["training.batch_size=1", "method=lora"])
    four = ["training.batch_size=4", "model.activation_checkpointing=[masks]"]
    yield from _update(bench, "lora, batch 4", [*four, "method=lora"])
    yield from _update(bench, "head, batch 4", ["training.batch_size=4", "method=head"])
    yield from _update(bench, "nano, batch 8", ["training.batch_size=8"], size="nano")


def _update(
    bench: Bench,
    name: str,
    overrides: Sequence[str],
    *,
    size: str | None = None,
    classes: int = 3,
    images_per_second: float | None = None,
    peer: str = "",
) -> Iterator[Figure]:
    """Measure updates of the heaviest batch, and their memory beside the plan's.

    Args:
        images_per_second: an H100's goal.
    """
    _release()
    of_model = [text for text in overrides if text.startswith("model.")]
    others = [text for text in overrides if text not in of_model]
    model_config = load_model_config(size or bench.size, of_model)
    others += ["training.num_workers=0", "training.cache_features=false"]
    config, splits = load_config(others, None, model_config), bench.shapes(classes)
    planner = Planner(Prepared(Request(()), config, splits, Path("pretrained"), ()))
    planned = planner.plan().memory.total
    step, batch = _step(bench, config, splits), planner.heaviest_batch(config)
    _release()  # what was frozen came there in float32, which a run's does not
    batch.img_batch = torch.rand(batch.img_batch.shape) * 2 - 1
    try:
        milliseconds = bench.milliseconds(lambda: step([batch], 0))
        busy = _busy_milliseconds(lambda: step([batch], 0))
    except torch.OutOfMemoryError:
        yield Figure(name, "out of memory", peer=f"planned {planned / 1e9:.1f} GB")
        return
    speed, images = 1000 / milliseconds, len(batch.img_batch)
    allocated = torch.cuda.max_memory_allocated()
    taken = torch.cuda.max_memory_reserved() + CUDA_CONTEXT
    least = None if images_per_second is None else images_per_second * _share(bench)
    yield Figure(f"{name}: an update", milliseconds, "ms")
    yield Figure(f"{name}: images", images * speed, "a second", least=least, peer=peer)
    yield Figure(f"{name}: GPU busy", busy, "ms")
    yield Figure(f"{name}: allocated", allocated / 1e9, "GB")
    yield Figure(f"{name}: taken", taken / 1e9, "GB")
    yield Figure(f"{name}: planned", planned / taken, "of it", *PLANNED)


def _share(bench: Bench) -> float:
    """Return how fast this GPU is beside an H100; 1 for faster ones."""
    return min(1.0, bench.speed / H100)


def _step(bench: Bench, config: Config, splits: Splits) -> Step:
    accelerator = build_accelerator(bench.device)
    torch.manual_seed(0)
    model = build_model(config.model, device=bench.device, matcher=instantiate(config.loss.matcher))
    method.prepare(model, config.method, pretrained=True)
    features.cache_prompts(model, features.frozen_encoders(model))
    losses = LabelLosses(
        instantiate(config.loss.criterion, _convert_="all"), bench.precision(config)
    )
    batches = Batches(config, query_dataset(config, splits.train), accelerator)
    step = Step(config, model, losses, accelerator, batches, lr_scale=0.001)
    step.set_training()
    return step


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _busy_milliseconds(work: Callable[[], object]) -> float:
    """Return the time of a call's kernels, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1000


def predict(bench: Bench) -> Iterator[Figure]:
    """Predict on images of 1080p that were not seen before."""
    _release()
    config = load_config([], None, load_model_config(bench.size))
    model = build_model(config.model, device=bench.device)
    hold_all(model, bench.precision(config))
    predictor = Predictor(model, config.model, bench.precision(config))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (1080, 1920, 3), dtype=np.uint8)
    turn = iter(range(10**6))

    def image() -> Image.Image:
        return Image.fromarray(np.roll(pixels, next(turn) + 1, axis=1))

    words = [f"thing {number}" for number in range(20)]
    for prompts, images in ((1, 1), (20, 1), (1, 4), (20, 4)):
        torch.cuda.reset_peak_memory_stats()
        milliseconds = bench.milliseconds(
            lambda n=prompts, k=images: predictor.predict_batch([image()] * k, words[:n])
        )
        name = f"predict {prompts} prompt{'s' * (prompts > 1)}, {images} image{'s' * (images > 1)}"
        most = 20 / _share(bench) if prompts == images == 1 else None
        yield Figure(f"{name}: an image", milliseconds / images, "ms", most=most)
        yield Figure(f"{name}: taken", torch.cuda.max_memory_reserved() / 1e9, "GB")
    prepared = predictor.prepare(image())
    query = Query(tuple(words[:1]), (), (), threshold=0.5, max_detections=100)
    launched = bench.milliseconds(lambda: predictor.ground(predictor.encode([prepared]), query))
    # What the host takes to launch it, where that is longer than the GPU's time.
    yield Figure("predict, of a prepared image", launched, "ms", most=25 / _share(bench))
    noise = bench.milliseconds(lambda: predictor.predict(image(), words[:1], threshold=0))
    yield Figure("predict, every query's mask: an image", noise, "ms")


def compiled(bench: Bench) -> Iterator[Figure]:
    """Compile the trunk."""
    _release()
    config = load_config([], None, load_model_config(bench.size))
    side, precision = config.model.resolution, bench.precision(config)
    trunk = build_model(config.model, device=bench.device).eval().backbone.vision_backbone.trunk
    pixels = torch.rand(1, 3, side, side, device=bench.device)

    def seen_by(module: Callable[..., Any]) -> None:
        with torch.no_grad(), autocast(bench.device, precision):
            module(pixels)

    yield Figure("trunk: an image", bench.milliseconds(lambda: seen_by(trunk)), "ms")
    faster = torch.compile(trunk)
    begun = time.perf_counter()
    seen_by(faster)
    torch.cuda.synchronize()
    yield Figure("trunk compiled in", time.perf_counter() - begun, "s")
    yield Figure("trunk compiled: an image", bench.milliseconds(lambda: seen_by(faster)), "ms")


PARTS = {part.__name__: part for part in (machine, nano, parity, full, adapters, predict, compiled)}


def main() -> int:
    """Print the figures of each part; return 1 where one misses its goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="|".join(PARTS))
    parser.add_argument("--size", default="sam3", help="of the model")
    parser.add_argument("--rounds", type=int, default=8, help="timed calls, whose median counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    try:
        device = choose_device("cuda")
    except UserError as error:
        show_problems(error)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.size, arguments.rounds, device)
        figures = []
        for figure in measure(bench, arguments.parts or list(PARTS)):
            print(figure, flush=True)
            figures.append(figure)
            if arguments.json is not None:  # each time, as the last part may not end
                rows = [asdict(each) | {"reached": each.reached} for each in figures]
                arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if all(figure.reached for figure in figures) else 1


def measure(bench: Bench, names: Sequence[str]) -> Iterator[Figure]:
    """Yield the figures of parts, and how long all of them took."""
    begun = time.monotonic()
    for name in names:
        first = time.monotonic()
        try:
            yield from PARTS[name](bench)
            failed = 0
        except Exception:
            traceback.print_exc()
            failed = 1
        yield Figure(f"[{name}] failed", failed, most=0)
        yield Figure(f"[{name}] took", time.monotonic() - first, "s")
    if set(names) == set(PARTS):
        yield Figure("all took", (time.monotonic() - begun) / 60, "minutes", most=MINUTES)


if __name__ == "__main__":
    sys.exit(main())
