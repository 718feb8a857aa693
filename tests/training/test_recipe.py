"""--recipe auto: by the number of images, said, and beaten by what the user sets."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest

from app.config.compose import load_config, read_yaml
from app.training.recipe import TIERS, auto
from tests.helpers import TINY, Command


@pytest.mark.parametrize(
    ("images", "epochs", "rank"),
    [
        *[(1, 40, 4), (10, 40, 4), (11, 40, 8), (499, 40, 8)],
        *[(500, 20, 16), (2000, 20, 16), (2001, 10, 32), (1_000_000, 10, 32)],
    ],
)
def test_tiers(images: int, epochs: int, rank: int) -> None:
    config = load_config(auto(images, "sam3", [], pretrained=True))
    assert config.training.epochs == epochs
    assert config.method.name == "lora"
    assert (config.method.lora.rank, config.method.lora.alpha) == (rank, 2 * rank)


def test_few_images_follow_the_paper() -> None:
    config = load_config(auto(5, "small", [], pretrained=True))
    assert (config.training.epochs, config.training.batch_size) == (40, 2)
    assert config.optim.lr_scale == 0.1
    assert config.loss.criterion["loss_fn_semantic_seg"] is None
    assert config.method.name == "full"  # LoRA is for the full size


def test_updates_grow_slower_than_the_data() -> None:
    sizes = [10, 499, 2000, 8000]
    updates = [
        n * t.epochs / t.batch_size / t.grad_accum for n, t in zip(sizes, TIERS, strict=True)
    ]
    assert updates == sorted(updates)
    growth = [later / earlier for earlier, later in pairwise(updates)]
    assert all(
        g <= later / earlier for g, (earlier, later) in zip(growth, pairwise(sizes), strict=True)
    )


def test_what_the_user_sets_wins(caplog: pytest.LogCaptureFixture) -> None:
    asked = ["training.epochs=3", "loss=full", "method=lora-minimal", "method.lora.rank=2"]
    with caplog.at_level(logging.INFO, logger="app"):
        logging.getLogger("app").propagate = True
        config = load_config([*auto(5, "sam3", asked, pretrained=True), *asked])
    assert config.training.epochs == 3
    assert config.loss.criterion["loss_fn_semantic_seg"] is not None
    assert (config.method.name, config.method.lora.rank) == ("lora-minimal", 2)
    assert config.method.lora.alpha == 8


def test_what_other_flags_decide_is_not_chosen() -> None:
    chosen = auto(100, "sam3", ["optim.lr_scale", "training.batch_size"], pretrained=True)
    assert not any(text.startswith(("optim.lr_scale", "training.batch_size")) for text in chosen)


def test_frozen_encoders_are_no_adapter() -> None:
    asked = ["method.freeze=[vision]"]
    config = load_config([*auto(100, "sam3", asked, pretrained=True), *asked])
    assert (config.method.name, config.method.freeze) == ("full", ["vision"])


def test_random_weights_keep_the_full_rate() -> None:
    config = load_config(auto(100, "sam3", [], pretrained=False))
    assert config.optim.lr_scale is None
    assert config.method.name == "full"


@pytest.mark.parametrize(
    ("images", "epochs", "every"),
    [(1, 90, 9), (10, 90, 9), (11, 45, 5), (20, 45, 5), (43, 45, 5), (240, 10, 1), (9000, 10, 1)],
)
def test_nano_sees_as_much_of_few_images_as_of_many(images: int, epochs: int, every: int) -> None:
    config = load_config(auto(images, "nano", [], pretrained=True))
    assert (config.training.epochs, config.training.batch_size) == (epochs, 4)
    assert (config.evaluation.every, config.training.save_every) == (every, every)
    assert (config.optim.lr_scale, config.optim.layer_decay) == (0.8, 1)
    own = load_config([*auto(images, "nano", ["training.epochs=3"], pretrained=True)])
    assert (own.evaluation.every, own.training.save_every) == (1, 1)
    lora = load_config([*auto(images, "nano", ["method=lora"], pretrained=True), "method=lora"])
    assert lora.optim.lr_scale is None


@pytest.mark.parametrize(
    ("images", "share", "epochs"),
    [(3, "0.5", 90), (20, "0.5", 90), (40, "0.5", 60), (20, "0.0", 45), (20, "much", 45)],
)
def test_nano_sees_images_with_example_boxes_more_often(
    images: int, share: str, epochs: int
) -> None:
    chosen = auto(images, "nano", [f"dataset.examples={share}"], pretrained=True)
    assert f"training.epochs={epochs}" in chosen


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 0.8),
        (["--recipe", "none"], None),
        (["optim.lr_scale=0.2"], 0.2),
        (["--checkpoint", "none"], None),
    ],
)
def test_nano_takes_it_unasked_from_its_own_weights(
    shapes: Path, tmp_path: Path, command: Command, words: list[str], rate: float | None
) -> None:
    done = command(
        *("train", "--model", "nano", "--dataset-dir", shapes, "--epochs", 1, *TINY, *words),
        *("--output-dir", tmp_path / "out", "evaluation.pictures=0"),
    )
    assert done.code == 0, done.err
    said = "recipe auto for 4 training images: training.batch_size=4"
    assert (said in done.out) == (rate is not None)
    assert read_yaml(tmp_path / "out" / "config_resolved.yaml")["optim"]["lr_scale"] == rate
