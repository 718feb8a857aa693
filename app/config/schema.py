"""The schema of a configuration: every key with its type, unit and range."""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.config.reading import ReadingConfig
from app.config.shapes import ShapesConfig

Node = dict[str, Any]  # a part named by `_target_`, made by hydra.utils.instantiate

Prompt = Annotated[str, Field(max_length=1000)]
Component = Literal["vision", "text", "detector", "geometry", "masks", "scoring"]  # of the model
# --resume: everything; "auto": if there is a run, else start one; "weights": nothing but them.
Resume = Literal["all", "auto", "weights"]
Folds = Literal["auto", "none", "loo"] | Annotated[int, Field(ge=2, le=1000)]
ProposalForm = Literal["coco", "labelme", "label-studio"]
PlanKind = Literal["show", "measure"]  # --plan: counted; "measure": and a few updates done
# fmt: off
FormatName = Literal[
    "auto", "panoptic", "coco", "labelstudio", "cvat", "datumaro", "supervisely", "yolo", "via",
    "labelme", "voc", "imagefolder", "createml", "csv", "kitti", "cityscapes", "voc-masks", "masks",
]
# fmt: on


# Sizes of a model, beyond which none has been trained: weights from outside name their own.
MAX_WIDTH, MAX_DEPTH = 16_384, 256
MAX_SIDE = 512  # patches


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VisionConfig(_Strict):
    patch_size: int = Field(gt=0, le=256)
    embed_dim: int = Field(gt=0, le=MAX_WIDTH, multiple_of=4)
    depth: int = Field(gt=0, le=MAX_DEPTH)
    num_heads: int = Field(gt=0, le=MAX_WIDTH)
    mlp_ratio: float = Field(gt=0, le=64)
    window_size: int = Field(gt=0, le=MAX_SIDE)
    global_blocks: list[int]
    drop_path: float = Field(ge=0, lt=1)
    heads: int | None = Field(default=None, ge=1)  # that were left of num_heads; None: all

    @property
    def mlp_units(self) -> int:
        """Return the hidden units of the MLP in each block of the trunk."""
        return round(self.embed_dim * self.mlp_ratio)

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.heads is not None and self.heads > self.num_heads:
            raise ValueError(
                f"vision.heads {self.heads} must be at most vision.num_heads ({self.num_heads})"
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"vision.embed_dim {self.embed_dim} must be a multiple of 4 x vision.num_heads "
                f"({self.num_heads}): rotary embedding pairs both axes"
            )
        outside = [block for block in self.global_blocks if not 0 <= block < self.depth]
        if outside or not self.global_blocks or max(self.global_blocks) != self.depth - 1:
            raise ValueError(
                f"vision.global_blocks {self.global_blocks} must lie in 0..{self.depth - 1} and "
                f"hold the last block, {self.depth - 1}"
            )
        return self


class TextConfig(_Strict):
    width: int = Field(gt=0, le=MAX_WIDTH)
    depth: int = Field(gt=0, le=MAX_DEPTH)
    num_heads: int = Field(gt=0, le=MAX_WIDTH)
    context_length: int = Field(ge=3, le=77)

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"text.width {self.width} must be a multiple of text.num_heads ({self.num_heads})"
            )
        return self


class ModelConfig(_Strict):
    """Size of a SAM 3; what `model/build.py` builds and a weights' header carries."""

    name: str = Field(max_length=200)
    resolution: int = Field(gt=0)
    vision: VisionConfig
    text: TextConfig
    d_model: int = Field(gt=0, le=MAX_WIDTH, multiple_of=8)
    num_heads: int = Field(gt=0, le=MAX_WIDTH)
    feedforward: int = Field(gt=0, le=8 * MAX_WIDTH)
    encoder_layers: int = Field(gt=0, le=MAX_DEPTH)
    decoder_layers: int = Field(gt=0, le=MAX_DEPTH)
    geometry_layers: int = Field(gt=0, le=MAX_DEPTH)
    num_queries: int = Field(gt=0, le=100_000)
    dropout: float = Field(ge=0, lt=1)
    mask_points: int = Field(gt=0, le=10_000_000)
    segmentation: bool
    # of training alone, not of weights
    activation_checkpointing: Literal["auto"] | bool | list[Component]
    vocabulary: list[Prompt] | None = None  # stored in the text encoder's place; None: any

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        patch = self.vision.patch_size
        if self.resolution % patch:
            low = max(self.resolution // patch * patch, patch)
            raise ValueError(
                f"model.resolution {self.resolution} must be a multiple of the patch size {patch}: "
                f"{low} or {low + patch}"
            )
        if self.resolution > MAX_SIDE * patch:
            raise ValueError(
                f"model.resolution {self.resolution} is above {MAX_SIDE * patch}: {MAX_SIDE} "
                "patches a side"
            )
        if self.resolution < 4 * patch:
            raise ValueError(
                f"model.resolution {self.resolution} is below {4 * patch}: four patches"
            )
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model {self.d_model} must be a multiple of model.num_heads "
                f"({self.num_heads})"
            )
        return self


class HuggingFaceConfig(_Strict):
    name: str | None
    config: str | None
    split: str | None
    columns: str | None
    streaming: Literal["auto"] | bool


class DatasetConfig(_Strict):
    dir: str | None
    format: FormatName
    huggingface: HuggingFaceConfig
    roboflow: str | None
    valid_fraction: float = Field(gt=0, lt=1)
    test_fraction: float = Field(ge=0, lt=1)
    group: str | None = Field(max_length=1000)
    folds: Folds
    max_drop: float = Field(ge=0, le=1)
    limit: int | None = Field(ge=1)
    prompts: str | None
    max_prompts: int = Field(ge=1)
    negatives: int = Field(ge=0)
    foreign: float = Field(ge=0, le=1)
    near_misses: list[str]
    examples: float = Field(ge=0, le=1)
    views: int | None = Field(ge=1)
    bad_images: Literal["stop", "skip"]
    reading: ReadingConfig
    shapes: ShapesConfig

    @model_validator(mode="after")
    def _check_group(self) -> DatasetConfig:
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise ValueError(
                f"dataset.group {self.group!r} is no regular expression: {error}"
            ) from None
        return self

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        named = {
            "dataset.dir": self.dir,
            "dataset.huggingface.name": self.huggingface.name,
            "dataset.roboflow": self.roboflow,
        }
        given = [key for key, value in named.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: one run takes one dataset")
        return self


class AugmentConfig(_Strict):
    flip: float = Field(ge=0, le=1)
    flip_vertical: float = Field(ge=0, le=1)
    scale: tuple[float, float]
    rotate: float = Field(ge=0, le=180)
    color: float = Field(ge=0, le=1)
    min_visible: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        low, high = self.scale
        if not 0.05 <= low <= high <= 20:
            raise ValueError(
                f"transforms.augment.scale {[low, high]} must be the least and the most, "
                "0.05 to 20, such as [0.5, 2.0]"
            )
        return self


class TransformsConfig(_Strict):
    augment: AugmentConfig
    train: list[Node]

    @model_validator(mode="after")
    def _check(self) -> TransformsConfig:
        names = [str(node.get("_target_")).rpartition(".")[2] for node in self.train]
        if "ToSquare" in names and "NormalizeAPI" in names[names.index("ToSquare") :]:
            raise ValueError(
                "transforms.train: NormalizeAPI takes numbers, and ToSquare leaves bytes, which "
                "the device makes numbers of: name app.datasets.queries.ShareBoxes in its place"
            )
        return self


class LossConfig(_Strict):
    matcher: Node
    criterion: Node


class ScheduleConfig(_Strict):
    name: Literal["inverse_sqrt", "linear", "cosine", "constant"]
    warmup_steps: int = Field(ge=0)
    timescale: int = Field(ge=1)
    cooldown_steps: int = Field(ge=0)


class OptimConfig(_Strict):
    lr: float = Field(gt=0)
    lr_vision: float = Field(ge=0)
    lr_text: float = Field(ge=0)
    lr_scale: float | None = Field(gt=0)
    layer_decay: float = Field(gt=0, le=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    schedule: ScheduleConfig
    optimizer: Node
    param_group_modifiers: list[Node]
    options: Node


class LoraPartsConfig(_Strict):
    vision: bool
    text: bool
    encoder: bool
    decoder: bool


class LoraConfig(_Strict):
    """The modules that LoRA adapts, and by how much; peft's own LoraConfig is made from it."""

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    parts: LoraPartsConfig
    attention: bool
    mlp: bool
    targets: list[str]


class MethodConfig(_Strict):
    name: str
    freeze: list[Component] | None
    lora: LoraConfig | None

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.lora is not None and self.freeze is not None:
            raise ValueError(
                f"method.freeze {self.freeze} and method.lora are both given: LoRA freezes all of "
                "the model; choose what it adapts, such as method.lora.parts.vision=false"
            )
        return self


class WarmStartConfig(_Strict):
    method: Literal["none", "pixels"]
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)


class TrainingConfig(_Strict):
    warm_start: WarmStartConfig
    epochs: int = Field(ge=1)
    last_epoch: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    grad_accum: int = Field(ge=1)
    num_gpus: int = Field(ge=1)
    num_workers: int | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    check_finite: bool
    save_every: int = Field(ge=1)
    save_minutes: float | None = Field(ge=0)
    patience: int | None = Field(ge=1)
    ema: float | None = Field(gt=0, lt=1)
    cache_features: Literal["auto"] | bool
    compile: Literal["auto"] | bool


class DistillConfig(_Strict):
    teacher: str | None
    resolution: int | None = Field(ge=1)
    trunk_epochs: int = Field(ge=0)
    feature_epochs: int = Field(ge=0)
    trunk: float = Field(ge=0)
    levels: tuple[float, float, float]
    text: float = Field(ge=0)
    words: int = Field(ge=0)
    outputs: float = Field(ge=0)
    labels: float = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if min(self.levels) < 0:
            raise ValueError(f"distill.levels {list(self.levels)}: a weight is below 0")
        return self


class EvaluationConfig(_Strict):
    every: int = Field(ge=1)
    metric: str
    max_detections: int = Field(ge=1)
    split: Literal["train", "valid", "test"]
    prompts: list[Literal["words", "box", "both", "other"]]
    off_prompts: int = Field(ge=0)
    pictures: int = Field(ge=0)


class ClusterConfig(_Strict):
    name: Literal["none", "slurm"]
    nodes: int = Field(ge=1)
    partition: str | None
    account: str | None
    qos: str | None
    minutes: int = Field(ge=1)
    cpus: int = Field(ge=1)
    memory_gb: int | None = Field(ge=1)
    save_seconds: int = Field(ge=1)
    image: str = Field(min_length=1, max_length=500)
    claim: str = Field(pattern="^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
    queue: str | None = Field(max_length=63)

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        if self.nodes > 1 and self.name == "none":
            raise ValueError(
                f"--nodes {self.nodes}: several machines are started by --cluster slurm"
            )
        return self


class PredictionConfig(_Strict):
    threshold: float = Field(ge=0, le=1)


class TrackingConfig(_Strict):
    mlflow: str | None
    experiment: str = Field(min_length=1)
    register_as: str | None = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        if self.mlflow and "@" in urlsplit(self.mlflow).netloc:
            raise ValueError(
                "--mlflow: an address with a password in it would be kept in the run's files; give "
                "the password as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Config(_Strict):
    """Everything that decides a run; the schema of `configs/train.yaml`."""

    model: ModelConfig
    dataset: DatasetConfig
    transforms: TransformsConfig
    loss: LossConfig
    optim: OptimConfig
    method: MethodConfig
    training: TrainingConfig
    distill: DistillConfig
    evaluation: EvaluationConfig
    prediction: PredictionConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    output_dir: str
    checkpoint: str
    seed: int = Field(ge=0)


def problems_of(error: ValidationError) -> list[str]:
    """Return a line for each problem that a schema found, with the key and the value."""
    return [line for item in error.errors() for line in _problem(item).splitlines()]


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{where}: nothing reads this key"
    if item["type"] == "value_error":
        return message
    return f"{where}: {message} (it is {_short.repr(item['input'])})"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
