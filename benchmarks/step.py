"""A training step and a prediction, beside upstream's own Trainer and processor, in one run.

Both sides have the same size, batch, images and device, each in a process of its own, twice, the
better time counting. Prints seconds and peak memory; exits 1 where ours is slower or takes more.

    .venv/bin/python -m benchmarks.step                              # nano
    .venv/bin/python -m benchmarks.step --size small --resolution 336 --batch 1
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate

from app.config import ModelConfig, load_config
from app.datasets.build import load_splits
from app.datasets.images import open_image
from app.datasets.shapes import make_shapes
from app.inference.predictor import Predictor
from app.model.build import build_model
from app.model.device import choose_device
from app.training import upstream_trainer
from app.training.loop import Loop, build_accelerator
from benchmarks.init import query_dataset

SIDES = ("ours", "upstream")


def measure(side: str, work: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds an update or image, after a warm-up, and the process's peak memory in MB."""
    torch.manual_seed(0)
    run = {"train": _train, "predict": _predict}[work](side, arguments, folder)
    run()  # warm-up
    begun = time.perf_counter()
    count = run()
    seconds = (time.perf_counter() - begun) / count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds, "peak_mb": peak}


def _settings(arguments: argparse.Namespace) -> list[str]:
    settings = [f"model={arguments.size}", f"training.batch_size={arguments.batch}"]
    return settings + ([f"model.resolution={arguments.resolution}"] if arguments.resolution else [])


def _train(side: str, arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    config = load_config([*_settings(arguments), "transforms=none"])  # the same on both sides
    if side == "upstream":
        return _upstream_epoch(config.model, arguments, folder)
    device = choose_device()
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    data = query_dataset(config, folder)
    accelerator = build_accelerator(device)
    loop = Loop(config, model, data, accelerator, lr_scale=0.1)
    return lambda: len(list(loop.run_epoch(0)))


def _upstream_epoch(
    model: ModelConfig, arguments: argparse.Namespace, folder: Path
) -> Callable[[], int]:
    flags = {
        "training.batch_size": str(arguments.batch),
        "output_dir": str(folder / "upstream"),
        "dataset.dir": str(folder),
        "scratch.num_workers": "0",
        "trainer.mode": "train_only",
        "model.resolution": str(model.resolution),
    }
    config = upstream_trainer.prepare(upstream_trainer.BASE_CONFIG, flags, arguments.size, None)
    for transform in config.scratch.train_transforms:
        if "sizes" in transform:
            transform.sizes.smallest = 1.0
    splits = upstream_trainer.read_splits(config, flags)
    upstream_trainer.write_dataset(config, splits, folder / "upstream")
    upstream_trainer.join_process_group()
    trainer = instantiate(config.trainer, _recursive_=False)

    def epoch() -> int:
        trainer.train_epoch(trainer.train_dataset.get_loader(epoch=0))
        return len(splits.train.images) // arguments.batch

    return epoch


def _predict(side: str, arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    config = load_config(_settings(arguments)).model
    device = choose_device()
    model = build_model(config).to(device).eval()
    images = [open_image(image.path) for image in load_splits(folder).train.images[:4]]
    if side == "ours":
        predictor = Predictor(model, config)
        return lambda: len([predictor.predict(image, ["circle"]) for image in images])
    from sam3.model.sam3_image_processor import Sam3Processor

    processor = Sam3Processor(model, config.resolution, device=device.type)

    def upstream() -> int:
        for image in images:
            processor.set_text_prompt("circle", processor.set_image(image))
        return len(images)

    return upstream


def _child(side: str, work: str, arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    words = [f"--size={arguments.size}", f"--batch={arguments.batch}", f"--child={side}:{work}"]
    words += [f"--folder={folder}", f"--images={arguments.images}"]
    words += [f"--resolution={arguments.resolution}"] if arguments.resolution else []
    command = [sys.executable, "-m", "benchmarks.step", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        logging.disable()
        side, work = arguments.child.split(":")
        print(json.dumps(measure(side, work, arguments, Path(arguments.folder))))
        return 0
    reached = True
    with tempfile.TemporaryDirectory() as folder:
        make_shapes(Path(folder) / "set", train=arguments.images, valid=1)
        for work in ("train", "predict"):
            best = {}
            for side in SIDES:
                runs = [_child(side, work, arguments, f"{folder}/set") for _ in range(2)]
                best[side] = {key: min(run[key] for run in runs) for key in runs[0]}
            for key, unit in (("seconds", "s"), ("peak_mb", "MB")):
                ours, theirs = best["ours"][key], best["upstream"][key]
                reached &= round(ours / theirs, 2) <= 1
                print(
                    f"{arguments.size} {work} {key}: ours {ours:.4g} {unit}, "
                    f"upstream {theirs:.4g} {unit}, ratio {ours / theirs:.2f} (goal at most 1.00)"
                )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
