"""Stored prompts: the same answers without a text encoder, and a clear word for all others."""

from __future__ import annotations

import numpy as np
import pytest

from app.compression.cut import store_vocabulary
from app.datasets.images import open_image
from app.errors import UserError
from app.inference.predictor import Predictor
from app.model import weights
from app.model.bundled import NANO
from app.model.vocabulary import in_vocabulary, unknown_words
from tests.helpers import REPOSITORY

PROMPTS = ["circle", "red thing", "blue cross"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory):
    """A folder of weights with three prompts in the place of the text encoder."""
    model, header = weights.load(NANO)
    model, size = store_vocabulary(model, header.model, PROMPTS)
    folder = tmp_path_factory.mktemp("stored")
    weights.save(model, folder, header.model_copy(update={"model": size, "prompts": PROMPTS}))
    return folder


def test_stored_prompts_are_answered_as_before(stored) -> None:
    image = open_image(REPOSITORY / "examples" / "scene.png")
    whole, small = Predictor.load(NANO), Predictor.load(stored)
    assert small.prompts == tuple(PROMPTS)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:2]):
        one = whole.predict(image, prompts, threshold=0.05)
        other = small.predict(image, prompts, threshold=0.05)
        assert len(one) == len(other) > 1
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        scale = max(image.size)
        np.testing.assert_allclose(one.boxes_xyxy / scale, other.boxes_xyxy / scale, atol=1e-5)
    boxes = [(100, 40, 120, 120)]
    one = whole.predict(image, boxes_xywh=boxes, threshold=0.0)
    other = small.predict(image, boxes_xywh=boxes, threshold=0.0)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_the_text_encoder_is_gone(stored) -> None:
    model, header = weights.load(stored)
    assert not list(model.backbone.language_backbone.parameters())
    assert header.model.vocabulary == [*PROMPTS, "visual"]
    left = (stored / weights.FILE).stat().st_size
    whole, _ = weights.load(NANO)
    text = sum(p.nbytes for p in whole.backbone.language_backbone.parameters())
    assert left < sum(p.nbytes for p in whole.parameters()) - text + 300_000


def test_other_prompts_are_refused_with_those_that_are(stored, command, tmp_path) -> None:
    image = open_image(REPOSITORY / "examples" / "scene.png")
    said = "'circel': is not in the vocabulary .*: circle, red thing, blue cross. Did you mean"
    with pytest.raises(UserError, match=said):
        Predictor.load(stored).predict(image, ["circle", "circel"])
    done = command(
        *("infer", "--checkpoint", stored, "--input", REPOSITORY / "examples" / "scene.png"),
        *("--prompt", "circel", "--prompt", "dog", "--output-dir", tmp_path / "found"),
    )
    assert done.code == 2
    assert done.err.count("is not in the vocabulary") == 2
    assert not (tmp_path / "found").exists()


def test_classes_of_a_dataset_must_be_stored(stored, command, shapes, tmp_path) -> None:
    words = ("train", "--dataset-dir", shapes, "--checkpoint", stored)
    done = command(*words, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert "'rectangle': is not in the vocabulary" in done.err
    assert "'circle'" not in done.err
    assert not (tmp_path / "out").exists()


def test_any_word_can_be_asked_where_nothing_is_stored() -> None:
    assert unknown_words(None, ["dog"]) == []
    assert in_vocabulary(None, ["dog"]) == ["dog"]
    assert in_vocabulary(["cat", "visual"], ["dog", "cat"]) == ["cat"]


def test_a_model_with_stored_prompts_trains_on(shapes, command, tmp_path) -> None:
    classes = ["circle", "rectangle", "triangle"]
    model, header = weights.load(NANO)
    model, size = store_vocabulary(model, header.model, classes)
    header = header.model_copy(update={"model": size, "prompts": classes})
    weights.save(model, tmp_path / "stored", header)
    words = ("train", "--checkpoint", tmp_path / "stored", "--dataset-dir", shapes)
    few = ("--resolution", 64, "model.mask_points=64", "dataset.near_misses=[]")
    done = command(*words, "--plan=measure", *few)
    assert done.code == 0, done.err
    done = command(*words, "--epochs", 1, "--output-dir", tmp_path / "run", *few)
    assert done.code == 0, done.err
    tuned, header = weights.load(tmp_path / "run" / "weights" / "best")
    assert header.model.vocabulary == [*classes, "visual"]
    before, after = model.state_dict(), tuned.state_dict()
    key = "transformer.decoder.query_embed.weight"
    assert not before[key].equal(after[key])
    kept = "backbone.language_backbone.memory"
    np.testing.assert_array_equal(before[kept], after[kept])
