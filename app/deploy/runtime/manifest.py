"""`manifest.json`: what an exported folder holds, read as what it is, a file from elsewhere.

Needs neither torch nor any other package, and runs on Python 3.10: the runtime reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import UserError
from app.files import hash_file

FILE = "manifest.json"
FORMAT = "sam3-finetuning/onnx/1"
PRECISIONS = ("fp32", "bf16", "fp16", "int8")  # the safest first
REMEDY = "Export it again: python -m app export WEIGHTS --format onnx --output DIR"


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from the model that it came from.

    Attributes:
        cosine: least cosine of each feature map with the model's.
        scores, boxes: largest difference; of boxes as a share of the image's side.
        mask_iou: least IoU of a mask with the model's, of objects that both find.
    """

    cosine: float
    scores: float
    boxes: float
    mask_iou: float


@dataclass(frozen=True)
class Manifest:
    """What the folder holds.

    Attributes:
        size, resolution: of the model; pixels, square.
        prompts: what `text.npz` has features of, in its order; None: `text.onnx`, any words.
        classes: the prompts that are asked for where none are named.
        prompts_a_pass: K of `ground.onnx`.
        context_length: tokens of a prompt.
        masks: whether the model makes masks.
        top: queries a prompt that get masks, the highest scores; None: all, in their order.
        threshold: 0..1, least score where none is named.
        opset: of ONNX.
        graphs: graph (image, ground, text) → precision → file.
        files: each file of the folder but this one → its bytes and sha256; data outside of an
            ONNX file is a file like any other.
        shapes: graph → input or output → shape.
        tolerances: precision → what the export held it to, and a device is held to again.
        source: name and sha256 of the weights, upstream's pin, hash of the data.
        target: what TensorRT and device were asked for.
        parity: precision → what was measured beside the model.
    """

    size: str
    resolution: int
    prompts: tuple[str, ...] | None
    classes: tuple[str, ...]
    prompts_a_pass: int
    context_length: int
    masks: bool
    top: int | None
    threshold: float
    opset: int
    graphs: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, Mapping[str, Sequence[int]]]
    tolerances: Mapping[str, Tolerance]
    source: Mapping[str, str] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def precisions(self, graph: str) -> list[str]:
        """Those that the folder has of a graph, the safest first."""
        return [precision for precision in PRECISIONS if precision in self.graphs[graph]]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        UserError: none there, broken, of another format, or with a file outside of the folder.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: holds no {FILE} ({error.strerror}). {REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{file}: broken JSON ({error}). {REMEDY}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{file}: is not of the format {FORMAT}. {REMEDY}")
    try:
        content["tolerances"] = {k: Tolerance(**v) for k, v in content["tolerances"].items()}
        for key in ("prompts", "classes"):
            content[key] = None if content[key] is None else tuple(content[key])
        manifest = Manifest(**content)
        named = [name for graph in manifest.graphs.values() for name in graph.values()]
        problems = [
            f"{file}: '{name}' leaves the folder. {REMEDY}"
            for name in dict.fromkeys([*named, *manifest.files])
            if not inside(name)
        ]
        problems += [
            f"{file}: '{name}' has no sha256. {REMEDY}"
            for name in named
            if name not in manifest.files
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: a key is wrong or missing ({error}). {REMEDY}") from None
    if problems:
        raise UserError(problems)
    return manifest


def check_files(folder: Path, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Prove files whole by size and sha256.

    Args:
        names: of the manifest's files; None: all.

    Raises:
        UserError: missing, cut short, or changed; names each.
    """
    problems = []
    for name in manifest.files if names is None else names:
        known, file = manifest.files[name], folder / name
        if not file.is_file():
            problems.append(f"{file}: is missing. {REMEDY}")
        elif file.stat().st_size != known["bytes"]:
            problems.append(
                f"{file}: is cut short or changed: {file.stat().st_size} bytes, not "
                f"{known['bytes']}. {REMEDY}"
            )
        elif hash_file(file) != known["sha256"]:
            problems.append(f"{file}: is changed: its SHA-256 is not the manifest's. {REMEDY}")
    if problems:
        raise UserError(problems)


def safer(precision: str) -> list[str]:
    """The precision and what to try after a miss, in turn: fp16, bf16, fp32."""
    return list(PRECISIONS[PRECISIONS.index(precision) :: -1])


def list_variants(manifest: Manifest, graph: str, precision: str, *, on_gpu: bool) -> list[str]:
    """Those of a graph that are as safe as a precision, or safer; the fastest first.

    Of the ground graph int8 spares a CPU time; a GPU has all of it faster in halves.
    """
    found = [level for level in safer(precision) if level in manifest.graphs[graph]]
    if on_gpu and graph == "ground" and {"fp16", "bf16"} & set(found):
        found = [level for level in found if level != "int8"]
    return found


def inside(name: str) -> bool:
    """Whether a file's name stays in the folder that names it."""
    return bool(name) and PurePosixPath(name).name == name and name not in (".", "..")
