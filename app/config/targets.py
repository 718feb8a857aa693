"""The parts that a configuration may name by `_target_`: exactly these, each in its place.

A configuration may come from outside. None of these parts acts when it is made: none writes,
starts a program, imports what its arguments name, or evaluates text.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from app.errors import nearest

_TRANSFORMS, _LOSSES = "sam3.train.transforms", "sam3.train.loss"
_OPTIM, _DATA = "sam3.train.optim", "sam3.train.data"

# kind → module → names
_TABLE: dict[str, dict[str, str]] = {
    "transforms": {
        f"{_TRANSFORMS}.basic_for_api": "RandomSizeCropAPI CenterCropAPI RandomHorizontalFlip "
        "RandomResizeAPI ScheduledRandomResizeAPI RandomPadAPI PadToSizeAPI ScheduledPadToSizeAPI "
        "IdentityAPI RandomSelectAPI ToTensorAPI NormalizeAPI ComposeAPI RandomGrayscale "
        "ColorJitter RandomAffine RandomResizedCrop ResizeToMaxIfAbove MotionBlur LargeScaleJitter",
        f"{_TRANSFORMS}.filter_query_transforms": "FilterDataPointQueries FilterQueryWithText "
        "KeepMaxNumFindQueries KeepSemanticFindQueriesOnly KeepUnaryFindQueriesOnly "
        "FilterZeroBoxQueries FilterFindQueriesWithTooManyOut FilterEmptyTargets "
        "FilterNonExhaustiveFindQueries FilterInvalidGeometricQueries FlexibleFilterFindGetQueries "
        "AddPrefixSuffixToFindText FilterCrowds TextQueryToVisual RemoveInputBoxes "
        "OverwriteTextQuery",
        f"{_TRANSFORMS}.segmentation": "InstanceToSemantic RecomputeBoxesFromMasks DecodeRle",
        f"{_TRANSFORMS}.point_sampling": "RandomGeometricInputsAPI RandomizeInputBbox",
        f"{_TRANSFORMS}.basic": "get_random_resize_scales get_random_resize_max_size",
        "app.datasets.augment": "Augment Recolor",
        "app.datasets.queries": "ToSquare SemanticTargets ShareBoxes resize_sizes",
    },
    "matchers": {
        "sam3.train.matcher": "HungarianMatcher BinaryHungarianMatcher BinaryFocalHungarianMatcher "
        "BinaryHungarianMatcherV2 BinaryOneToManyMatcher",
    },
    "losses": {
        f"{_LOSSES}.loss_fns": "IABCEMdetr Boxes Masks SemanticSegCriterion Det2TrkAssoc "
        "TrackingByDetectionAssoc",
        f"{_LOSSES}.sam3_loss": "DummyLoss Sam3LossWrapper",
    },
    "optimizers": {
        "torch.optim": "Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD",
        f"{_OPTIM}.optimizer": "GradientClipper ValueScaler layer_decay_param_modifier",
    },
    "schedules": {
        "fvcore.common.param_scheduler": "ConstantParamScheduler CosineParamScheduler "
        "ExponentialParamScheduler LinearParamScheduler MultiStepParamScheduler "
        "PolynomialDecayParamScheduler StepParamScheduler StepWithFixedGammaParamScheduler "
        "CompositeParamScheduler",
        f"{_OPTIM}.schedulers": "InverseSquareRootParamScheduler",
    },
    # Those of upstream's Trainer alone. `app/upstream_trainer` has read and replaced their paths
    # before they are made, and what `COCO_FROM_JSON` would evaluate.
    "trainer": {"sam3.train.trainer": "Trainer"},
    "model": {"app.upstream_trainer.run": "build"},
    "data": {
        f"{_DATA}.coco_json_loaders": "COCO_FROM_JSON SAM3_EVAL_API_FROM_JSON_NP",
        f"{_DATA}.sam3_image_dataset": "Sam3ImageDataset",
        f"{_DATA}.torch_dataset": "TorchDataset",
        f"{_DATA}.collator": "collate_fn_api collate_fn_api_with_chunking",
        "sam3.eval.coco_reindex": "reindex_coco_to_temp",
    },
    "meters": {
        "sam3.eval.coco_writer": "PredictionDumper",
        "sam3.eval.coco_eval_offline": "CocoEvaluatorOfflineWithPredFileEvaluators",
        "sam3.eval.cgf1_eval": "CGF1Evaluator",
        "sam3.eval.postprocessors": "PostProcessNullOp PostProcessImage",
        "sam3.eval.coco_reindex": "reindex_coco_to_temp",
    },
    "logging": {"sam3.train.utils.logger": "make_tensorboard_logger"},
}
PARTS = {
    kind: [f"{module}.{name}" for module, names in table.items() for name in names.split()]
    for kind, table in _TABLE.items()
}
# What upstream's optimizer would import to compare it with the model's modules.
MODULES = tuple(
    f"torch.nn.{name}"
    for name in ("LayerNorm", "GroupNorm", "BatchNorm2d", "Embedding", "Linear", "Conv2d")
)
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_")  # of hydra.utils.instantiate


def check_targets(node: Any, where: str, kinds: Collection[str]) -> list[str]:
    """Report every part in `node` that may not stand there, and keys that a part never reads.

    Args:
        where: dotted key of `node`.
        kinds: of `PARTS`, those that may stand in it, however deep.
    """
    if isinstance(node, list):
        return [
            p for i, item in enumerate(node) for p in check_targets(item, f"{where}[{i}]", kinds)
        ]
    if not isinstance(node, Mapping):
        return []
    problems = _check_part(node, where, kinds) if "_target_" in node else []
    problems += [
        f"{where}.module_cls_names: '{name}' is not allowed; there are {', '.join(MODULES)}"
        for name in _listed(node.get("module_cls_names"))
        if name not in MODULES
    ]
    return problems + [p for k, v in node.items() for p in check_targets(v, f"{where}.{k}", kinds)]


def _listed(names: Any) -> list[Any]:
    return names if isinstance(names, list) else [] if names is None else [names]


def _check_part(node: Mapping[str, Any], where: str, kinds: Collection[str]) -> list[str]:
    target, known = node["_target_"], [part for kind in kinds for part in PARTS[kind]]
    if target not in known:
        what = ", ".join(kinds) or "no parts"
        return [
            f"{where}._target_: '{target}' is not allowed here: {what} can be named, those of "
            f"app/config/targets.py.{nearest(str(target), known)}"
        ]
    module, _, name = str(target).rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    any_key = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [
        f"{where}.{key}: {target} reads no '{key}'.{nearest(str(key), parameters)}"
        for key in node
        if key not in parameters and key not in _SPECIAL
        if not any_key or str(key).startswith("_")  # `_args_`: an argument has a name here
    ]
