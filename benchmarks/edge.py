"""Exported graphs in ONNX Runtime beside torch, on the same images in one run.

    .venv/bin/python -m benchmarks.edge              # nano: 3 minutes on 2 cores
    .venv/bin/python -m benchmarks.edge small sam3   # random weights; 20 minutes each
    .venv/bin/python -m benchmarks.edge hf           # full size beside transformers; 10 minutes

Times are those of one image and one prompt; of sam3 those of its features alone. Medians are
compared, each the best of some rounds. int8 has a goal only where the CPU has instructions for it
(VNNI, AMX). Exits 1 where a figure misses its least value.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from app.config.compose import load_model_config
from app.datasets import square
from app.datasets.images import open_image
from app.deploy.graphs import FPN
from app.deploy.precision import quantise
from app.deploy.runtime.golden import cosine_of
from app.deploy.runtime.manifest import FILE, read_manifest
from app.deploy.runtime.runtime import Runtime
from app.deploy.runtime.square import to_pixels, to_square
from app.deploy.transformers_folder import TOLERANCES, differences, our_outputs, their_outputs
from app.files import hash_file, write_json
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model
from benchmarks.compact import PEAK, command
from benchmarks.nano import POTHOLES, Figure, Part, draw, main_of

PROMPT = "circle"
FASTER = {"fp32": 1.3, "int8": 2.0}  # goals: times as fast as torch
SAME_MASKS = 0.98
TIMED = {"small": 3, "sam3": 1}  # images that are timed; of nano all
ROUNDS = {"nano": 5, "small": 2, "sam3": 1}  # the fastest counts: other work only slows down
NANO_MB = 200  # peak memory of the runtime's process
EXPORT_MINUTES, EXPORT_GB = 10, 20
COLD = f"""import sys
from pathlib import Path
from typing import Any
from PIL import Image
from app.deploy.runtime import Runtime
runtime = Runtime.load(Path(sys.argv[1]), precision=sys.argv[2])
runtime.predict(Image.open(sys.argv[3]), ["{PROMPT}"])
"""


def nano(start: Path, folder: Path) -> list[Figure]:
    """Compare the bundled weights."""
    return compare(start, folder, "nano", images=20)


def small(start: Path, folder: Path) -> list[Figure]:
    """Compare small with random weights: 193 M parameters and the text encoder; 672 px."""
    del start
    return compare(alone(random_weights, "small", folder), folder, "small", images=20)


def sam3(start: Path, folder: Path) -> list[Figure]:
    """Compare sam3 with random weights, trunk and neck; 1008 px."""
    del start
    return compare(alone(random_weights, "sam3", folder), folder, "sam3", images=1)


def hf(start: Path, folder: Path) -> list[Figure]:
    """Compare sam3, random in every parameter, with transformers' model of the exported folder."""
    del start
    torch.manual_seed(0)
    config = load_model_config("sam3")
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # of which the box head's last one is zero
            parameter.add_(torch.randn_like(parameter) * 0.02)
    weights.save(model, folder / "weights", weights.Header(model=config))
    del model
    seconds, peak = command(
        "export", folder / "weights", "--format", "hf", "--output", folder / "hf"
    )
    image = Image.effect_noise((320, 240), 60).convert("RGB")
    model, _ = weights.load(folder / "weights")
    ours = our_outputs(model, config, image, PROMPT)
    del model
    measured = differences(ours, their_outputs(folder / "hf", image, PROMPT))
    return [
        Figure(
            "sam3: exported to transformers, minutes",
            seconds / 60,
            EXPORT_MINUTES,
            EXPORT_MINUTES,
            True,
        ),
        Figure("  its peak, GB", peak / 1e9, EXPORT_GB, EXPORT_GB, True),
        *(
            Figure(f"  {name} differ by", value, TOLERANCES[name], TOLERANCES[name], True)
            for name, value in measured.items()
        ),
    ]


def random_weights(size: str, folder: Path) -> Path:
    """Save random weights of a size; return their folder."""
    config = load_model_config(size)
    header = weights.Header(model=config, prompts=[PROMPT])
    return weights.save(build_model(config), folder / "weights", header).parent


def compare(path: Path, folder: Path, size: str, *, images: int) -> list[Figure]:
    """Export weights; return differences, sizes, memory and times."""
    pictures = _pictures(folder, images, photographs=size != "nano")  # nano learned drawn ones
    out = folder / "exported"
    whole = size == "nano"  # masks of random weights are noise, of which int8 keeps few
    flags = ["--prompt", PROMPT, "--images", pictures[0].parent, "--measure-on", images]
    flags += ["--precision", "int8"] if whole else []
    seconds, peak = command("export", path, "--output", out, *flags)
    cosine = None if whole else add_int8(out, pictures)
    manifest = read_manifest(out)
    figures = [
        Figure(f"{size}: exported, minutes", seconds / 60, EXPORT_MINUTES, EXPORT_MINUTES, True),
        Figure("  its peak, GB", peak / 1e9, EXPORT_GB, EXPORT_GB, True),
    ]
    for precision, measured in manifest.parity.items():
        figures += [
            Figure(f"  {precision}: {key}", measured[key]) for key in ("cosine", "scores", "boxes")
        ]
    if whole:
        same = manifest.parity["int8"]["mask_iou"]
        figures.append(Figure("  int8: mask IoU", same, SAME_MASKS, SAME_MASKS))
    else:
        figures.append(Figure("  int8: cosine", cosine))
    for precision in FASTER:
        names = {files.get(precision, files["fp32"]) for files in manifest.graphs.values()}
        size_mb = sum(
            manifest.files[name]["bytes"] for name in manifest.files if _belongs(name, names)
        )
        figures.append(Figure(f"  {precision}: bytes of the model, MB", size_mb / 1e6))
        cold, memory = start_cold(out, precision, pictures[0])
        figures.append(Figure(f"  {precision}: first answer of a new process, seconds", cold))
        limits = (NANO_MB, NANO_MB) if size == "nano" else (None, None)
        figures.append(Figure("    its peak memory, MB", memory / 1e6, *limits, True))
    times = answer_times(path, out, pictures[: TIMED.get(size)], size)
    for name, value in times.items():
        figures.append(Figure(f"  {name}: seconds an image", value))
    goals = dict(FASTER)
    if not multiplies_int8():
        del goals["int8"]
    return figures + [
        Figure(f"  {name}: times torch's speed", times["torch"] / times[name], goal, goal)
        for name, goal in goals.items()
    ]


def add_int8(exported: Path, pictures: list[Path]) -> float:
    """Add graphs in int8 without comparing masks; return the cosine of their features to fp32's."""
    manifest = read_manifest(exported)
    alone(_quantise, exported, pictures, manifest.resolution)
    added = {
        file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        for file in exported.glob("*.int8.onnx*")
    }
    graphs = {
        graph: {**files, "int8": f"{graph}.int8.onnx"} for graph, files in manifest.graphs.items()
    }
    changed = replace(manifest, graphs=graphs, files={**manifest.files, **added})
    write_json(exported / FILE, changed.to_json())
    fp32, int8 = (alone(_features, exported, precision, pictures[0]) for precision in FASTER)
    return min(cosine_of(fp32[name], int8[name]) for name in FPN)


def _quantise(exported: Path, pictures: list[Path], side: int) -> None:
    text, mask = Runtime.load(exported, precision="fp32").text([PROMPT])
    texts = [{"text": text, "text_mask": mask}]
    pixels = (to_pixels(to_square(open_image(file), side)) for file in pictures)
    quantise(exported, pixels, texts)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return `work(*arguments)`, done by a process that ends and frees all its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _features(exported: Path, precision: str, picture: Path) -> dict[str, Any]:
    features = _encode_by(Runtime.load(exported, precision=precision))(open_image(picture))
    return {name: features[name] for name in FPN}


def _pictures(folder: Path, count: int, *, photographs: bool) -> list[Path]:
    """Copy photographs, if wanted and there, or drawn images to a folder of their own."""
    files = sorted((POTHOLES / "train" / "images").glob("*.jpg")) if photographs else []
    if not files:
        draw(folder / "set", train=24, valid=1)
        files = sorted((folder / "set" / "train" / "images").iterdir())
    (folder / "images").mkdir(parents=True)
    return [Path(shutil.copy(picture, folder / "images")) for picture in files[:count]]


def _belongs(name: str, graphs: set[str]) -> bool:
    return name.removesuffix(".data") in graphs or name == "text.npz"


def answer_times(path: Path, exported: Path, pictures: list[Path], size: str) -> dict[str, float]:
    """Return the seconds of an image by torch in float32 and by ONNX Runtime: the best medians."""
    rounds = [
        {"torch": alone(_seconds_by_torch, path, pictures, size)}
        | {name: alone(_seconds_by_onnx, exported, name, pictures, size) for name in FASTER}
        for _ in range(ROUNDS[size])
    ]
    return {name: min(times[name] for times in rounds) for name in rounds[0]}


def _seconds_by_torch(path: Path, pictures: list[Path], size: str) -> float:
    predictor = Predictor.load(path, device="cpu", precision="fp32")

    def answer(image: Image.Image) -> object:
        predictor._encoded = None
        if size != "sam3":
            return predictor.predict(image, [PROMPT])
        return predictor._encode(square.to_square(image, predictor.config.resolution)[None])

    return _median(answer, pictures)


def _seconds_by_onnx(exported: Path, precision: str, pictures: list[Path], size: str) -> float:
    runtime = Runtime.load(exported, precision=precision)
    return _median((_encode_by if size == "sam3" else _predict_by)(runtime), pictures)


def _median(answer: Callable[[Image.Image], object], pictures: list[Path]) -> float:
    images = [open_image(picture) for picture in pictures]
    answer(images[0])  # the first allocates buffers
    taken = []
    for picture in images:
        begun = time.perf_counter()
        answer(picture)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _predict_by(runtime: Runtime) -> Callable[[Image.Image], object]:
    return lambda image: runtime.predict(image, [PROMPT])


def _encode_by(runtime: Runtime) -> Callable[[Image.Image], Any]:
    side = runtime.manifest.resolution
    return lambda image: runtime.backend.image(to_pixels(to_square(image, side)))


def start_cold(exported: Path, precision: str, image: Path) -> tuple[float, int]:
    """Return the seconds from the start of a process to its first answer, and its peak bytes."""
    python = [sys.executable, "-c", COLD, str(exported), precision, str(image)]
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PEAK, *python], capture_output=True, text=True)
    seconds = time.monotonic() - begun
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, int(done.stdout.split()[-1])


def multiplies_int8() -> bool:
    """Return whether the CPU has instructions for products of int8."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.is_file() else ""
    return "vnni" in text or "amx_int8" in text


PARTS: dict[str, Part] = {part.__name__: part for part in (nano, small, sam3, hf)}


if __name__ == "__main__":
    sys.exit(main_of(__doc__, PARTS, ("nano",)))
