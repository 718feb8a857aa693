"""Measure training: time and memory of each method, beside upstream's own Trainer in one run.

Everything is measured in a process of its own. Exits 1 where a goal is missed.

    .venv/bin/python -m benchmarks.training                          # nano, all but `cached`
    .venv/bin/python -m benchmarks.training methods --size small --resolution 336 --batch 1
        --images 1
    .venv/bin/python -m benchmarks.training cached --size sam3 --batch 1 --images 2
    .venv/bin/python -m benchmarks.training planning --size sam3 --batch 8
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.utils import instantiate

from app.__main__ import main as app
from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.synthetic.shapes import make_shapes
from app.model import weights
from app.model.build import build_model
from app.model.device import choose_device, choose_precision
from app.training import checkpoints, features, method
from app.training.batches import Batches
from app.training.losses import LabelLosses
from app.training.prepare import Request
from app.training.step import Step, StepResult, build_accelerator
from app.upstream_trainer.adapt import prepare
from app.upstream_trainer.data import read_datasets, write_datasets
from app.upstream_trainer.run import join_process_group
from app.upstream_trainer.schema import BASE_CONFIG
from benchmarks.init import query_dataset

METHODS = ("full", "head", "lora-minimal", "lora", "lora-full")
FASTER = 1.2  # times upstream's speed, with as much memory or less
CACHED = 4.0  # times the speed of the same step with the trunk computed
SAVING = 0.02  # of an epoch
EPOCH = 300  # images, for what an epoch takes
PLANNED = 0.15  # of what was measured
PLANNING = 20  # seconds
NOT_RECOMPUTING = "full, not recomputing"
ROUNDS = 2  # of each measurement that another is compared with; the better counts


def methods(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Measure a step by each method.

    Each recomputes in the backward pass, as upstream does, but for one: nano's default.
    """
    best = {}
    nano = [NOT_RECOMPUTING] if arguments.size == "nano" else []
    for name in ("upstream", *METHODS, *nano):
        runs = [_child("step", arguments, folder, name) for _ in range(ROUNDS)]
        best[name] = {key: min(run[key] for run in runs) for key in runs[0]}
        seconds, peak = best[name]["seconds"], best[name]["peak_mb"]
        print(f"{arguments.size} {name}: {seconds:.3f} s a step, {peak:.0f} MB", flush=True)
    ours, theirs = best["full"], best["upstream"]
    faster, memory = theirs["seconds"] / ours["seconds"], ours["peak_mb"] / theirs["peak_mb"]
    print(f"full: {faster:.2f} times upstream's speed (goal {FASTER})")
    print(f"full: {memory:.2f} times upstream's memory (goal at most 1.00)")
    yield round(faster, 2) >= FASTER
    yield round(memory, 2) <= 1


def cached(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Measure methods that leave the trunk frozen, with its features from disk, beside without."""
    for name in ("head", "lora-minimal"):
        found = _child("kept", arguments, folder, name)
        ratio = found["plain"] / found["cached"]
        print(
            f"{arguments.size} {name}: {found['cached']:.2f} s a step from features on disk, "
            f"{found['plain']:.2f} s without: {ratio:.1f} times (goal {CACHED:.0f})\n"
            f"  {found['disk_mb']:.1f} MB on disk an image, {found['peak_mb']:.0f} MB of memory",
            flush=True,
        )
        yield ratio >= CACHED


def checkpoint(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Measure a checkpoint beside an epoch."""
    found = _child("save", arguments, folder)
    epoch = found["seconds"] * EPOCH / arguments.batch
    share = found["save"] / epoch
    print(
        f"{arguments.size} checkpoint: {found['save']:.2f} s, {share:.1%} of an epoch of {EPOCH} "
        f"images (goal below {SAVING:.0%})"
    )
    yield share < SAVING


def startup(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Time a run to the end of its first update, validation before included."""
    print(f"{arguments.size} first update: {_child('first', arguments, folder)['seconds']:.1f} s")
    yield True


def plan(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Compare `--plan` with the run."""
    words = [*_run(arguments, folder), "--epochs", "1"]
    done = subprocess.run([*words, "--plan"], capture_output=True, text=True, check=True)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("the run failed")
    files = [file for file in (folder / "run").rglob("*") if file.is_file()]
    real = {
        "memory": usage.ru_maxrss * 1024 / 1e9,
        "disk": sum(file.stat().st_size for file in files) / 1e9,
    }
    for name, value in real.items():
        found = re.search(rf"^{name} +([\d.]+) GB", done.stdout, re.MULTILINE)
        assert found is not None, done.stdout
        off = float(found[1]) / value - 1
        print(
            f"{arguments.size} {name}: planned {found[1]} GB, taken {value:.2f} GB: {off:+.0%} "
            f"(goal within {PLANNED:.0%})"
        )
        yield abs(off) <= PLANNED


def planning(arguments: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Time a run to its plan; where it is refused, to the changes that would help."""
    begun = time.monotonic()
    done = subprocess.run([*_run(arguments, folder), "--plan"], capture_output=True, text=True)
    seconds = time.monotonic() - begun
    said = {0: "planned", 2: "refused"}.get(done.returncode) or sys.exit(done.stderr)
    print(f"{arguments.size} {said} in {seconds:.1f} s (goal < {PLANNING})")
    yield seconds < PLANNING


def _settings(arguments: argparse.Namespace) -> list[str]:
    settings = [f"model={arguments.size}", f"training.batch_size={arguments.batch}"]
    settings += [f"model.resolution={arguments.resolution}"] if arguments.resolution else []
    return [*settings, "transforms=none", *arguments.set]  # the same on both sides


def _run(arguments: argparse.Namespace, folder: Path) -> list[str]:
    words = [sys.executable, "-m", "app", "train", "--model", arguments.size, "--checkpoint"]
    words += ["none", "--dataset-dir", str(folder / "set"), "--output-dir", str(folder / "run")]
    return [*words, "evaluation.pictures=0", *_settings(arguments)[1:]]


def make_step(config: Config, folder: Path) -> tuple[Step, Batches]:
    accelerator = build_accelerator(choose_device())
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    method.prepare(model, config.method, pretrained=config.method.name != "full")
    features.cache_prompts(model, features.frozen_encoders(model))
    data = query_dataset(config, folder / "set")
    batches = Batches(config, data, accelerator)
    precision = choose_precision(config.training.precision, accelerator.device, config.model)
    losses = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), precision)
    return Step(config, model, losses, accelerator, batches, lr_scale=0.1), batches


def _step(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the seconds a step after an epoch to warm up, and the process's peak memory in MB."""
    if name == "upstream":
        epoch = _upstream_epoch(arguments, folder)
    else:
        settings = ["method=full"] if name == NOT_RECOMPUTING else [f"method={name}"]
        if arguments.size == "nano" and name != NOT_RECOMPUTING:
            settings.append("model.activation_checkpointing=[vision,masks]")
        step, batches = make_step(load_config([*_settings(arguments), *settings]), folder)
        epoch = lambda: len(time_updates(step, batches))  # noqa: E731
    epoch()
    begun = time.perf_counter()
    count = epoch()
    return {"seconds": (time.perf_counter() - begun) / count, "peak_mb": _peak_mb()}


def _upstream_epoch(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    model = load_config(_settings(arguments)).model
    flags = {
        "training.batch_size": str(arguments.batch),
        "output_dir": str(folder / "upstream"),
        "dataset.dir": str(folder / "set"),
        "scratch.num_workers": "0",
        "trainer.mode": "train_only",
        "model.resolution": str(model.resolution),
        "checkpoint": "none",
    }
    config = prepare(Request([], size=arguments.size, file=BASE_CONFIG), flags)
    for transform in config.scratch.train_transforms:
        if "sizes" in transform:
            transform.sizes.smallest = 1.0
    datasets = read_datasets(config, flags)
    write_datasets(config, datasets, folder / "upstream")
    join_process_group()
    trainer = instantiate(config.trainer, _recursive_=False)

    def epoch() -> int:
        trainer.train_epoch(trainer.train_dataset.get_loader(epoch=0))
        return len(datasets["train"].images) // arguments.batch

    return epoch


def _kept(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Time steps with features from disk and with the encoders computed, in turns."""
    step, batches = make_step(load_config([*_settings(arguments), f"method={name}"]), folder)
    frozen = features.frozen_encoders(step.model)
    encoders = [step.model.get_submodule(features.ENCODERS[part]) for part in frozen]
    items: Any = batches.loader.dataset
    stores = features.cache_encoders(step.model, frozen, folder / name, step.losses.precision)
    items.stores = stores
    reading = [encoder.forward for encoder in encoders]
    time_updates(step, batches)  # writes them
    plain, cached = [], []
    for _ in range(ROUNDS):
        items.stores = stores
        for encoder, forward in zip(encoders, reading, strict=True):
            encoder.forward = forward
        cached += time_updates(step, batches)
        items.stores = ()
        for encoder in encoders:
            del encoder.forward
        plain += time_updates(step, batches)
    files = [file.stat().st_size for file in (folder / name).rglob("*.safetensors")]
    largest = sorted(files)[-len(batches.sampler) :]
    disk = statistics.mean(largest) / 1e6
    return {"plain": min(plain), "cached": min(cached), "disk_mb": disk, "peak_mb": _peak_mb()}


def time_updates(step: Step, batches: Batches) -> list[float]:
    """Return the seconds of each update of an epoch."""
    step.set_training()
    begun, seconds = time.perf_counter(), []
    for group in batches.epoch(0):
        step(group, 0)
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return seconds


def _save(_: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    config = load_config(_settings(arguments))
    step, batches = make_step(config, folder)
    update_seconds = statistics.median(time_updates(step, batches))
    seconds = []
    for update in range(3):
        begun = time.perf_counter()
        checkpoints.save(
            folder / "checkpoints",
            checkpoints.RunState(updates=update),
            step.model,
            weights.Header(model=config.model),
            step,
            fingerprint={},
            random_states=[],
        )
        seconds.append(time.perf_counter() - begun)
    return {"save": statistics.median(seconds), "seconds": update_seconds}


def _first(_: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Time a real run, ended after its first update."""
    update = Step.__call__

    def timed(self: Step, group: Any, epoch: int) -> StepResult:
        update(self, group, epoch)
        print(json.dumps({"seconds": time.time() - psutil.Process().create_time()}), flush=True)
        os._exit(0)

    Step.__call__ = timed  # type: ignore[method-assign]
    sys.argv = ["app", *_run(arguments, folder)[3:]]
    app()
    raise RuntimeError("no update was made")


def _peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _child(
    work: str, arguments: argparse.Namespace, folder: Path, name: str = ""
) -> dict[str, float]:
    words = [f"--size={arguments.size}", f"--batch={arguments.batch}", f"--child={work}:{name}"]
    words += [f"--folder={folder}"]
    words += [f"--resolution={arguments.resolution}"] if arguments.resolution else []
    words += [f"--set={setting}" for setting in arguments.set]
    command = [sys.executable, "-m", "benchmarks.training", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


CHILDREN = {work.__name__[1:]: work for work in (_step, _kept, _save, _first)}
PARTS = {part.__name__: part for part in (methods, checkpoint, startup, plan, planning, cached)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="|".join(PARTS))
    parser.add_argument("--size", default="nano")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        logging.disable()
        work, _, name = arguments.child.partition(":")
        print(json.dumps(CHILDREN[work](name, arguments, arguments.folder)))
        return 0
    reached = True
    for name in arguments.parts or [name for name in PARTS if name != "cached"]:
        with tempfile.TemporaryDirectory() as folder:
            make_shapes(Path(folder) / "set", train=arguments.images, valid=1, fog=0)
            reached &= all(list(PARTS[name](arguments, Path(folder))))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
