"""`python -m app export --format onnx`: weights → graphs, each compared with the model."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.datasets.square import to_square
from app.datasets.synthetic.shapes import make_shapes
from app.deploy.graphs import FEATURES, GroundGraph, ImageGraph, TextGraph
from app.deploy.operators import OPSET, OPSETS, check_operators
from app.deploy.output import check_output
from app.deploy.parity import TOLERANCES, Difference, compare, model_outputs
from app.deploy.plain_modules import use_plain_modules
from app.deploy.precision import TYPES, narrow, quantise, save
from app.deploy.runtime import manifest as manifests
from app.deploy.runtime.golden import FILE as GOLDEN
from app.deploy.runtime.golden import sample
from app.deploy.runtime.manifest import PRECISIONS, Manifest
from app.deploy.runtime.onnx_backend import choose_precisions
from app.deploy.runtime.runtime import Runtime
from app.deploy.tokenizer import write_tokenizer
from app.errors import UserError, nearest
from app.evaluation.validate import validate
from app.files import atomic_folder, hash_file, write_json
from app.inference.inputs import check_prompts, find_images
from app.inference.postprocess import THRESHOLD
from app.inference.predictor import Predictor, normalise, pairs_per_pass
from app.model import weights
from app.model.vocabulary import unknown_words

log = logging.getLogger("app")
MEASURED = 20  # most images that graphs are compared on
DRAWN = 4  # where none are given
HALVES = tuple(TYPES)
ROUNDED = ".rounded"  # in the names of graphs that are made to measure a half, and removed
GROUND_OUTPUTS = ("scores", "presence", "boxes", "masks")


@dataclass(frozen=True)
class Wanted:
    """What is to be exported.

    Attributes:
        precisions: of `PRECISIONS`; fp32 is always among them.
        prompts: what can be asked for; None: any words.
        a_pass: prompts answered together; None: all, at most `pairs_per_pass`; one of any words.
        top: queries a prompt that get masks; None: all.
        resolution: pixels; None: the weights'.
        target: what TensorRT and device it is for; noted.
    """

    precisions: tuple[str, ...] = ("fp32",)
    prompts: tuple[str, ...] | None = ()
    a_pass: int | None = None
    top: int | None = None
    resolution: int | None = None
    target: dict[str, str] | None = None


def check_wanted(wanted: Wanted, header: weights.Header, *, has_images: bool) -> Wanted:
    """What is wanted, whole; raises UserError with every problem."""
    problems = [
        f"--precision {name}: give some of {', '.join(PRECISIONS)}.{nearest(name, PRECISIONS)}"
        for name in wanted.precisions
        if name not in PRECISIONS
    ]
    version = (wanted.target or {}).get("tensorrt")
    if version is not None and version not in OPSETS:
        problems.append(f"--tensorrt {version}: graphs are made for {' and '.join(OPSETS)}")
    if "int8" in wanted.precisions and not has_images:
        problems.append(
            "--precision int8: is calibrated on your images: give --images DIR (without labels) or "
            "--dataset-dir DIR (with)"
        )
    for flag, value in (("--prompts-a-pass", wanted.a_pass), ("--top", wanted.top)):
        if value is not None and value < 1:
            problems.append(f"{flag} {value}: must be 1 or more")
    prompts = wanted.prompts
    if prompts is None:
        if header.model.vocabulary is not None:
            problems.append(
                "--open-vocabulary: these weights answer a stored vocabulary alone; export those "
                "that they were made from"
            )
    else:
        prompts = tuple(dict.fromkeys(prompts or header.prompts))
        if prompts:
            prompts = check_prompts(prompts)
            problems += [
                f"--prompt {line}" for line in unknown_words(header.model.vocabulary, prompts)
            ]
        else:
            problems.append(
                "Which prompts are to be answered? These weights name none: give --prompt 'a noun "
                "phrase', --prompts FILE, or --open-vocabulary"
            )
    if problems:
        raise UserError(problems)
    count = 1 if prompts is None else len(prompts)
    together = wanted.a_pass or pairs_per_pass(header.model)
    ordered = tuple(name for name in PRECISIONS if name in {*wanted.precisions, "fp32"})
    return replace(
        wanted,
        precisions=ordered,
        prompts=prompts,
        a_pass=min(together, count) if prompts else wanted.a_pass or 1,
    )


def export(
    path: Path,
    folder: Path,
    wanted: Wanted = Wanted(),
    *,
    images: str | None = None,
    valid: Dataset | None = None,
    max_detections: int = 100,
    measure_on: int = MEASURED,
    overwrite: bool = False,
) -> Manifest:
    """Write graphs of the weights, with `manifest.json`, to `folder`, whole or not at all.

    Each precision is run on a CPU and compared with the project's predictor on the same images.
    Halves are computed there in float32 on rounded numbers, as CPUs have no such kernels.

    Args:
        images: file, folder or glob of images to compare, and to calibrate int8, on.
        valid: labelled images, on which AP is compared as well.
        max_detections: an image, for that.
        measure_on: most images to compare on.

    Raises:
        UserError: what cannot be exported, or a graph beyond its tolerance; names each miss.
    """
    source = weights.find_file(path)
    check_output(folder, source, overwrite=overwrite)
    header = weights.describe(source, resolution=wanted.resolution)
    wanted = check_wanted(wanted, header, has_images=images is not None or valid is not None)
    with atomic_folder(folder) as temporary, _pictures(images, valid, measure_on) as pictures:
        _write_graphs(source, wanted, temporary)
        side = header.model.resolution
        predictor = Predictor.load(path, device="cpu", precision="fp32", resolution=side)
        _write_text(predictor, wanted, temporary)
        if "int8" in wanted.precisions:
            asked = _passes(wanted.prompts or header.prompts, wanted.a_pass or 1)
            words = [_words(predictor, prompts) for prompts in asked[: len(pictures)]]
            quantise(temporary, _pixels(pictures, side), words)
        for precision in HALVES:
            if precision in wanted.precisions:
                for graph in ("image", "ground"):
                    narrow(
                        temporary / f"{graph}.onnx",
                        temporary / f"{graph}.{precision}.onnx",
                        precision,
                    )
        for file in temporary.glob("*.onnx"):
            check_operators(file)
        manifest = _describe(temporary, header, wanted, source)
        parity = _measure(predictor, temporary, manifest, pictures, valid, max_detections)
        del predictor
        for file in temporary.glob(f"*{ROUNDED}.onnx*"):
            file.unlink()
        _write_golden(temporary, manifest, pictures[0])
        files = {**manifest.files, GOLDEN: _identity(temporary / GOLDEN)}
        manifest = replace(manifest, parity=parity, files=files)
        write_json(temporary / manifests.FILE, manifest.to_json())
    return manifest


def _write_graphs(source: Path, wanted: Wanted, folder: Path) -> None:
    """The graphs in float32."""
    model, header = weights.load(source, resolution=wanted.resolution, merge=True)
    use_plain_modules(model)
    side, size = header.model.resolution, header.model
    image = ImageGraph(model)
    pixels = torch.zeros(1, 3, side, side)
    _to_onnx(image, {"pixels": pixels}, FEATURES, folder / "image.onnx")
    with torch.inference_mode():
        features = dict(zip(FEATURES, image(pixels), strict=True))
    del image
    count, length = wanted.a_pass or 1, size.text.context_length
    words = {
        "text": torch.zeros(count, length, size.d_model),
        "text_mask": torch.zeros(count, length, dtype=torch.bool),
    }
    ground = GroundGraph(model, count, wanted.top)
    outputs = GROUND_OUTPUTS if size.segmentation else GROUND_OUTPUTS[:-1]
    _to_onnx(ground, {**features, **words}, outputs, folder / "ground.onnx")
    if wanted.prompts is None:
        tokens = torch.zeros(1, length, dtype=torch.long)
        _to_onnx(TextGraph(model), {"tokens": tokens}, ("text", "text_mask"), folder / "text.onnx")
        write_tokenizer(folder / "tokenizer.json")


def _to_onnx(
    graph: nn.Module, inputs: dict[str, torch.Tensor], outputs: Sequence[str], file: Path
) -> None:
    log.info("writing %s", file.name)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    save(program.model, file)


def _write_text(predictor: Predictor, wanted: Wanted, folder: Path) -> None:
    if wanted.prompts is not None:
        words = _words(predictor, wanted.prompts)
        np.savez(folder / "text.npz", features=words["text"], mask=words["text_mask"])


def _words(predictor: Predictor, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """`text` (K, L, D) and `text_mask` (K, L) of K prompts, as the ground graph takes them."""
    with torch.inference_mode():
        parts = [predictor._text((prompt,)) for prompt in prompts]
    return {
        "text": np.concatenate([p["language_features"].transpose(0, 1).numpy() for p in parts]),
        "text_mask": np.concatenate([p["language_mask"].numpy() for p in parts]),
    }


@contextlib.contextmanager
def _pictures(images: str | None, valid: Dataset | None, most: int) -> Iterator[list[Image.Image]]:
    """Images to compare on: those given, those of the dataset, or drawn ones."""
    if images is not None:
        files = find_images(images)[:most]
    elif valid is not None:
        files = [image.path for image in valid.images[:most]]
    else:
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "set"
            make_shapes(drawn, train=DRAWN, valid=0)
            log.info("compared on %d drawn images; --images DIR takes yours", DRAWN)
            yield [open_image(file) for file in sorted((drawn / "train" / "images").iterdir())]
        return
    yield [open_image(file) for file in files]


def _pixels(pictures: Sequence[Image.Image], side: int) -> Iterator[NDArray[np.float32]]:
    return (normalise(to_square(picture, side)).numpy() for picture in pictures)


def _describe(folder: Path, header: weights.Header, wanted: Wanted, source: Path) -> Manifest:
    """What the folder holds by now."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    graphs = ["image", "ground", *(["text"] if wanted.prompts is None else [])]
    size = header.model
    threshold = THRESHOLD if header.threshold is None else header.threshold
    return Manifest(
        size=size.name,
        resolution=size.resolution,
        prompts=wanted.prompts,
        classes=tuple(
            prompt
            for prompt in header.prompts
            if wanted.prompts is None or prompt in wanted.prompts
        )
        or (wanted.prompts or ()),
        prompts_a_pass=wanted.a_pass or 1,
        context_length=size.text.context_length,
        masks=size.segmentation,
        top=None if wanted.top is None else min(wanted.top, size.num_queries),
        threshold=threshold,
        opset=OPSET,
        graphs={
            graph: {
                precision: name
                for precision in wanted.precisions
                if (name := _graph_file(graph, precision)) in names
            }
            for graph in graphs
        },
        files={name: _identity(folder / name) for name in names if name != manifests.FILE},
        shapes={graph: _shapes(folder / f"{graph}.onnx") for graph in graphs},
        tolerances={precision: TOLERANCES[precision] for precision in wanted.precisions},
        source={
            "weights": source.name,
            "sha256": hash_file(source),
            "pin": header.pin,
            "data_hash": header.data_hash,
        },
        target=wanted.target or {},
    )


def _identity(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def _graph_file(graph: str, precision: str) -> str:
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def _shapes(file: Path) -> dict[str, list[int]]:
    graph = onnx.load(file, load_external_data=False).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def _measure(
    predictor: Predictor,
    folder: Path,
    manifest: Manifest,
    pictures: Sequence[Image.Image],
    valid: Dataset | None,
    max_detections: int,
) -> dict[str, Any]:
    """Each precision beside the model; raises UserError where one is too far from it."""
    asked = _passes(manifest.prompts or manifest.classes, manifest.prompts_a_pass)
    reference = _figures(predictor, valid, max_detections)
    parity: dict[str, Any] = {}
    problems: list[str] = []
    above = best = 0.0  # fp32, the first, must agree on every query; others on what is found
    for precision in manifest.tolerances:
        runtime = _runnable(folder, manifest, precision)
        difference = Difference()
        for picture, prompts in zip(pictures, itertools.cycle(asked), strict=False):
            truth = model_outputs(predictor, picture, prompts)
            found = graph_outputs(runtime, picture, prompts)
            difference = difference.join(compare(truth, found, top=manifest.top, above=above))
            best = max(best, float(truth["scores"].max()))
        above = manifest.threshold if best > manifest.threshold else 0.0
        row: dict[str, Any] = difference.to_json()
        said = (
            f"{precision}: features' cosine {difference.cosine:.6f}, scores within "
            f"{difference.scores:.2g}, boxes within {difference.boxes:.2g}, mask IoU "
            f"{difference.mask_iou:.4f} of {difference.objects} objects on "
            f"{difference.images} images"
        )
        for key, value in _figures(runtime, valid, max_detections).items():
            row[key], row[f"model/{key}"] = value, reference[key]
            said += f", {key} {value:.3f} (the model's {reference[key]:.3f})"
        log.info("%s", said)
        parity[precision] = row
        misses = difference.misses(manifest.tolerances[precision])
        problems += [f"{precision}: {miss}" for miss in misses]
    if problems:
        remedy = "Leave out the --precision that misses, or calibrate int8 on more of your images."
        if not above:
            remedy += " The model finds nothing on these; give --images that show what it knows."
        raise UserError(
            ["The graphs are too far from the model; nothing is left of the export:"]
            + [f"  {problem}" for problem in problems]
            + [f"  {remedy}"]
        )
    return parity


def _figures(
    predictor: Predictor | Runtime, valid: Dataset | None, max_detections: int
) -> dict[str, float]:
    """Box and mask AP on labelled images; nothing where there are none."""
    if valid is None:
        return {}
    figures = validate(predictor, valid, max_detections=max_detections).figures
    return {key: figures[key] for key in ("bbox/AP", "segm/AP") if key in figures}


def _passes(prompts: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """All prompts, `count` at a time, as a runtime asks for them; the last ones filled up."""
    words = prompts or ("object",)
    return [
        tuple(words[index % len(words)] for index in range(first, first + count))
        for first in range(0, len(words), count)
    ]


def graph_outputs(
    runtime: Runtime, image: Image.Image, prompts: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """What the graphs answer, named as `model_outputs` names it."""
    pixels = normalise(to_square(image, runtime.manifest.resolution)).numpy()
    features = runtime.backend.image(pixels)
    return {**features, **runtime.backend.ground(features, *runtime.text(prompts))}


def _runnable(folder: Path, manifest: Manifest, precision: str) -> Runtime:
    """The graphs of one precision, as a CPU can run them."""
    levels = choose_precisions(manifest, "fp32" if precision in HALVES else precision)
    graphs = {graph: manifest.graphs[graph][level] for graph, level in levels.items()}
    files = dict(manifest.files)
    for graph in ("image", "ground") if precision in HALVES else ():
        name = graphs[graph] = f"{graph}{ROUNDED}.onnx"
        narrow(folder / f"{graph}.onnx", folder / name, precision, emulated=True)
        files |= {file.name: _identity(file) for file in folder.glob(f"{name}*")}
    described = replace(
        manifest, graphs={graph: {"fp32": name} for graph, name in graphs.items()}, files=files
    )
    write_json(folder / manifests.FILE, described.to_json())
    return Runtime.load(folder, backend="onnxruntime", precision="fp32")


def _write_golden(folder: Path, manifest: Manifest, image: Image.Image) -> None:
    """What a device must find again: an image, and what the graphs in float32 say of it."""
    runtime = _runnable(folder, manifest, "fp32")
    prompts = _passes(manifest.prompts or manifest.classes, manifest.prompts_a_pass)[0]
    text, mask = runtime.text(prompts)
    found = graph_outputs(runtime, image, prompts)
    golden: dict[str, Any] = {name: sample(value) for name, value in found.items()}
    golden |= {"pixels": to_square(image, manifest.resolution).numpy()}
    np.savez(folder / GOLDEN, **golden, text=text, text_mask=mask)
