"""Each kind of YAML that upstream publishes runs, or says in one line what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sam3.eval.cgf1_eval import CGF1Evaluator

from app.datasets.coco import Dataset
from app.errors import UserError
from app.files import read_json, write_json
from app.model.bundled import NANO
from app.training.prepare import Request
from app.upstream_trainer.adapt import prepare
from app.upstream_trainer.data import read_datasets, used_splits, write_datasets
from tests.upstream_trainer import yamls
from tests.upstream_trainer.test_run import run

_FILES = {"img_folder": "", "ann_file": "_annotations.coco.json"}


def _prepare(file: Path, size: str = "nano", **flags: Any) -> tuple[DictConfig, dict[str, Dataset]]:
    given = {"checkpoint": "none", "output_dir": "out"} | flags
    config = prepare(Request([], size=size, file=file), given)
    return config, read_datasets(config, given)


def _figures(folder: Path) -> dict[str, float]:
    """Return the figures of the last validation, by the ends of their names."""
    line = (folder / "logs" / "val_stats.json").read_text().splitlines()[-1]
    return {name.rpartition("/")[2]: value for name, value in json.loads(line).items()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "val"])
def test_roboflows_run_at_nano(command, shapes, tmp_path, mode) -> None:
    file, out = yamls.write(tmp_path / "theirs.yaml", yamls.roboflow(mode)), tmp_path / "out"
    done = run(
        *("train", "--config", file, "--model", "nano", "--dataset-dir", shapes),
        *("--epochs", 1, "--output-dir", out),
    )
    assert done.returncode == 0, done.stderr
    assert "loading error" not in done.stderr  # upstream goes on to the next image
    assert _figures(out)["coco_eval_bbox_AP"] > 0.2  # by the weights that the project carries
    assert (out / "weights").is_dir() == (mode == "train")
    if mode == "train":  # without a mask head, as the YAML wants it
        images, found = shapes / "valid" / "images", tmp_path / "found"
        words = ("--input", images, "--prompt", "circle", "--output-dir", found)
        done = command("infer", "--checkpoint", out / "weights" / "last", *words)
        assert done.code == 0, done.err


@pytest.mark.slow
def test_odinws_evaluation_runs_at_nano(shapes, tmp_path) -> None:
    file, out = yamls.write(tmp_path / "theirs.yaml", yamls.odinw()), tmp_path / "out"
    words = ("--model", "nano", "--dataset-dir", shapes, "--output-dir", out)
    done = run("train", "--config", file, *words)
    assert done.returncode == 0, done.stderr
    assert "prompts are left out" in done.stdout
    assert _figures(out)["coco_eval_bbox_AP"] > 0.2


@pytest.mark.slow
def test_gold_runs_at_nano_on_any_dataset_with_masks(shapes, tmp_path) -> None:
    file, out = yamls.gold(tmp_path), tmp_path / "out"
    words = ("--model", "nano", "--dataset-dir", shapes, "--output-dir", out)
    done = run("train", "--config", file, *words)
    assert done.returncode == 0, done.stderr
    figures = _figures(out)
    assert figures["cgF1_eval_bbox_cgF1"] > 0.1
    assert figures["cgF1_eval_segm_cgF1"] > 0.1


@pytest.mark.parametrize(("size", "pixels"), [("nano", 128), ("small", 672), ("sam3", 1008)])
def test_images_have_the_models_resolution_at_every_size(shapes, tmp_path, size, pixels) -> None:
    file = yamls.write(tmp_path / "theirs.yaml", yamls.roboflow("train"))
    config, datasets = _prepare(file, size, **{"dataset.dir": str(shapes)})
    write_datasets(config, datasets, tmp_path)
    for node in used_splits(config).values():
        images = instantiate(node)
        assert {images[0].images[0].data.shape for _ in range(4)} == {(3, pixels, pixels)}
    sizes = instantiate(config.scratch.train_transforms[2].sizes)
    assert 0.45 < sizes[0] / pixels < 0.55
    if size == "sam3":
        assert sizes == list(range(480, 1008, 32))  # as upstream has it


def test_sizes_that_the_yaml_itself_makes_fit_are_left_alone(tmp_path, shapes) -> None:
    content = yamls.roboflow("train")
    content["scratch"]["resolution"] = 504
    file = yamls.write(tmp_path / "theirs.yaml", content)
    config, _ = _prepare(file, "sam3", **{"dataset.dir": str(shapes)})
    assert instantiate(config.scratch.train_transforms[2].sizes) == [480]


def test_an_override_of_the_resolution_is_the_models_too(tmp_path, shapes) -> None:
    file = yamls.write(tmp_path / "theirs.yaml", yamls.roboflow("train"))
    flags = {"dataset.dir": str(shapes), "scratch.resolution": "64"}
    config, _ = _prepare(file, **flags)
    assert config.trainer.model.resolution == config.scratch.resolution == 64


@pytest.mark.parametrize("change", [{"trainer.mode": "train_only"}, {"trainer.data.val": "null"}])
def test_a_validation_that_never_runs_needs_no_data(tmp_path, shapes, change) -> None:
    content = yamls.roboflow("train")
    for key in ("img_folder", "ann_file"):
        content["trainer"]["data"]["train"]["dataset"][key] = str(shapes / "train" / _FILES[key])
    file = yamls.write(tmp_path / "theirs.yaml", content)
    config, datasets = _prepare(file, **change)
    assert set(datasets) == {"train"}
    assert config.trainer.meters is None


def test_validation_loads_no_masks_that_nothing_decodes(tmp_path, shapes) -> None:
    content = yamls.roboflow("val")
    content["scratch"]["enable_segmentation"] = True
    content["trainer"]["data"]["val"]["dataset"]["load_segmentation"] = True
    file = yamls.write(tmp_path / "theirs.yaml", content)
    config, datasets = _prepare(file, **{"dataset.dir": str(shapes)})
    write_datasets(config, datasets, tmp_path)
    assert instantiate(config.trainer.data.val.dataset)[0].images[0].objects


def test_the_prompts_of_a_yaml_name_the_classes_of_its_own_dataset(shapes, tmp_path) -> None:
    source = read_json(shapes / "valid" / "_annotations.coco.json")
    for entry in source["categories"]:  # counted from 0, where upstream counts anew from 1
        entry["id"] -= 1
    for entry in source["annotations"]:
        entry["category_id"] -= 1
    assert sorted(entry["id"] for entry in source["categories"]) == [0, 1, 2]
    for entry in source["images"]:
        entry["file_name"] = f"images/{Path(entry['file_name']).name}"
    root = tmp_path / "set"
    shutil.copytree(shapes / "valid" / "images", root / "images")
    write_json(root / "annotations.json", source)
    content = yamls.odinw()
    content["paths"]["root"] = str(root)
    config, datasets = _prepare(yamls.write(tmp_path / "theirs.yaml", content))
    assert datasets["val"].class_names == ["round thing", "box", "tent"]
    assert set(datasets) == {"val"}
    write_datasets(config, datasets, tmp_path / "out")
    images = instantiate(config.trainer.data.val.dataset)
    asked = {query.query_text for image in images for query in image.find_queries}
    assert asked == {"round thing", "box", "tent"}


def _as_saco(shapes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a gold YAML, and the shapes in SA-Co's layout."""
    file = yamls.gold(tmp_path)
    config, datasets = _prepare(file, **{"dataset.dir": str(shapes)})
    write_datasets(config, datasets, tmp_path)
    return file, tmp_path / "dataset" / "val.json"


def test_perfect_answers_score_1_on_a_dataset_in_sacos_layout(shapes, tmp_path) -> None:
    _, written = _as_saco(shapes, tmp_path)
    truth = read_json(written)
    assert len(truth["images"]) == 2 * 3  # images, and classes that each is asked for
    answers = tmp_path / "answers.json"
    write_json(answers, [thing | {"score": 1.0} for thing in truth["annotations"]])
    for iou_type in ("bbox", "segm"):
        figures = CGF1Evaluator(str(written), iou_type).evaluate(str(answers))
        assert figures[f"cgF1_eval_{iou_type}_positive_micro_F1"] == pytest.approx(1, abs=1e-3)
        assert figures[f"cgF1_eval_{iou_type}_IL_recall"] == pytest.approx(1, abs=1e-3)


def test_sacos_own_files_are_read_where_the_yaml_says(shapes, tmp_path) -> None:
    file, written = _as_saco(shapes, tmp_path)
    for annotator in "ab":
        (tmp_path / f"gold_{annotator}.json").write_bytes(written.read_bytes())
    paths = {"paths.truth": str(tmp_path), "paths.images": "/"}
    config, datasets = _prepare(file, **paths)
    assert datasets == {}
    write_datasets(config, datasets, tmp_path / "out")
    resolved = OmegaConf.to_container(config.trainer, resolve=True)
    assert resolved["data"]["val"]["dataset"]["ann_file"] == str(tmp_path / "gold_a.json")
    evaluators = resolved["meters"]["val"]["valid"]["detection"]["pred_file_evaluators"]
    assert len(evaluators[0]["gt_path"]) == 2
    (tmp_path / "gold_b.json").unlink()
    content = read_json(tmp_path / "gold_a.json")
    content["images"][0]["file_name"] = "/nowhere.png"
    write_json(tmp_path / "gold_a.json", content)
    with pytest.raises(UserError) as raised:
        _prepare(file, **paths)
    assert len(raised.value.problems) == 2
    assert "gold_b.json" in raised.value.problems[0]
    assert "such as /nowhere.png" in raised.value.problems[1]


def test_masks_are_not_scored_where_objects_have_none(command, shapes, tmp_path) -> None:
    file = yamls.gold(tmp_path)
    source = read_json(shapes / "valid" / "_annotations.coco.json")
    for entry in source["annotations"]:
        entry["segmentation"] = []
    for split in ("train", "valid"):
        shutil.copytree(shapes / "valid" / "images", tmp_path / "set" / split / "images")
        write_json(tmp_path / "set" / split / "_annotations.coco.json", source)
    words = ("--model", "nano", "--dataset-dir", tmp_path / "set", "--output-dir", tmp_path / "out")
    done = command("train", "--config", file, *words)
    assert done.code == 2
    assert "objects have no mask" in done.err


def _video(content: dict[str, Any]) -> None:
    content["trainer"]["model"]["_target_"] = "sam3.model_builder.build_sam3_video_model"


def _literal_sizes(content: dict[str, Any]) -> None:
    content["scratch"]["val_transforms"][0]["sizes"] = 1008


def _unknown_interpolation(content: dict[str, Any]) -> None:
    content["trainer"]["data"]["val"]["dataset"]["img_folder"] = "${paths.images}"


def _no_file(content: dict[str, Any]) -> None:
    content["defaults"] = ["/configs/eval_base.yaml", "_self_"]


def _no_training(content: dict[str, Any]) -> None:
    content["trainer"] |= {"mode": "train"}
    del content["trainer"]["data"]["train"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_video, "'sam3.model_builder.build_sam3_video_model' is not built here"),
        (_literal_sizes, "data.val.dataset.transforms[0].sizes: 1008 px, and the model takes 128"),
        (_unknown_interpolation, "Interpolation key 'paths.images' not found"),
        (_no_file, "builds on '/configs/eval_base.yaml', and no folder above it holds"),
        (_no_training, "trainer.data.train: not in this YAML, and trainer.mode train needs it"),
        (lambda _: None, "no annotations at <YOUR_DATASET_DIR>/-grccs/test/_annotations.coco.json"),
    ],
)
def test_what_cannot_run_is_said_in_one_line(command, tmp_path, monkeypatch, change, said) -> None:
    monkeypatch.chdir(tmp_path)
    content = yamls.roboflow("val")
    change(content)
    file = yamls.write(tmp_path / "theirs.yaml", content)
    done = command("train", "--config", file, "--model", "nano")
    assert done.code == 2, done.out
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_weights_by_a_key_that_is_missing_are_the_default_ones(shapes, tmp_path, caplog) -> None:
    content = yamls.roboflow("val")
    content["trainer"]["model"]["checkpoint_path"] = "${paths.checkpoint_path}"
    with caplog.at_level("INFO"):
        flags = {"checkpoint": "", "dataset.dir": str(shapes)}  # none was given
        config = _prepare(yamls.write(tmp_path / "theirs.yaml", content), **flags)[0]
    assert config.trainer.model.checkpoint_path == str(NANO / "model.safetensors")
    assert "'paths.checkpoint_path' not found; --checkpoint names weights" in caplog.text


def test_a_base_without_data_says_so(command, tmp_path) -> None:
    yamls.gold(tmp_path)
    done = command("train", "--config", tmp_path / "configs" / "eval_base.yaml", "--model", "nano")
    assert done.code == 2
    assert "trainer.data.val: not in this YAML" in done.err
    assert len(done.err.splitlines()) == 1


def test_weights_without_a_mask_head_are_refused_where_masks_are_wanted(
    command, shapes, tmp_path
) -> None:
    from app.model import weights
    from app.model.build import build_model

    header = weights.describe(NANO)
    config = header.model.model_copy(update={"segmentation": False})
    bare = header.model_copy(update={"model": config})
    weights.save(build_model(config), tmp_path / "weights", bare)
    words = ("--checkpoint", tmp_path / "weights", "--dataset-dir", shapes)
    done = command("train", "--config", yamls.gold(tmp_path), *words)
    assert done.code == 2
    assert "has no mask head" in done.err
