"""A YAML in upstream's schema, with the user's flags in it, made to run here.

Upstream finds configurations inside its package only (train.py:314), wants a cluster, CUDA and
Meta's paths. Each function below that changes the configuration logs what it changed.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from app.config.compose import load_model_config, model_config, nearest_key
from app.config.schema import ModelConfig
from app.config.targets import PARTS, check_targets
from app.config.yaml_data import parse_yaml
from app.errors import UserError
from app.model import weights
from app.model.upstream import fixes
from app.training.prepare import Request, default_weights, unnamed_folder
from app.upstream_trainer.fixes import apply_trainer_fixes
from app.upstream_trainer.interpolation import check_interpolations, register_resolvers
from app.upstream_trainer.schema import read_upstream

log = logging.getLogger("app")
_BUILDER = "sam3.model_builder.build_sam3_image_model"
_BUILDERS = (_BUILDER, "app.model.build.build_for_trainer", *PARTS["model"])
# Part of `trainer` → the kinds of parts that it may name by `_target_`; others name none.
_KINDS = {
    "model": ("model",),
    "data": ("data", "transforms"),
    "loss": ("losses", "matchers"),
    "optim": ("optimizers", "schedules"),
    "meters": ("meters",),
    "logging": ("logging",),
}
_WRITTEN = ("save_dir", "log_dir", "dump_dir", "metrics_dump_dir")  # folders that upstream fills

# Our flags → upstream's keys; the others have a function of their own below.
_KEYS = {
    "training.epochs": "trainer.max_epochs",
    "training.batch_size": "trainer.data.train.batch_size",
    "training.num_gpus": "launcher.gpus_per_node",
    "seed": "trainer.seed_value",
    "model.resolution": "scratch.resolution",
    "output_dir": "launcher.experiment_log_dir",
}
# Modules that upstream's YAMLs name and no release has.
_RENAMED = {"onevision.losses.": "sam3.train.loss.", "sam3.losses.": "sam3.train.loss."}
# Keys of `trainer` that a run needs, in every mode and in each.
_NEEDED = ["model", "data", "logging", "checkpoint", "max_epochs"]
_TRAINING = ["data.train", "optim.optimizer", "loss.all"]
_NEEDED_BY = {"train": _TRAINING, "train_only": _TRAINING, "val": ["data.val"]}
_UPSTREAM_RESOLUTION = 1008  # pixels, for which upstream's YAMLs are written


def prepare(request: Request, flags: dict[str, str]) -> DictConfig:
    """Return the YAML with the user's flags in it, made to run here."""
    assert request.file is not None
    fixes.apply_fixes()
    apply_trainer_fixes()
    register_resolvers()
    config = _read(request.file)
    trains = _decide_mode(config, flags, request.eval_only)
    if "scratch.resolution" in flags:  # the model has to know it too
        flags["model.resolution"] = flags.pop("scratch.resolution")
    resolution = int(config.scratch.get("resolution", _UPSTREAM_RESOLUTION))
    _replace_builder(config, request.size, flags)
    _apply(config, flags, request.lr)
    check_interpolations(config)
    _fit_sizes(config, resolution)
    _fit_validation(config)
    _fit_device(config)
    _fit_launcher(config)
    _fit_targets(config)
    if trains and config.trainer.skip_saving_ckpts:
        log.info("note: skip_saving_ckpts is set to false, or the run would leave no weights")
        config.trainer.skip_saving_ckpts = False
    return config


def model_size(size: str, resolution: int, segmentation: bool) -> ModelConfig:
    changes = {"resolution": resolution, "segmentation": segmentation}
    return model_config(load_model_config(size).model_dump() | changes, "scratch")


def _read(file: Path) -> DictConfig:
    config = read_upstream(file)
    for section in ("launcher", "scratch", "paths"):
        config.setdefault(section, {})
    wrong = [
        f"{file}: {section}: must be a mapping of keys to values"
        for section in ("launcher", "scratch", "paths", "trainer")
        if not isinstance(config._get_node(section), DictConfig)
    ]
    if wrong:
        raise UserError(wrong)
    check_interpolations(config)
    config.trainer.setdefault("skip_saving_ckpts", False)
    config.trainer.setdefault("mode", "train")
    return config


def _decide_mode(config: DictConfig, flags: dict[str, str], eval_only: bool) -> bool:
    """Set `trainer.mode`, and refuse a YAML without what it needs; return whether it trains."""
    mode = "val" if eval_only else flags.pop("trainer.mode", config.trainer.mode)
    if mode not in _NEEDED_BY:
        raise UserError(f"trainer.mode: '{mode}' is none of {', '.join(_NEEDED_BY)}")
    config.trainer.mode = mode
    missing = [
        f"trainer.{key}: not in this YAML, and trainer.mode {mode} needs it; add it, or take a "
        "YAML that builds on this one"
        for key in (*_NEEDED, *_NEEDED_BY[mode])
        if OmegaConf.select(config, f"trainer.{key}") is None
    ]
    if missing:
        raise UserError(missing)
    if mode == "val":
        log.info("note: trainer.mode is val: nothing is trained")
    return mode != "val"


def _replace_builder(config: DictConfig, size: str, flags: dict[str, str]) -> None:
    """Ours builds the same model at size sam3, and others, on any device, and loads strictly."""
    node = config.trainer.model
    target = str(node.get("_target_"))
    if target not in _BUILDERS:
        raise UserError(
            f"trainer.model._target_: '{target}' is not built here: the image model alone is, "
            f"{_BUILDER}; run this YAML in upstream's repository"
        )
    wanted = str(flags.pop("checkpoint", None) or _named_weights(node) or "auto")
    path = None if wanted in ("none", "auto") else Path(wanted)
    described = weights.describe(path, None if size == "auto" else size) if path else None
    name = described.model.name if described else size
    name = str(node.get("size", "sam3")) if name == "auto" else name
    default = described.model if described else load_model_config(name)
    if path is None:
        path = default_weights(name, random=wanted == "none", download=True)[1]
        if path is not None:
            default = weights.describe(path, name).model
    if node.get("_target_") == _BUILDER or name != node.get("size"):
        log.info("model: size %s, built by app.model.build", name)
    if "num_queries" in config.scratch:
        config.scratch.num_queries = default.num_queries
    if "mask_points" in config.scratch:
        config.scratch.mask_points = default.mask_points
    if "model.resolution" not in flags and name != "sam3":
        config.scratch.resolution = default.resolution
    resolution = int(flags.get("model.resolution", config.scratch.get("resolution", 1008)))
    segmentation = node.get("enable_segmentation", node.get("segmentation", True))
    model_size(name, resolution, bool(segmentation))  # or it is refused here
    if path and segmentation and not default.segmentation:
        raise UserError(
            f"trainer.model: wants masks, and {path} has no mask head; set "
            "scratch.enable_segmentation=false, or give other weights"
        )
    config.trainer.model = {
        "_target_": "app.upstream_trainer.run.build",
        "size": name,
        "resolution": resolution,
        "segmentation": bool(segmentation),
        "checkpoint_path": str(path) if path else None,
    }


def _named_weights(node: DictConfig) -> str | None:
    """Return the weights that the YAML names, if any; some of upstream's name a key they lack."""
    try:
        return node.get("checkpoint_path")
    except InterpolationKeyError as error:
        reason = str(error).partition("\n")[0]
        log.info("note: trainer.model.checkpoint_path: %s; --checkpoint names weights", reason)
        return None


def _apply(config: DictConfig, flags: dict[str, str], lr: float | None) -> None:
    """Set what the user asked for; a key that the file does not have is refused."""
    if lr is not None:
        if "lr_scale" not in config.scratch:
            raise UserError(
                "--lr: this YAML has no scratch.lr_scale; override its own keys instead"
            )
        config.scratch.lr_scale = lr / 8e-4
    accumulated = int(flags.pop("training.grad_accum", 1))
    folder = config.launcher.get("experiment_log_dir")
    if "output_dir" not in flags and (not folder or "<" in folder):  # <YOUR EXPERIMENT LOG_DIR>
        default = "outputs/eval" if config.trainer.mode == "val" else "outputs/train"
        flags["output_dir"] = str(unnamed_folder(Path(default), None))
    known = sorted(_names(OmegaConf.to_container(config, resolve=False)))
    for key, value in flags.items():
        if key.startswith("dataset."):
            continue  # ours: `read_splits` checks and reads them
        target = _KEYS.get(key, key)
        if target not in known and target != "launcher.experiment_log_dir":
            raise UserError(f"'{key}': this YAML has no such key.{nearest_key(key, known)}")
        parsed = value if key == "output_dir" else parse_yaml(value, f"'{key}={value}'")
        OmegaConf.update(config, target, parsed, force_add=True)
    if accumulated > 1:
        _accumulate(config, accumulated)


def _names(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix]
    return [prefix, *(n for k, v in node.items() for n in _names(v, f"{prefix}.{k}".lstrip(".")))]


def _accumulate(config: DictConfig, steps: int) -> None:
    """Accumulate over the chunks of one batch, as upstream does, which another collator makes."""
    train = config.trainer.data.get("train")
    if train is None:
        raise UserError("--grad-accum: this YAML has no trainer.data.train; leave it out")
    train.batch_size = int(train.batch_size) * steps
    train.collate_fn["_target_"] = "sam3.train.data.collator.collate_fn_api_with_chunking"
    train.collate_fn.num_chunks = steps
    config.trainer.gradient_accumulation_steps = steps


def _fit_device(config: DictConfig) -> None:
    """Ask for CUDA, NCCL, autocast and pinned memory only where there is a GPU."""
    if torch.cuda.is_available():
        return
    log.info("note: no GPU; accelerator cpu, backend gloo, no autocast")
    config.trainer.accelerator = "cpu"
    OmegaConf.update(config, "trainer.distributed.backend", "gloo", force_add=True)
    OmegaConf.update(config, "trainer.optim.amp.enabled", False, force_add=True)
    for split in ("train", "val"):
        if config.trainer.data.get(split) is not None:
            config.trainer.data[split].pin_memory = False


def _fit_launcher(config: DictConfig) -> None:
    """Run on one machine in as many processes as were asked for: no cluster, no job array."""
    if OmegaConf.select(config, "submitit.use_cluster"):
        log.info("note: submitit.use_cluster is ignored; this runs here")
    gpus = max(torch.cuda.device_count(), 1)
    processes = int(config.launcher.get("gpus_per_node", 1))
    if processes > gpus and torch.cuda.is_available():
        log.info("note: launcher.gpus_per_node %d → %d, all there are", processes, gpus)
    config.launcher.gpus_per_node = min(processes, gpus) if torch.cuda.is_available() else 1
    limit = OmegaConf.select(config, "trainer.data.train.dataset.limit_ids")
    if limit and config.trainer.mode != "val":
        log.info("note: limit_ids: only %s training images are used", limit)


def _fit_sizes(config: DictConfig, resolution: int) -> None:
    """Scale the sizes that images are resized to, where the model is of another resolution.

    Args:
        resolution: that the YAML is written for, in pixels.
    """
    for node in list(_parts(config)):
        if not str(node["_target_"]).endswith(".get_random_resize_scales"):
            continue
        size, smallest = int(node.size), int(node.min_size)
        if size == resolution and smallest <= size:
            continue
        part = smallest / max(resolution, _UPSTREAM_RESOLUTION)
        log.info("note: images are resized to %d px or more, and not %d", part * size, smallest)
        for key in list(node):
            del node[key]
        node.update(
            {
                "_target_": "app.datasets.queries.resize_sizes",
                "resolution": size,
                "smallest": part,
            }
        )


def _fit_validation(config: DictConfig) -> None:
    """Drop a validation that never runs; load no masks where no transform decodes them."""
    val = config.trainer.data.get("val")
    if val is None or config.trainer.mode == "train_only":
        config.trainer.data.val = config.trainer.meters = None
    elif val.dataset.get("load_segmentation") and "DecodeRle" not in str(val.dataset.transforms):
        log.info("note: validation loads no masks: its transforms have no DecodeRle")
        val.dataset.load_segmentation = False  # or a resize raises KeyError (None, None)


def _fit_targets(config: DictConfig) -> None:
    """Mend what upstream's published YAMLs get wrong, then check all that is instantiated."""
    for node in _parts(config):
        _mend(node, str(node["_target_"]))
    used: Any = OmegaConf.to_container(config.trainer, resolve=True)
    problems = check_targets({"_target_": used.get("_target_")}, "trainer", ["trainer"])
    for name, part in used.items():
        problems += check_targets(part, f"trainer.{name}", _KINDS.get(name, ()))
    problems += _acts(used, "trainer", Path(config.launcher.experiment_log_dir).absolute())
    resolution = int(config.trainer.model.resolution)
    for part in _parts(OmegaConf.create({"trainer": used})):
        target = str(part["_target_"])
        sizes = part.get("sizes") if target.endswith(".RandomResizeAPI") else None
        largest = max(sizes) if isinstance(sizes, ListConfig) else sizes
        if isinstance(largest, int) and largest > resolution:
            problems.append(_misfit(part._get_full_key("sizes"), largest, resolution))
        if target.endswith(".PadToSizeAPI") and part.size != resolution:
            problems.append(_misfit(part._get_full_key("size"), part.size, resolution))
    if problems:
        raise UserError(problems)


def _acts(node: Any, where: str, output: Path) -> list[str]:
    """Report what would be written outside of the run's folder, evaluated, or set elsewhere."""
    if isinstance(node, list):
        return [p for i, item in enumerate(node) for p in _acts(item, f"{where}[{i}]", output)]
    if not isinstance(node, dict):
        return []
    problems = []
    for key, value in node.items():
        place = f"{where}.{key}"
        if key in _WRITTEN and value is not None and not _is_inside(Path(str(value)), output):
            problems.append(
                f"{place}: {value}: is written, and not in {output}; write "
                "${launcher.experiment_log_dir}/…"
            )
        if key == "env_variables" and value:
            problems.append(f"{place}: set variables of the environment in your shell")
        if key == "prompts" and isinstance(value, str) and not _is_literal(value):
            problems.append(f"{place}: {value!r} is no list of {{'id': 1, 'name': 'word'}}")
        problems += _acts(value, place, output)
    return problems


def _is_inside(path: Path, folder: Path) -> bool:
    return ".." not in path.parts and path.absolute().is_relative_to(folder)


def _is_literal(text: str) -> bool:
    """Return whether upstream's `eval` of it (coco_json_loaders.py:139) can do nothing."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _misfit(place: str, size: int, resolution: int) -> str:
    return f"{place}: {size} px, and the model takes {resolution}; write ${{scratch.resolution}}"


def _parts(node: Any) -> Iterator[DictConfig]:
    """Yield every node that has a `_target_`, where it stands itself, without interpolations."""
    if isinstance(node, DictConfig):
        if node._get_node("_target_") is not None:
            yield node
        children = [node._get_node(key) for key in node]
    else:
        children = [node._get_node(i) for i in range(len(node))]
    for child in children:
        if OmegaConf.is_config(child):
            yield from _parts(child)


def _mend(node: DictConfig, target: str) -> None:
    for wrong, right in _RENAMED.items():
        if target.startswith(wrong):
            node["_target_"] = right + target.removeprefix(wrong)
    if target.endswith("PostProcessImage"):
        if "use_original_sizes" in node:  # split in two before the release
            both = node.pop("use_original_sizes")
            node.use_original_sizes_box = node.use_original_sizes_mask = both
        if not torch.cuda.is_available():  # postprocessors.py:152 asserts CUDA for masks
            node.always_interpolate_masks_on_gpu = False
