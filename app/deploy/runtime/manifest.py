"""`manifest.json`: what an exported folder holds. It is checked as a file from elsewhere.

Needs no package but numpy, because the runtime reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import UserError
from app.files import SETTINGS_BYTES, hash_file, read_json
from app.model.score_counts import ScoreCounts

FILE = "manifest.json"
FORMAT = "sam3-finetuning/onnx/1"
PRECISIONS = ("fp32", "bf16", "fp16", "int8")  # the safest first
MAX_SIDE = 16_384  # pixels
MAX_PROMPTS = 50_000
REMEDY = "Export it again: python -m app export WEIGHTS --format onnx --output DIR"


@dataclass(frozen=True)
class Tolerance:
    """The largest difference of a graph from the model that it came from.

    Attributes:
        cosine: least cosine of a feature map with the model's.
        scores, boxes: largest difference; that of boxes is a share of the image's side.
        mask_iou: least mean IoU of masks with the model's.
    """

    cosine: float
    scores: float
    boxes: float
    mask_iou: float


@dataclass(frozen=True)
class Manifest:
    """The content of an exported folder.

    Attributes:
        size: name of the model's size.
        resolution: pixels of a side of the square image.
        prompts: the prompts of `text.npz`, in its order; None where `text.onnx` encodes any words.
        classes: the prompts to find where none are named.
        prompts_a_pass: prompts that `ground.onnx` takes at once, K.
        context_length: tokens of a prompt, L.
        masks: whether the model makes masks.
        top: number of queries for each prompt, those with the highest scores; None for all of them,
            in their own order.
        threshold: 0..1, least score where none is named.
        opset: of ONNX.
        graphs: graph (image, ground, text) → precision → file.
        files: each file of the folder but this one → its bytes and sha256. External data of an ONNX
            file is a file like any other.
        shapes: graph → input or output → shape.
        tolerances: precision → the tolerance of the export, and of devices.
        source: name and sha256 of the weights, upstream's pin, hash of the training data.
        target: the TensorRT and device that were asked for.
        parity: precision → the measured differences from the model.
        levels: the values that become 0 and 255 in images of more than 8 bits; None: each its own.
        scores: those of the validation images above the threshold; None where the weights told
            none.
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
    levels: tuple[float, float] | None = None
    scores: ScoreCounts | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"format": FORMAT, **asdict(self)}

    def precisions(self, graph: str) -> list[str]:
        """Return the precisions of a graph that the folder has, the safest first."""
        return [precision for precision in PRECISIONS if precision in self.graphs[graph]]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an exported folder.

    Raises:
        UserError: no manifest, a broken one, another format, or a file outside of the folder.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder}: holds no {FILE}. {REMEDY}")
    try:
        content = read_json(file, most=SETTINGS_BYTES)
    except UserError as error:
        raise UserError(f"{error}. {REMEDY}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{file}: is not of the format {FORMAT}. {REMEDY}")
    try:
        content["tolerances"] = {k: Tolerance(**v) for k, v in content["tolerances"].items()}
        for key in ("prompts", "classes"):
            content[key] = None if content[key] is None else tuple(content[key])
        if content.get("levels") is not None:
            low, high = content["levels"]
            content["levels"] = float(low), float(high)
        if content.get("scores") is not None:
            content["scores"] = ScoreCounts(**content["scores"])
        manifest = Manifest(**content)
        _check_values(manifest)
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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: a key is wrong or missing ({error}). {REMEDY}") from None
    if problems:
        raise UserError(problems)
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raise ValueError, which names the key, where a value is of another type or out of range."""
    numbers = {
        "resolution": MAX_SIDE,
        "prompts_a_pass": MAX_PROMPTS,
        "context_length": 1000,
        "opset": 1000,
        **({} if manifest.top is None else {"top": MAX_PROMPTS}),
    }
    for key, most in numbers.items():
        value = getattr(manifest, key)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{key}: {value!r} is none of 1 to {most}")
    if not isinstance(manifest.threshold, int | float) or not 0 <= manifest.threshold <= 1:
        raise ValueError(f"threshold: {manifest.threshold!r} is none of 0 to 1")
    for key in ("prompts", "classes"):
        words = getattr(manifest, key) or ()
        if len(words) > MAX_PROMPTS or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{key}: is no list of at most {MAX_PROMPTS} texts")
    named = [name for graph in manifest.graphs.values() for name in graph.values()]
    if not all(isinstance(name, str) for name in [*named, *manifest.graphs]):
        raise ValueError("graphs: a name is no text")
    for name, entry in manifest.files.items():
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"files: {name}: bytes or sha256 are none")
    for tolerance in manifest.tolerances.values():
        if not all(isinstance(value, int | float) for value in asdict(tolerance).values()):
            raise ValueError("tolerances: a value is no number")
    for graph in manifest.shapes.values():
        for name, shape in graph.items():
            if not all(type(side) is int for side in shape):
                raise ValueError(f"shapes: {name}: is no list of whole numbers")


def check_files(folder: Path, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Compare files with the manifest by size and sha256.

    Args:
        names: of the manifest's files; None for all.

    Raises:
        UserError: names each file that is missing, cut short or changed.
    """
    problems = []
    for name in manifest.files if names is None else names:
        entry, file = manifest.files[name], folder / name
        if not file.is_file() or file.is_symlink():
            problems.append(f"{file}: is missing, or a link. {REMEDY}")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(
                f"{file}: is cut short or changed: {file.stat().st_size} bytes, not "
                f"{entry['bytes']}. {REMEDY}"
            )
        elif hash_file(file) != entry["sha256"]:
            problems.append(f"{file}: is changed: its SHA-256 is not the manifest's. {REMEDY}")
    if problems:
        raise UserError(problems)


def graph_file(graph: str, precision: str) -> str:
    """Return the name of a graph's file: `image.onnx`, `image.int8.onnx`."""
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def identity(file: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def safer(precision: str) -> list[str]:
    """Return the precision and the safer ones, to try in turn: fp16, bf16, fp32."""
    return list(PRECISIONS[PRECISIONS.index(precision) :: -1])


def list_variants(manifest: Manifest, graph: str, precision: str, *, on_gpu: bool) -> list[str]:
    """Return the precisions of a graph that are as safe as `precision`, or safer, fastest first.

    On a GPU the ground graph is not taken in int8, because halves are faster there; on a CPU int8
    is faster.
    """
    variants = [level for level in safer(precision) if level in manifest.graphs[graph]]
    if on_gpu and graph == "ground" and {"fp16", "bf16"} & set(variants):
        variants = [level for level in variants if level != "int8"]
    return variants


def inside(name: str) -> bool:
    """Return whether a name is that of a file in the folder, and not a path out of it."""
    return bool(name) and PurePosixPath(name).name == name and name not in (".", "..")
