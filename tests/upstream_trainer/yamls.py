"""YAMLs in the form of those that upstream publishes, which its package does not carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from app.upstream_trainer.schema import BASE_CONFIG

TRANSFORMS = "sam3.train.transforms"
BUILDER = "sam3.model_builder.build_sam3_image_model"
PROMPTS = "[{'id': 1, 'name': 'round thing'}, {'id': 2, 'name': 'box'}, {'id': 3, 'name': 'tent'}]"


def roboflow(mode: str) -> dict[str, Any]:
    """Return roboflow_v100's: boxes alone, sizes of 1008 px, placeholders, a job array."""
    content = _base()
    content["paths"] = {"root": "<YOUR_DATASET_DIR>", "log_dir": "<YOUR EXPERIMENET LOG_DIR>"}
    content["names"] = ["-grccs", "zebrasatasturias"]
    content["submitit"] = {"use_cluster": True, "job_array": {"task_index": 0}}
    folder = "${paths.root}/${names.${string:${submitit.job_array.task_index}}}"
    scratch, trainer = content["scratch"], content["trainer"]
    del scratch["num_queries"], scratch["mask_points"]
    scratch["enable_segmentation"], scratch["num_workers"] = False, 0
    resize = scratch["train_transforms"][2]
    assert resize["_target_"].endswith(".RandomResizeAPI")
    resize["sizes"] = {
        "_target_": f"{TRANSFORMS}.basic.get_random_resize_scales",
        **{"size": "${scratch.resolution}", "min_size": 480, "rounded": False},
    }
    resize["max_size"] = {
        "_target_": f"{TRANSFORMS}.basic.get_random_resize_max_size",
        "size": "${scratch.resolution}",
    }
    scratch["train_transforms"] = [
        part for part in scratch["train_transforms"] if not part["_target_"].startswith("app.")
    ]
    trainer |= {"mode": mode, "skip_saving_ckpts": True}
    loss = trainer["loss"]["all"]
    loss["loss_fn_semantic_seg"] = None
    loss["loss_fns_find"] = loss["loss_fns_find"][:2]
    loss["loss_fns_find"][1]["pad_n_queries"] = 200
    for split, name in (("train", "train"), ("val", "test")):
        trainer["data"][split]["dataset"] |= {
            "img_folder": f"{folder}/{name}/",
            "ann_file": f"{folder}/{name}/_annotations.coco.json",
        }
    _evaluators(content)[0]["gt_path"] = f"{folder}/test/_annotations.coco.json"
    content["launcher"] |= {"gpus_per_node": 2, "experiment_log_dir": "${paths.log_dir}"}
    return content


def odinw() -> dict[str, Any]:
    """Return odinw13's evaluation: no training, ids counted anew, prompts, a box as prompt too."""
    content = roboflow("val")
    trainer = content["trainer"]
    content["scratch"]["unused"] = {"_target_": "sam3.model.attention.MultiheadAttention"}
    del trainer["data"]["train"], trainer["loss"]["all"], trainer["optim"]
    file = {
        "_target_": "sam3.eval.coco_reindex.reindex_coco_to_temp",
        "input_json_path": "${paths.root}/annotations.json",
    }
    dataset = trainer["data"]["val"]["dataset"]
    dataset |= {"img_folder": "${paths.root}", "ann_file": file}
    dataset["coco_json_loader"]["prompts"] = PROMPTS
    _evaluators(content)[0] |= {"gt_path": file, "positive_split": True}
    content["scratch"]["val_transforms"].append(
        {
            "_target_": f"{TRANSFORMS}.filter_query_transforms.TextQueryToVisual",
            **{"keep_text_queries": True, "probability": 1.0},
        }
    )
    return content


def gold(folder: Path) -> Path:
    """Write a gold evaluation and the base that it builds on, where upstream has them."""
    base = roboflow("val")
    base["paths"] |= {"truth": "<YOUR_GOLD_GT_DIR>", "images": "<YOUR_METACLIP_IMG_DIR>"}
    base["scratch"]["enable_segmentation"] = True
    trainer = base["trainer"]
    val, meters = trainer["data"]["val"], trainer["meters"]["val"]["valid"]
    trainer["data"], trainer["meters"] = {"train": None, "val": None}, {"val": None}
    truths = [f"${{paths.truth}}/gold_{annotator}.json" for annotator in "ab"]
    val["dataset"] |= {"img_folder": "${paths.images}", "ann_file": truths[0]}
    val["dataset"]["coco_json_loader"] = {
        "_target_": "sam3.train.data.coco_json_loaders.SAM3_EVAL_API_FROM_JSON_NP",
        "_partial_": True,
    }
    meters["detection"] |= {"iou_type": "segm", "maxdets": 1000000}
    meters["detection"]["postprocessor"] |= {
        **{"iou_type": "segm", "use_original_ids": False, "use_original_sizes_box": False},
        **{"use_original_sizes_mask": True, "convert_mask_to_rle": True},
        "detection_threshold": 0.3,
    }
    meters["detection"]["pred_file_evaluators"] = [
        {"_target_": "sam3.eval.cgf1_eval.CGF1Evaluator", "gt_path": truths, "iou_type": iou_type}
        for iou_type in ("bbox", "segm")
    ]
    own = {
        "defaults": ["/configs/eval_base.yaml", "_self_"],
        "trainer": {"data": {"val": val}, "meters": {"val": {"valid": meters}}},
    }
    write(folder / "configs" / "eval_base.yaml", base)
    return write(folder / "configs" / "gold_image_evals" / "attributes.yaml", own)


def write(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return file


def _base() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(BASE_CONFIG.read_text())
    content["defaults"] = ["_self_"]
    content["trainer"]["model"] = {
        **{"_target_": BUILDER, "bpe_path": "<BPE_PATH>", "device": "cpus", "eval_mode": True},
        "enable_segmentation": "${scratch.enable_segmentation}",
    }
    return content


def _evaluators(content: dict[str, Any]) -> list[dict[str, Any]]:
    evaluators: list[dict[str, Any]] = content["trainer"]["meters"]["val"]["valid"]["detection"][
        "pred_file_evaluators"
    ]
    return evaluators
