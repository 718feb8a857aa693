"""The data of a YAML of upstream's: read and checked, then written as upstream's loader reads it.

Upstream's loaders check nothing: they raise KeyError without `iscrowd` (coco_json_loaders.py:217),
and take the neighbour of an image that is not there (sam3_image_dataset.py:518).
"""

from __future__ import annotations

import ast
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app.config.compose import load_config
from app.datasets import coco
from app.datasets.coco import Dataset
from app.datasets.images import read_header, read_values
from app.datasets.read_splits import read_splits
from app.errors import UserError
from app.files import read_json, write_json

log = logging.getLogger("app")


def read_datasets(config: DictConfig, flags: dict[str, str]) -> dict[str, Dataset]:
    """Read the splits that the mode uses: of our own keys, else of the YAML's paths.

    SA-Co's annotations (one prompt an image) are left to upstream's loader, and not among them.

    Raises:
        UserError: every file that is not there; every problem of a dataset.
    """
    nodes = used_splits(config)
    ours = [f"{key}={value}" for key, value in flags.items() if key.startswith("dataset.")]
    files = {split: _annotations(node) for split, node in nodes.items()}
    if ours or None in files.values():
        splits = read_splits(load_config(ours))
        datasets = {"train": splits.train, "val": splits.valid}
        for node in nodes.values():
            if _take_prompts(node):
                log.info("note: prompts are left out: they are of the YAML's own dataset")
        datasets = {split: datasets[split] for split in nodes}
    else:
        named = {split: file for split, file in files.items() if file is not None}
        datasets = _read_named(config, nodes, named)
    _check_masks(config, datasets)
    _check_depth(datasets)
    return datasets


def used_splits(config: DictConfig) -> dict[str, DictConfig]:
    """Return the dataset of each split that the mode uses and the YAML has."""
    loaders = {split: config.trainer.data.get(split) for split in ("train", "val")}
    if config.trainer.mode == "val":
        del loaders["train"]
    return {split: loader.dataset for split, loader in loaders.items() if loader is not None}


def _annotations(node: DictConfig) -> Path | None:
    """Return the YAML's annotations, `valid/` where `test/` lacks; None where it names none."""
    named = node.get("ann_file")
    if OmegaConf.is_config(named):  # coco_reindex.reindex_coco_to_temp, which ours makes needless
        named = named.input_json_path
    if not named:
        return None
    file = Path(named)
    beside = file.parent.parent / "valid" / file.name
    if not file.is_file() and file.parent.name == "test" and beside.is_file():
        log.info("note: there is no %s; validation uses %s", file, beside)
        node.img_folder = str(beside.parent)
        return beside
    return file


def _read_named(
    config: DictConfig, nodes: dict[str, DictConfig], files: dict[str, Path]
) -> dict[str, Dataset]:
    missing = [
        f"{split}: no annotations at {file}; set the YAML's paths, or give --dataset-dir"
        for split, file in files.items()
        if not file.is_file()
    ]
    if missing:
        raise UserError(missing)
    datasets = {}
    for split, file in files.items():
        if _asks_phrases(nodes[split]) and _holds_phrases(file):
            _check_phrases(config, nodes[split], file)
            nodes[split].ann_file = str(file)
            continue
        read = coco.read(file, [Path(nodes[split].img_folder), file.parent])
        datasets[split] = _name_classes(read, _take_prompts(nodes[split]))
    return datasets


def _take_prompts(node: DictConfig) -> dict[int, str]:
    """Take category id → prompt out of the loader, which would call `eval` on them."""
    prompts = OmegaConf.select(node, "coco_json_loader.prompts")
    if prompts is None:
        return {}
    node.coco_json_loader.prompts = None
    try:
        entries = ast.literal_eval(prompts) if isinstance(prompts, str) else prompts
        return {int(entry["id"]): str(entry["name"]) for entry in entries}
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise UserError(
            f"coco_json_loader.prompts: {prompts!r} is no list of {{'id': 1, 'name': 'word'}}"
        ) from None


def _name_classes(dataset: Dataset, prompts: dict[int, str]) -> Dataset:
    """Return the dataset with its classes named by the prompts, whose ids count from 1."""
    first = 1 if any(category.id == 0 for category in dataset.categories) else 0
    categories = tuple(
        replace(category, name=prompts.get(category.id + first, category.name))
        for category in dataset.categories
    )
    return replace(dataset, categories=categories)


def write_datasets(
    config: DictConfig, datasets: dict[str, Dataset], folder: Path, *, write: bool = True
) -> None:
    """Write checked copies of the annotations, and name them in the configuration."""
    for split, dataset in datasets.items():
        file = folder / "dataset" / f"{split}.json"
        node = config.trainer.data[split].dataset
        if write:
            write_json(file, _to_phrases(dataset) if _asks_phrases(node) else dataset.to_json())
        node.ann_file, node.img_folder = str(file), "/"
        if split in config.paths:
            config.paths[split] = {"img_folder": "/", "ann_file": str(file)}
    if "val" in datasets:
        for evaluator in _evaluators(config):
            evaluator.gt_path = str(folder / "dataset" / "val.json")


def _evaluators(config: DictConfig) -> list[DictConfig]:
    """Return what compares with the truth, from wherever it stands in `trainer.meters.val`."""

    def find(node: Any) -> list[DictConfig]:
        if not OmegaConf.is_config(node):
            return []
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        own = [node] if isinstance(node, DictConfig) and "gt_path" in node else []
        return own + [evaluator for key in keys for evaluator in find(node._get_node(key))]

    return find(OmegaConf.select(config, "trainer.meters.val"))


def _check_masks(config: DictConfig, datasets: dict[str, Dataset]) -> None:
    """Refuse to score masks on objects that have none."""
    scored = {evaluator.get("iou_type") for evaluator in _evaluators(config)}
    objects = datasets["val"].annotations if "val" in datasets else ()
    bare = [thing for thing in objects if thing.segmentation is None]
    if bare and "segm" in scored:
        raise UserError(
            f"val: {len(bare)} of {len(objects)} objects have no mask, and this YAML scores masks; "
            "label masks, or take a YAML that scores boxes (odinw13, roboflow_v100)"
        )


def _check_depth(datasets: dict[str, Dataset]) -> None:
    """Refuse gray images of more than 8 bits, which upstream's loader cuts off at 255."""
    images = (image.path for dataset in datasets.values() for image in dataset.images)
    deep = (path for path in images if "bits" in read_header(path).mends)
    if path := next((path for path in deep if read_values(path).ndim == 2), None):
        raise UserError(
            f"{path}: has more than 8 bits a pixel, which upstream's Trainer cuts off at 255; "
            "train on a copy of 8 bits, as python -m app data build writes it"
        )


# --- SA-Co: an image once for each noun phrase that it is asked for ------------------------------


def _asks_phrases(node: DictConfig) -> bool:
    loader = OmegaConf.select(node, "coco_json_loader._target_") or ""
    return str(loader).endswith(".SAM3_EVAL_API_FROM_JSON_NP")


def _holds_phrases(file: Path) -> bool:
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    wanted = {"id", "file_name", "text_input", "queried_category", "is_instance_exhaustive"}
    return all(isinstance(image, dict) and wanted <= image.keys() for image in images or [{}])


def _check_phrases(config: DictConfig, node: DictConfig, file: Path) -> None:
    """Refuse SA-Co's annotations whose images, or whose other annotators' files, are not there."""
    truths = [evaluator.gt_path for evaluator in _evaluators(config)]
    named = [name for truth in truths for name in ([truth] if isinstance(truth, str) else truth)]
    problems = [
        f"val: no annotations at {name}; set the YAML's paths, or give --dataset-dir"
        for name in dict.fromkeys(named)
        if not Path(name).is_file()
    ]
    images = {image["file_name"] for image in read_json(file)["images"]}
    lost = sorted(name for name in images if not (Path(node.img_folder) / name).is_file())
    if lost:
        problems.append(
            f"val: {len(lost)} of {len(images)} images are not in {node.img_folder}, such as "
            f"{lost[0]}; set the YAML's paths, or give --dataset-dir"
        )
    if problems:
        raise UserError(problems)
    log.info("note: %s is SA-Co's, and read by upstream's loader as it is", file)


def _to_phrases(dataset: Dataset) -> dict[str, Any]:
    """Return SA-Co's layout: all objects of one category, boxes and areas in parts of the image."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    content = {"images": images, "annotations": objects}
    for image in dataset.images:
        width, height = image.width, image.height
        for category in dataset.categories:
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": str(image.path),
                    "width": width,
                    "height": height,
                    "text_input": category.name,
                    "queried_category": str(category.id),
                    "is_instance_exhaustive": True,
                }
            )
            for thing in dataset.annotations_by_image[image.id]:
                if thing.category_id != category.id:
                    continue
                x, y, w, h = thing.bbox_xywh
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": len(images),
                        "category_id": 1,
                        "bbox": [x / width, y / height, w / width, h / height],
                        "area": thing.area / (width * height),
                        "iscrowd": int(thing.iscrowd),
                        "segmentation": thing.segmentation,
                    }
                )
    return content | {"categories": [{"id": 1, "name": "object"}]}
