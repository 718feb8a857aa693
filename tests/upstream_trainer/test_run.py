"""Upstream's own Trainer, on upstream-style YAML, with its traps defused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

from app.config.compose import CONFIGS
from app.model import weights
from app.upstream_trainer.schema import BASE_CONFIG, is_upstream_schema
from tests.helpers import PATIENCE, REPOSITORY, TINY

SMALL = ["scratch.num_workers=0", "scratch.mask_points=64"]


def run(*words: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """In a process of its own: upstream joins a process group and sets up logging."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_TOKEN": "hf_canary"}
    command = [sys.executable, "-m", "app", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )


def _check_loadable(folder: Path, shapes: Path, tmp_path: Path, weights: str, command) -> None:
    done = command(
        *("infer", "--checkpoint", folder / weights, "--input", shapes / "valid" / "images"),
        *(
            "--prompt",
            "circle",
            "--threshold",
            0,
            "--output-dir",
            tmp_path / f"found-{weights[:4]}",
        ),
        *("--resolution", 64),
    )
    assert done.code == 0, done.err
    results = json.loads((tmp_path / f"found-{weights[:4]}" / "predictions.json").read_text())
    assert results


@pytest.mark.slow
def test_the_base_config_runs_through_upstreams_trainer(command, shapes, tmp_path) -> None:
    folder = tmp_path / "out"
    done = run(
        *("train", "--use-base-config", "--model", "nano", "--dataset-dir", shapes),
        *("--epochs", 2, "--batch-size", 2, "--resolution", 64, "--output-dir", folder, *SMALL),
    )
    assert done.returncode == 0, done.stderr
    assert "hf_canary" not in done.stdout + done.stderr
    assert not [p for p in folder.rglob("*") if p.is_file() and b"hf_canary" in p.read_bytes()]
    stats = [
        json.loads(line) for line in (folder / "logs/train_stats.json").read_text().splitlines()
    ]
    assert [s["Trainer/epoch"] for s in stats] == [0, 1]
    assert stats[0]["Trainer/steps_train"] == 2  # 4 images, 2 a step
    assert "coco_eval_bbox_AP" in (folder / "logs" / "val_stats.json").read_text()
    checkpoint = torch.load(folder / "checkpoints/checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    _check_loadable(folder, shapes, tmp_path, "weights/last", command)
    _check_loadable(folder, shapes, tmp_path, "checkpoints/checkpoint.pt", command)


def _users_yaml(shapes: Path, folder: Path) -> dict:
    """As people copy it: Meta's builder, a cluster, test/ for validation, nothing saved."""
    content = yaml.safe_load(BASE_CONFIG.read_text())
    content["defaults"] = ["_self_"]
    content["paths"] = {"root": str(shapes)}
    content["scratch"] |= {"num_workers": 0, "mask_points": 64, "resolution": 64, "num_queries": 16}
    trainer = content["trainer"]
    trainer |= {"max_epochs": 1, "skip_saving_ckpts": True, "env_variables": None}
    trainer["model"] = {
        "_target_": "sam3.model_builder.build_sam3_image_model",
        "bpe_path": "/checkpoint/sam3/bpe_simple_vocab_16e6.txt.gz",
        "device": "cpus",
        "eval_mode": True,
        "enable_segmentation": "${scratch.enable_segmentation}",
        "checkpoint_path": None,
    }
    for split, name in (("train", "train"), ("val", "test")):
        dataset = trainer["data"][split]["dataset"]
        dataset["img_folder"] = f"${{paths.root}}/{name}/"
        dataset["ann_file"] = f"${{paths.root}}/{name}/_annotations.coco.json"
    meter = trainer["meters"]["val"]["valid"]["detection"]
    meter["pred_file_evaluators"][0]["gt_path"] = "${paths.root}/test/_annotations.coco.json"
    box = meter["postprocessor"]
    del box["use_original_sizes_box"]
    box["use_original_sizes"] = True
    masks = trainer["loss"]["all"]["loss_fns_find"][2]
    masks["_target_"] = "onevision.losses.loss_fns.Masks"
    trainer["loss"]["all"]["loss_fn_semantic_seg"]["_target_"] = (
        "sam3.losses.loss_fns.SemanticSegCriterion"
    )
    content["launcher"] |= {"gpus_per_node": 2, "experiment_log_dir": str(folder)}
    content["submitit"] = {"use_cluster": True, "port_range": [10000, 65000]}
    return content


@pytest.mark.slow
def test_a_yaml_in_upstreams_schema_with_its_traps(command, shapes, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(_users_yaml(shapes, folder)))
    assert is_upstream_schema(tmp_path / "theirs.yaml")
    done = run("train", "--config", tmp_path / "theirs.yaml", "--model", "nano", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("valid/_annotations.coco.json", "skip_saving_ckpts", "use_cluster", "no GPU"):
        assert said in done.stdout
    assert (folder / "checkpoints" / "checkpoint.pt").is_file()
    _check_loadable(folder, shapes, tmp_path, "weights/last", command)
    # What is there is not resumed from unasked.
    monkeypatch.chdir(tmp_path)
    again = command("train", "--config", tmp_path / "theirs.yaml", "--model", "nano")
    assert again.code == 2
    assert "--overwrite" in again.err


def test_schemas_are_told_apart() -> None:
    assert is_upstream_schema(BASE_CONFIG)
    assert not is_upstream_schema(CONFIGS / "train.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.max_epoch=3"], "Did you mean 'trainer.max_epochs'"),
        (["--dataset-dir", "nowhere"], "nowhere"),
        (["trainer.optim.optimizer._target_=os.system"], "not allowed"),
        (["--model", "nan"], "Did you mean 'nano'"),
        (["--model", "sam3"], "SAM License"),
    ],
)
def test_bad_input(command, shapes, tmp_path, monkeypatch, words, said) -> None:
    monkeypatch.setattr(weights, "cached_sam3", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first = ["train", "--use-base-config", "--model", "nano", "--dataset-dir", shapes]
    done = command(*first, "--output-dir", tmp_path / "out", *words, *TINY[:1])
    assert done.code == 2, done.out
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [True, False])
def test_pixels_of_more_than_8_bits_are_refused(command, shapes, tmp_path, flags) -> None:
    """Upstream's loader would cut them off at 255, and train on white images."""
    deep = shutil.copytree(shapes, tmp_path / "set")
    image = min((deep / "valid" / "images").iterdir())
    with Image.open(image) as drawn:
        gray = np.asarray(drawn.convert("L"), dtype=np.uint16)
    Image.fromarray(gray * 16).save(image)
    shutil.copytree(deep / "valid", deep / "test")
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(_users_yaml(deep, tmp_path / "out")))
    base = ("--use-base-config", "--dataset-dir", deep, *TINY[:1])
    words = base if flags else ("--config", tmp_path / "theirs.yaml")
    done = command("train", *words, "--model", "nano", "--output-dir", tmp_path / "out")
    assert done.code == 2, done.out
    assert f"{image.name}: has more than 8 bits a pixel" in done.err
    assert not (tmp_path / "out").exists()
