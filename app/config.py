"""configs/ composed from the filesystem, checked whole, resolved.

Hydra composes; pydantic refuses what no one reads. A mistyped override is an error with the nearest
known key, never ignored (the most common mistake in forks of upstream).
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import UserError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Node = dict[str, Any]  # a part named by `_target_`, made by hydra.utils.instantiate

ShapeKind = Literal[
    "circle", "rectangle", "triangle", "ellipse", "star", "ring", "cross", "hexagon", "blob"
]
# fmt: off
ColorName = Literal[
    "red", "green", "blue", "yellow", "orange", "purple",
    "pink", "brown", "cyan", "white", "black", "gray",
]
# fmt: on
LabelBy = Literal["kind", "color", "both", "all"]
Background = Literal["plain", "gradient", "texture", "mixed"]
Component = Literal["vision", "text", "detector", "geometry", "masks", "scoring"]  # of the model
# --resume: everything; "auto": if there is a run, else start one; "weights": nothing but them.
Resume = Literal["all", "auto", "weights"]
PlanKind = Literal["show", "measure"]  # --plan: counted; "measure": and a few updates done
FormatName = Literal["auto", "coco", "yolo", "labelme", "via", "voc", "masks"]

SHORT = {"limit": "dataset.limit"}  # keys that people write without their group
# A configuration may come from outside: it may name upstream's parts and ours, and no other code.
TARGETS = ("sam3.", "app.", "torch.optim.", "torch.nn.", "fvcore.common.param_scheduler.")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(_Strict):
    patch_size: int = Field(gt=0)
    embed_dim: int = Field(gt=0, multiple_of=4)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(gt=0)
    window_size: int = Field(gt=0)
    global_blocks: list[int]
    drop_path: float = Field(ge=0, lt=1)
    heads: int | None = Field(default=None, ge=1)  # that were left of num_heads; None: all

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
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
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

    name: str
    resolution: int = Field(gt=0)
    vision: VisionConfig
    text: TextConfig
    d_model: int = Field(gt=0, multiple_of=8)
    num_heads: int = Field(gt=0)
    feedforward: int = Field(gt=0)
    encoder_layers: int = Field(gt=0)
    decoder_layers: int = Field(gt=0)
    geometry_layers: int = Field(gt=0)
    num_queries: int = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    mask_points: int = Field(gt=0)
    segmentation: bool
    activation_checkpointing: bool | list[Component]  # of training alone, not of weights
    vocabulary: list[str] | None = None  # the prompts stored in the text encoder's place; None: any

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        patch = self.vision.patch_size
        if self.resolution % patch:
            low = max(self.resolution // patch * patch, patch)
            raise ValueError(
                f"model.resolution {self.resolution} must be a multiple of the patch size {patch}: "
                f"{low} or {low + patch}"
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


class ShapesConfig(_Strict):
    train: int = Field(ge=1)
    valid: int = Field(ge=1)
    width: int = Field(ge=32)
    height: int = Field(ge=32)
    min_shapes: int = Field(ge=1)
    max_shapes: int = Field(ge=1)
    radius: list[float] = Field(min_length=2, max_length=2)
    turn: float = Field(ge=0, le=180)
    kinds: list[ShapeKind] = Field(min_length=1)
    colors: list[ColorName] | None = Field(min_length=1)
    label_by: LabelBy
    exclude: list[str]
    background: Background

    @model_validator(mode="after")
    def _check(self) -> ShapesConfig:
        if self.min_shapes > self.max_shapes:
            raise ValueError(
                f"dataset.shapes.min_shapes {self.min_shapes} is above max_shapes {self.max_shapes}"
            )
        if self.colors is None and (self.label_by != "kind" or self.exclude):
            raise ValueError(
                f"dataset.shapes.label_by={self.label_by} with exclude={self.exclude} needs named "
                "colors, for example dataset.shapes.colors=[red,green,blue]"
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
    max_drop: float = Field(ge=0, le=1)
    limit: int | None = Field(ge=1)
    prompts: str | None
    max_prompts: int = Field(ge=1)
    negatives: int = Field(ge=0)
    foreign: float = Field(ge=0, le=1)
    near_misses: list[str]
    views: int | None = Field(ge=1)
    bad_images: Literal["stop", "skip"]
    shapes: ShapesConfig

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
    """What is adapted, and by how much; peft's own of that name is made from it."""

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
    batch_size: int = Field(ge=1)
    grad_accum: int = Field(ge=1)
    num_gpus: int = Field(ge=1)
    num_workers: int | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    check_finite: bool
    save_every: int = Field(ge=1)
    save_minutes: float | None = Field(ge=0)
    patience: int | None = Field(ge=1)
    ema: float | None = Field(gt=0, lt=1)
    cache_features: Literal["auto"] | bool


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


def load_config(
    overrides: Sequence[str] = (), file: Path | None = None, model: ModelConfig | None = None
) -> Config:
    """Compose `configs/train.yaml`, `file` over it, and `overrides` (`KEY=VALUE`) over both.

    Args:
        model: the size that given weights have; takes the place of `configs/model/`.

    Raises:
        UserError: an unknown key (with the nearest known one), a value out of range, an
            interpolation that cannot be resolved; all that are found.
    """
    groups = [text for text in overrides if _key(text) in _config_groups()]
    values = [text for text in overrides if text not in groups]
    composed = _compose("train", [_check_group(text) for text in groups])
    if file is not None:
        composed = _merge_file(composed, file, {_key(text) for text in groups})
    if model is not None:
        changes = _model_changes(file)
        composed.model = OmegaConf.merge(model.model_dump(), changes)
    for text in values:
        composed = _override(composed, text)
    return _validate(composed)


def load_model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """The size `configs/model/<name>.yaml`."""
    return load_config([f"model={name}", *overrides]).model


def model_config(content: Mapping[str, Any], where: str) -> ModelConfig:
    """A checked size; raises UserError that starts with `where`."""
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise UserError([f"{where}: {_problem(item)}" for item in error.errors()]) from None


def model_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """`configs/recipe/<name>.yaml`; raises UserError where there is none."""
    recipes = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))
    if name not in recipes:
        raise UserError(
            f"--recipe {name}: there is no such recipe; there are auto, {', '.join(recipes)}."
            f"{nearest(name, recipes)}"
        )
    return CONFIGS / "recipe" / f"{name}.yaml"


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(file: Path) -> Any:
    """Parse YAML that is data only; raises UserError that names the place."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: broken YAML: {' '.join(str(error).split())}") from None


def check_targets(node: Any, where: str) -> list[str]:
    """Problems of every `_target_` in `node`: unknown, not allowed, given keys it never reads."""
    if isinstance(node, list):
        return [p for i, item in enumerate(node) for p in check_targets(item, f"{where}[{i}]")]
    if not isinstance(node, Mapping):
        return []
    problems = _check_target(node, where) if "_target_" in node else []
    return problems + [p for k, v in node.items() for p in check_targets(v, f"{where}.{k}")]


def _check_target(node: Mapping[str, Any], where: str) -> list[str]:
    target = str(node["_target_"])
    if not target.startswith(TARGETS):
        return [f"{where}._target_: '{target}' is not allowed; targets start with {TARGETS}"]
    module, _, name = target.rpartition(".")
    try:
        part = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return [f"{where}._target_: there is no '{target}'"]
    parameters = inspect.signature(part).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        f"{where}.{key}: {target} reads no '{key}'.{nearest(key, parameters)}"
        for key in node
        if key not in parameters and not key.startswith("_")
    ]


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """Composed once a process: Hydra takes a tenth of a second."""
    return copy.deepcopy(_composed(name, tuple(overrides)))


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except HydraException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None


def _config_groups() -> list[str]:
    return [path.name for path in CONFIGS.iterdir() if path.is_dir()]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _check_group(override: str) -> str:
    group, _, choice = override.partition("=")
    choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if choice not in choices:
        raise UserError(
            f"{group}={choice}: there is no such {group}; there are {', '.join(choices)}."
            f"{nearest(choice, choices)}"
        )
    return override


def _merge_file(composed: DictConfig, file: Path, decided: Collection[str]) -> DictConfig:
    """`file` over what is composed, but for its choice of the groups that are `decided`."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a configuration is a mapping of keys to values")
    for group in set(content) & set(_config_groups()):
        choice = _choice(group, content[group])
        if isinstance(content[group], str) or (choice and group in decided):
            del content[group]
        if choice and group not in decided:
            composed = _regroup(composed, group, choice)
    known = _leaves(composed)
    unknown = [key for key in _leaves(content) if not _is_known(key, known)]
    if unknown:
        raise UserError([f"{file}: nothing reads '{key}'.{nearest(key, known)}" for key in unknown])
    merged = OmegaConf.merge(composed, OmegaConf.create(content))
    assert isinstance(merged, DictConfig)
    return merged


def _choice(group: str, value: Any) -> str | None:
    """The YAML that a file's `group: choice` names, or `group: {name: choice, …}` starts from."""
    if isinstance(value, str):
        return value
    name = str(value.get("name")) if isinstance(value, Mapping) else ""
    return name if (CONFIGS / group / f"{name}.yaml").is_file() else None


def _model_changes(file: Path | None) -> Mapping[str, Any]:
    """Single keys of the size that a file sets; a size's name was seen to before."""
    changes = read_yaml(file).get("model", {}) if file is not None else {}
    return changes if isinstance(changes, Mapping) else {}


def _regroup(composed: DictConfig, group: str, choice: str) -> DictConfig:
    OmegaConf.set_struct(composed, False)
    composed[group] = _compose("train", [_check_group(f"{group}={choice}")])[group]
    return composed


def _override(composed: DictConfig, text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    key = SHORT.get(key, key)
    known = _leaves(composed)
    if not equals:
        raise UserError(f"'{text}': an override is KEY=VALUE.{nearest(text, known)}")
    if not _is_known(key, known):
        raise UserError(f"'{text}': nothing reads the key '{key}'.{nearest_key(key, known)}")
    try:
        parsed = value if _is_text(key) and value != "null" else yaml.safe_load(value)
        if isinstance(parsed, str) and not _is_text(key) and _is_number(value):
            parsed = float(value)  # YAML 1.1 reads 1e-4 as text; people write it as a number
        OmegaConf.update(composed, key, parsed, merge=False, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"'{text}': {' '.join(str(error).split())}") from None
    return composed


def nearest_key(key: str, known: Sequence[str]) -> str:
    """Like `nearest`, but a bare leaf (`epochs`) finds its full key (`training.epochs`) first."""
    leaf = key.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    matches = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    return f" Did you mean '{by_leaf[matches[0]]}'?" if matches else nearest(key, known)


def _is_text(key: str) -> bool:
    """Whether the schema wants text: a folder may be called 2024, or [a]."""
    schema: Any = Config
    for name in key.split("."):
        field = getattr(schema, "model_fields", {}).get(name)
        schema = field.annotation if field is not None else None
    return schema in (str, str | None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_known(key: str, known: Sequence[str]) -> bool:
    # A part named by `_target_` takes whatever its signature reads; `check_targets` sees to that.
    parts = [name.rpartition("._target_")[0] for name in known if name.endswith("._target_")]
    return (
        key in known
        or any(name.startswith(f"{key}.") for name in known)
        or any(key.startswith(f"{part}.") for part in parts)
    )


def _leaves(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaves; list items by their index."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        items = [(str(index), value) for index, value in enumerate(node)]
    else:
        return [prefix.rstrip(".")]
    return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}{key}.")]


def _validate(composed: DictConfig) -> Config:
    if "${oc.env" in OmegaConf.to_yaml(composed):  # its value would be written to the run's folder
        raise UserError("${oc.env:…}: a configuration reads no environment variables")
    try:
        content = OmegaConf.to_container(composed, resolve=True)
        config = Config.model_validate(content)
    except OmegaConfBaseException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError([_problem(item) for item in error.errors()]) from None
    problems = [
        problem
        for name in ("transforms", "loss", "optim")
        for problem in check_targets(getattr(config, name).model_dump(), name)
    ]
    if problems:
        raise UserError(problems)
    return config


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{where}: nothing reads this key"
    if item["type"] == "value_error":
        return message
    return f"{where}: {message} (it is {item['input']!r})"
