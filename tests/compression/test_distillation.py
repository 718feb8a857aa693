"""A student and its teacher: nothing is taught where they agree, of whatever size they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint

from app.compression import distillation
from app.compression.cut import Cut, cut_model, replace_text
from app.compression.distillation import (
    Distiller,
    Teacher,
    answer_losses,
    distance,
    forward_features,
    load_teacher,
    match_queries,
)
from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.datasets.prompts import NOUNS
from app.datasets.queries import collate
from app.inference.predictor import query_scores
from app.model import weights
from app.model.build import build_model
from app.training import features
from app.training.batches import query_dataset
from tests.helpers import MICRO, TINY, Command

OTHER = [*TINY, "model.vision.embed_dim=64", "model.d_model=32", "model.num_queries=8"]


def _model(config: Config, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_model(config.model, matcher=instantiate(config.loss.matcher))


def _batch(config: Config, folder: Path) -> BatchedDatapoint:
    data = query_dataset(config, load_splits(folder).train)
    return collate([data[0], data[1]])


@pytest.fixture
def config() -> Config:
    return load_config(TINY)


def _parts(
    student: Any, teacher: Teacher, batch: BatchedDatapoint, config: Config, words: Any = ()
) -> dict[str, float]:
    outputs, features = forward_features(student, batch, words, "answers")
    distiller = Distiller(teacher, config.distill, words)
    parts = distiller.losses(batch, words, "answers", outputs, features)
    return {name: value.item() for name, value in parts.items()}


def test_a_copy_has_nothing_to_learn(config: Config, shapes: Path) -> None:
    student, teacher = _model(config).eval(), Teacher(_model(config), config.model)
    batch = _batch(config, shapes)
    same = _parts(student, teacher, batch, config, ["circle", "dog"])
    assert same == pytest.approx(dict.fromkeys(distillation.PARTS, 0), abs=1e-5)
    with torch.no_grad():
        student.backbone.vision_backbone.trunk.blocks[0].mlp.fc1.weight.mul_(2)
    other = _parts(student, teacher, batch, config)
    assert other["distill_trunk"] > 1e-3
    assert other["distill_levels"] > 1e-4
    assert "distill_text" not in other


@pytest.mark.parametrize("resolution", [None, pytest.param(96, marks=pytest.mark.slow)])
def test_a_teacher_of_another_size(
    config: Config, shapes: Path, tmp_path: Path, resolution: int | None
) -> None:
    """Other widths, other queries, other resolution: all finite, and the student can learn it."""
    other = load_config(OTHER)
    weights.save(_model(other, 1), tmp_path, weights.Header(model=other.model))
    config = config.model_copy(
        update={
            "distill": config.distill.model_copy(
                update={"teacher": str(tmp_path), "resolution": resolution}
            )
        }
    )
    student = _model(config).train()
    teacher = load_teacher(config, student, torch.device("cpu"), torch.float32)
    assert teacher is not None
    assert teacher.config.resolution == (resolution or 64)
    batch, losses = _batch(config, shapes), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(8):
        outputs, features = forward_features(student, batch, ["circle"], "answers")
        distiller = Distiller(teacher, config.distill, ["circle"])
        parts = distiller.losses(batch, ["circle"], "answers", outputs, features)
        total = torch.stack([*parts.values()]).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_the_distance_of_features() -> None:
    torch.manual_seed(0)
    yours = torch.randn(2, 4, 8, 8)
    assert distance(yours, yours) == 0
    mine = yours + 0.5
    assert float(distance(mine, yours)) == pytest.approx(0.25 / float(yours.var()), rel=1e-5)
    # Of another width: what is alike stays alike under a rotation into more channels.
    wide = torch.linalg.qr(torch.randn(6, 4)).Q
    turned = torch.einsum("ed,bdhw->behw", wide, yours)
    assert float(distance(turned, yours)) == pytest.approx(0, abs=1e-9)
    assert float(distance(torch.randn(2, 6, 8, 8), yours)) > 0.5
    # Of another grid: compared on the student's.
    assert distance(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 8, 8)) == 0


def _outputs(logits: list[float], boxes: list[list[float]], presence: float) -> dict[str, Any]:
    return {
        "pred_logits": torch.tensor(logits).reshape(1, -1, 1),
        "pred_boxes": torch.tensor(boxes).reshape(1, -1, 4),
        "presence_logit_dec": torch.tensor([[presence]]),
    }


LEFT, RIGHT, SMALL = [0.25, 0.5, 0.2, 0.2], [0.75, 0.5, 0.2, 0.2], [0.5, 0.1, 0.05, 0.05]


def test_queries_are_matched_where_they_are() -> None:
    teacher = _outputs([4.0, 3.0, -9.0], [LEFT, RIGHT, SMALL], 8.0)
    student = _outputs([0.0, 0.0, 0.0], [SMALL, RIGHT, LEFT], 8.0)
    matches = match_queries(student, teacher)
    assert [*zip(*(index.tolist() for index in matches[:3]), strict=True)] == [
        *((0, 0, 2), (0, 1, 1), (0, 2, 0)),
    ]
    assert matches.taught.tolist() == [1, 2]
    losses = answer_losses(student, teacher, matches)
    assert losses["boxes"] == 0
    assert losses["giou"] == pytest.approx(0, abs=1e-6)
    assert losses["presence"] == pytest.approx(0, abs=1e-6)
    # By hand: -log(1/2) for each of three queries, less the entropy of each target.
    targets = torch.sigmoid(torch.tensor([4.0, 3.0, -9.0]))
    entropy = -(targets * targets.log() + (1 - targets) * (1 - targets).log()).sum()
    sure = float(query_scores(teacher).sum())
    by_hand = distillation.SCORES * (3 * math.log(2) - float(entropy)) / sure
    assert float(losses["scores"]) == pytest.approx(by_hand, rel=1e-5)


def test_what_the_teacher_does_not_see_teaches_no_boxes() -> None:
    teacher = _outputs([4.0, 3.0], [LEFT, RIGHT], -9.0)
    student = _outputs([0.0, 0.0], [SMALL, RIGHT], 2.0)
    matches = match_queries(student, teacher)
    assert matches.taught.numel() == 0
    losses = answer_losses(student, teacher, matches)
    assert losses["boxes"] < 1e-3
    assert losses["presence"] > 1


def test_fewer_queries_say_what_the_teacher_is_surest_of_and_more_of_them_nothing() -> None:
    teacher = _outputs([-4.0, 3.0, -5.0], [LEFT, RIGHT, SMALL], 8.0)
    one = match_queries(_outputs([0.0], [LEFT], 8.0), teacher)
    assert (one.queries.tolist(), one.theirs.tolist()) == ([0], [1])
    four = _outputs([-4.0, 3.0, -5.0, 5.0], [LEFT, RIGHT, SMALL, LEFT], 8.0)
    matches = match_queries(four, teacher)
    assert matches.queries.tolist() == [0, 1, 2]
    losses = answer_losses(four, teacher, matches)
    sure = max(float(query_scores(teacher).sum()), 1.0)
    by_hand = distillation.SCORES * math.log1p(math.exp(5.0)) / sure
    assert float(losses["scores"]) == pytest.approx(by_hand, rel=1e-4)


def test_a_student_learns_in_a_run_that_is_resumed_as_any_other(
    shapes: Path, tmp_path: Path, command: Command
) -> None:
    """The trunk, features, answers; stopped between two and resumed: the same to the bit."""
    config = load_config([*MICRO, "model.vision.depth=4", "model.vision.global_blocks=[1,3]"])
    teacher = _model(config)
    weights.save(teacher, tmp_path / "teacher", weights.Header(model=config.model))
    student, size = cut_model(teacher, config.model, Cut(blocks=(1, 3)))
    weights.save(student, tmp_path / "student", weights.Header(model=size))
    words = (
        *("train", "--recipe", "distill", "--dataset-dir", shapes, "--batch-size", "2"),
        *("--checkpoint", tmp_path / "student", "--teacher", tmp_path / "teacher"),
        *(
            "distill.trunk_epochs=1",
            "distill.feature_epochs=1",
            "evaluation.pictures=0",
            "evaluation.off_prompts=0",
        ),
        *("training.cache_features=false", "optim.schedule.name=constant"),
        "optim.schedule.warmup_steps=0",
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    done = command(*words, "--epochs", "3", "--output-dir", whole)
    assert done.code == 0, done.err
    assert f"teacher: {tmp_path / 'teacher'}" in done.out
    assert "too short" not in done.out
    done = command(*words, "--epochs", "2", "--output-dir", halves)
    assert done.code == 0, done.err
    assert (
        "note: --epochs 2 is too short for this teacher: the first 1 teach the trunk and the next "
        "1 its features, so that no answers are trained. Give --epochs above 2, or "
        "distill.trunk_epochs=0 distill.feature_epochs=0"
    ) in done.out
    done = command(*words, "--epochs", "3", "--output-dir", halves, "--resume")
    assert done.code == 0, done.err
    one, two = (weights.load(path / "weights" / "last")[0].state_dict() for path in (whole, halves))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    rows = (whole / "metrics.csv").read_text(encoding="utf-8").splitlines()
    heading, *epochs = (row.split(",") for row in rows)
    taught = [
        [bool(epoch[heading.index(f"train/{part}")]) for epoch in epochs]
        for part in ("distill_trunk", "distill_levels", "distill_outputs", "loss_bbox")
    ]
    assert taught == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    metrics = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))
    assert "segm/AP" in metrics

    weights.save(_model(config, 5), tmp_path / "teacher", weights.Header(model=config.model))
    done = command(*words, "--epochs", "4", "--output-dir", halves, "--resume")
    assert done.code == 2
    assert "teacher: " in done.err


def test_a_teacher_that_is_not_there(shapes: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        *("train", "--dataset-dir", shapes, "--model", "nano", "--teacher", tmp_path / "gone"),
        *("--output-dir", tmp_path / "out"),
    )
    assert done.code == 2
    assert "no such checkpoint" in done.err
    assert not (tmp_path / "out").exists()


def test_a_thin_text_encoder_learns_to_say_what_the_teachers_says(config: Config) -> None:
    """Words it was never taught come nearer as well: it learns the encoder, not a list."""
    thin = load_config([*TINY, "model.text.width=32", "model.text.depth=1"])
    teacher = Teacher(_model(config), config.model)
    student, size = replace_text(_model(config), config.model, thin.model)
    assert size.text.width == 32
    text = student.backbone.language_backbone
    optimizer = torch.optim.AdamW(text.parameters(), lr=3e-3)

    def far(words: list[str]) -> torch.Tensor:
        said = student.backbone.forward_text(words, device="cpu")
        truth = teacher.model.backbone.forward_text(words, device="cpu")
        used = ~truth["language_mask"].T
        return distance(
            said["language_features"][used].T, truth["language_features"][used].detach().T
        )

    taught, others = [*NOUNS[:60]], [*NOUNS[60:]]
    before, never = far(taught).item(), far(others).item()
    for _ in range(30):
        far(taught).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert far(taught).item() < 0.5 * before
    assert far(others).item() < 0.7 * never


def test_a_teachers_features_are_kept_and_teach_the_same(
    shapes: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FOLDER", tmp_path / "features")
    config = load_config(MICRO)
    weights.save(_model(config), tmp_path / "teacher", weights.Header(model=config.model))
    words = (
        *("train", "--dataset-dir", shapes, "--model", "nano", "--checkpoint", "none", "--epochs"),
        *("2", "--teacher", tmp_path / "teacher", "transforms=none", "evaluation.pictures=0"),
        *("evaluation.off_prompts=0", "training.precision=fp32", *MICRO),
    )
    losses = []
    for kept in ("false", "true"):
        out = tmp_path / kept
        done = command(*words, f"training.cache_features={kept}", "--output-dir", out)
        assert done.code == 0, done.err
        heading, *rows = (out / "metrics.csv").read_text(encoding="utf-8").splitlines()
        column = heading.split(",").index("train/loss")
        losses.append([float(row.split(",")[column]) for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    files = list((tmp_path / "features").rglob("*.safetensors"))
    assert len([f for f in files if f.stat().st_size > 8_000]) == 4  # each image, once
