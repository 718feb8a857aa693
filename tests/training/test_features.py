"""Features of frozen encoders, kept: the same losses, and never another input's features."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.compression.distillation import Teacher
from app.config.compose import load_config, load_model_config
from app.datasets.build import load_splits
from app.errors import UserError
from app.model.build import build_model
from app.training import checkpoints, features, store
from app.training.batches import Batches, query_dataset, to_device
from app.training.features import (
    Store,
    cache_encoders,
    cache_prompts,
    check_space,
    image_bytes,
)
from app.training.step import build_accelerator
from tests.helpers import MICRO, TINY, Command

NANO = load_model_config("nano", TINY)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(NANO).eval()


def test_the_full_size_takes_what_was_said() -> None:
    assert image_bytes(load_model_config("sam3"), torch.bfloat16) == pytest.approx(10.6e6, rel=0.01)


def test_an_encoder_is_asked_once_for_each_input(tmp_path: Path) -> None:
    model = _model()
    trunk, text = model.backbone.vision_backbone.trunk, model.backbone.language_backbone
    pixels = torch.rand(3, 3, 64, 64)
    plain, words = trunk(pixels)[-1], text(["circle", "dog"], device="cpu")
    asked = []
    for part in (trunk, text):
        compute = part.forward
        part.forward = lambda x, *a, compute=compute, **k: (
            asked.append(len(x)) or compute(x, *a, **k)
        )
    cache_encoders(model, ["vision", "text"], tmp_path, torch.float32)
    for _ in range(2):
        assert torch.allclose(trunk(pixels)[-1], plain, atol=1e-6)
        assert torch.equal(trunk(pixels[[2, 0]])[-1], trunk(pixels)[-1][[2, 0]])
        for ours, theirs in zip(text(["dog", "circle"], device="cpu"), words, strict=True):
            axis = 0 if theirs.dtype == torch.bool else 1
            assert torch.allclose(ours.flip(axis).float(), theirs.float(), atol=1e-6)
    assert asked == [3, 1, 1]
    trunk(torch.cat([pixels[:1], pixels[:1] + 1e-3]))
    assert asked == [3, 1, 1, 1]  # only what differs


def test_a_frozen_text_encoder_is_asked_once_for_each_prompt(monkeypatch) -> None:
    """Beside whatever prompts, and first in a validation; what it answers can be learned from."""
    model = _model()
    text = model.backbone.language_backbone
    plain = text(["circle", "dog", "cat"], device="cpu")
    asked, compute = [], text.forward
    text.forward = lambda words, *a, **k: asked.extend(words) or compute(words, *a, **k)
    cache_prompts(model, [])  # of an encoder that learns
    text(["circle"], device="cpu")
    text(["circle"], device="cpu")
    assert asked == ["circle", "circle"]
    del asked[:], text.forward
    monkeypatch.setattr(
        type(text), "forward", lambda _, w, *a, **k: asked.extend(w) or compute(w, *a, **k)
    )
    cache_prompts(model, ["vision", "text"])
    cache_prompts(model, ["text"])  # as of a teacher that shares it
    with torch.inference_mode():
        text(["dog", "circle"], device="cpu")
    weight = torch.ones(1, requires_grad=True)
    for words in (["circle", "dog", "cat"], ["cat", "dog", "circle"], ["dog"]):
        places = [["circle", "dog", "cat"].index(word) for word in words]
        mask, *others = text(words, device="cpu")
        assert torch.equal(mask, plain[0][places])
        for ours, theirs in zip(others, plain[1:], strict=True):
            torch.testing.assert_close(ours, theirs[:, places], rtol=0, atol=1e-6)
        (others[0] * weight).sum().backward()
    assert asked == ["dog", "circle", "cat"]
    monkeypatch.setattr(features, "PROMPTS", 3)
    text(["bird"], device="cpu")
    text(["cat"], device="cpu")
    assert asked == ["dog", "circle", "cat", "bird", "cat"]


def test_other_weights_are_kept_apart(tmp_path: Path) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    model, other = _model(), _model()
    with torch.no_grad():
        other.backbone.vision_backbone.trunk.blocks[0].mlp.fc1.weight.mul_(2)
    answers = []
    for one in (model, other):
        trunk = one.backbone.vision_backbone.trunk
        plain = trunk(pixels)[-1]
        cache_encoders(one, ["vision"], tmp_path, torch.float32)
        answers.append(trunk(pixels)[-1])
        assert torch.allclose(answers[-1], plain, atol=1e-6)
    assert not torch.allclose(*answers, atol=1e-4)


def test_bfloat16_halves_the_files_and_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    store, value = Store(tmp_path, torch.bfloat16), {"features": torch.rand(4, 8, 8)}
    store.write("ab12", value)
    file = tmp_path / "ab" / "ab12.safetensors"
    assert load_file(file)["features"].dtype == torch.bfloat16
    assert torch.allclose(store.read("ab12")["features"], value["features"], atol=0.01)
    file.write_bytes(file.read_bytes()[:50])
    assert store.read("ab12") is None
    assert store.read("cd34") is None


def test_another_precision_reads_none_of_it(shapes: Path, tmp_path: Path) -> None:
    config = load_config(TINY).model
    pixels = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    models = [build_model(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    exact = models[0].backbone.vision_backbone.trunk(pixels)[-1]
    for model, precision in zip(models, (torch.bfloat16, torch.float32), strict=True):
        cache_encoders(model, ["vision"], tmp_path, precision)
    rounded, kept = (model.backbone.vision_backbone.trunk(pixels)[-1] for model in models)
    assert torch.equal(rounded, exact.bfloat16().float())
    assert torch.equal(kept, exact)


@pytest.mark.parametrize("workers", [0, 1])
def test_features_come_with_the_images_that_have_them(
    workers: int, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a teacher with more pixels as well; no pixel is looked at for them."""
    config = load_config(
        [*MICRO, "transforms=strong", "dataset.views=2", f"training.num_workers={workers}"]
    )
    large = load_model_config("nano", [*MICRO, "model.resolution=128"])
    model, teacher = build_model(config.model).eval(), Teacher(build_model(large), large)
    trunks = [each.backbone.vision_backbone.trunk for each in (model, teacher.model)]
    asked, stores = [], []
    for trunk, each in zip(trunks, (model, teacher.model), strict=True):
        compute = trunk.forward
        trunk.forward = lambda x, compute=compute: asked.append(len(x)) or compute(x)
        stores += cache_encoders(each, ["vision"], tmp_path, torch.bfloat16)
    cpu = torch.device("cpu")
    data = query_dataset(config, load_splits(shapes).train)
    batches = Batches(config, data, build_accelerator(cpu), stores)
    answers, answers_by_view = [], {}
    for epoch in range(4):
        groups = list(batches.epoch(epoch))
        if epoch >= 2:
            monkeypatch.setattr(store, "_key", None)
        for [sent] in groups:
            batch = to_device(sent, cpu)
            ours = trunks[0](batch.img_batch)[-1]
            theirs = teacher.forward_features(batch, [], "trunk")[1].trunk
            of_image = batch.find_inputs[0].img_ids
            ids = batch.find_metadatas[0].original_image_id
            for index, maps in enumerate(zip(ours, theirs, strict=True)):
                image = ids[of_image == index][0].item()
                answers.append(maps)
                first = answers_by_view.setdefault((epoch % 2, image), maps)
                assert all(map(torch.equal, first, maps))
                assert {each.dtype for each in maps} == {torch.float32}
        monkeypatch.undo()
    assert len(answers) == 4 * len(answers_by_view) // 2 == 16
    assert sum(asked) == 2 * len(answers_by_view)  # by two models


def test_a_full_disk_only_takes_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is answered is the same, kept or not; said once."""
    (tmp_path / "file").touch()
    store, value = Store(tmp_path / "file", torch.bfloat16), {"features": torch.rand(4, 8)}
    logging.getLogger("app").propagate = True
    answers = [store.write(key, value)["features"] for key in ("ab", "cd")]
    assert all(torch.equal(answer, value["features"].bfloat16().float()) for answer in answers)
    assert store.read("ab") is None
    said = {record.getMessage() for record in caplog.records}
    assert len([message for message in said if "no longer cached" in message]) == 1


@pytest.mark.parametrize("left", [10**12, 0])
def test_a_run_that_goes_on_keeps_what_it_decided(
    left: int, shapes: Path, tiny_run: Path, tmp_path: Path, command: Command, monkeypatch
) -> None:
    """Views are drawn otherwise where features are kept: a disk that has filled changes nothing."""
    monkeypatch.setattr(features, "FOLDER", tmp_path / "features")
    words = [
        *("train", "--dataset-dir", shapes, "--checkpoint", tiny_run / "weights" / "best"),
        *("--method", "head", "evaluation.pictures=0", "optim.schedule.name=constant"),
        *("optim.schedule.warmup_steps=0", "--epochs"),  # as for any number of epochs
    ]

    def disk(free: int) -> None:
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _: Usage(free))

    Usage = type("Usage", (), {"__init__": lambda self, free: setattr(self, "free", free)})
    disk(left)
    monkeypatch.setattr(checkpoints, "check_space", lambda *_, **__: None)
    assert command(*words, 2, "--output-dir", tmp_path / "whole").code == 0
    assert command(*words, 1, "--output-dir", tmp_path / "cut").code == 0
    disk(10**12 - left)
    done = command(*words, 2, "--output-dir", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err
    ours, theirs = (
        load_file(tmp_path / name / "weights" / "last" / "model.safetensors")
        for name in ("cut", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ("cached in" in done.out) == (left > 0)


def _losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as lines:
        return [float(row["train/loss"]) for row in csv.DictReader(lines)]


@pytest.mark.parametrize("method", ["head", "lora-minimal"])
def test_losses_are_those_of_the_uncached_run(
    method: str, shapes: Path, tiny_run: Path, tmp_path: Path, command: Command, monkeypatch
) -> None:
    monkeypatch.setattr(features, "FOLDER", tmp_path / "features")
    words = [
        *("train", "--dataset-dir", shapes, "--checkpoint", tiny_run / "weights" / "best"),
        *("--method", method, "--epochs", 3, "--augmentation", "light", "dataset.views=2"),
        *("evaluation.pictures=0", "training.precision=fp32"),
    ]
    for cached in ("true", "false"):
        done = command(
            *words, f"training.cache_features={cached}", "--output-dir", tmp_path / cached
        )
        assert done.code == 0, done.err
        assert ("features of the frozen vision and text: cached in" in done.out) == (
            cached == "true"
        )
    assert _losses(tmp_path / "true") == pytest.approx(_losses(tmp_path / "false"), rel=1e-5)
    counts = [len(list(f.rglob("*.safetensors"))) for f in (tmp_path / "features").iterdir()]
    # Two views of four images, two validation images, and the drawn one of `app.model.golden`.
    assert 4 * 2 + 2 + 1 in counts
    assert len(counts) == 2  # the text encoder's


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"take .* GB in .* are free"):
        check_space(tmp_path, 10**15)


def test_views_come_again(shapes: Path) -> None:
    config = load_config([*TINY, "transforms=strong", "dataset.views=2"])
    data = query_dataset(config, load_splits(shapes).train)
    pixels = [data[(epoch, 0)].images[0].data for epoch in range(4)]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    asked = [[q.query_text for q in data[(epoch, 0)].find_queries] for epoch in range(8)]
    assert len({tuple(words) for words in asked}) > 2  # prompts are drawn anew
