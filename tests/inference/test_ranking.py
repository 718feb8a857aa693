"""Which image to label next: what is unsure and new comes first, and of two alike one alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.ops import box_convert

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.images import open_image
from app.datasets.synthetic.shapes import make_shapes
from app.inference import Predictor, ranking
from app.inference.ranking import Seen, rank, weights_of
from app.model.build import build_model
from app.model.bundled import NANO
from tests.helpers import MICRO, Command, once

CONFIG = load_config(MICRO).model
ONE = np.ones(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = {"train": 8, "valid": 1, "width": 96, "height": 64, "seed": 5, "fog": 0}
    return once(tmp_path_factory, "to-rank", lambda out: make_shapes(out, **drawn))


def _seen(folder: Path, doubts: list[float], features: list[list[float]]) -> list[Seen]:
    images = sorted((folder / "train" / "images").iterdir())
    return [
        Seen(image, np.array([d]), np.array([d]), np.array([d]), np.array(f) / np.linalg.norm(f))
        for image, d, f in zip(images, doubts, features, strict=False)
    ]


def test_doubt_and_distance_decide(folder: Path) -> None:
    """Two of much doubt that look alike: the second comes after one that is unlike them."""
    features = [[1, 0], [1, 0.02], [0, 1], [1, 0.5]]
    seen = _seen(folder, [0.9, 0.89, 0.5, 0.1], features)
    ranked = rank(seen, ["a"], 3, weights=ONE)
    assert [each.image for each in ranked] == [seen[i].image for i in (0, 2, 3)]
    assert ranked[0].distance == 2.0
    assert ranked[1].distance == pytest.approx(1.0)
    assert [each.doubt for each in ranked] == pytest.approx([0.9, 0.5, 0.1])


def test_what_is_like_the_labelled_images_waits(folder: Path) -> None:
    seen = _seen(folder, [0.9, 0.5], [[1, 0], [0, 1]])
    (first, *_) = rank(seen, ["a"], 2, weights=ONE, labelled=[np.array([1.0, 0.0])])
    assert first.image == seen[1].image


def test_near_duplicates_are_asked_for_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = sorted((folder / "train" / "images").iterdir())
    for name, image in (("1.png", source[0]), ("2.png", source[0]), ("3.png", source[1])):
        shutil.copy(image, tmp_path / "a" / name)
    images = sorted((tmp_path / "a").iterdir())
    seen = [Seen(image, ONE, ONE, ONE, np.array([1.0, 0.0])) for image in images]
    names = {each.image.name for each in rank(seen, ["a"], 3, weights=ONE)}
    assert len(names) == 2
    assert "3.png" in names


def test_rare_classes_weigh_more(folder: Path) -> None:
    dataset = load_splits(folder).train
    names = {c.id: c.name for c in dataset.categories}
    counts = [sum(names[a.category_id] == n for a in dataset.annotations) for n in names.values()]
    weights = weights_of([*names.values(), "never"], dataset)
    assert weights[-1] == 1.0
    assert np.allclose(weights[:-1], 1 / np.sqrt(1 + np.array(counts)))
    assert (weights_of(["a", "b"], None) == 1).all()


def test_the_signs_are_those_of_the_outputs(folder: Path) -> None:
    torch.manual_seed(3)
    predictor = Predictor(build_model(CONFIG), CONFIG, threshold=0.4)
    path = sorted((folder / "train" / "images").iterdir())[0]
    image = open_image(path)
    seen = ranking.look_at(predictor, path, image, ["circle", "dog"])
    for place, prompt in enumerate(["circle", "dog"]):
        best = predictor.predict(image, [prompt], threshold=0.0).best_score
        assert seen.margin[place] == pytest.approx(1 - abs(best - 0.4) / 0.6, abs=1e-5)
    assert ((seen.doubts >= 0) & (seen.doubts <= 1)).all()
    assert np.linalg.norm(seen.feature) == pytest.approx(1.0)
    features, _ = predictor.answers(image, ["circle"])
    mean = features["vision_features"][0].mean(dim=(1, 2)).numpy()
    assert np.allclose(seen.feature, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_mirrored_answer_is_no_disagreement() -> None:
    """Boxes that are mirrored with their image agree; others differ by what they share."""
    boxes = torch.tensor([[[0.3, 0.5, 0.2, 0.4], [0.7, 0.2, 0.1, 0.1]]])
    outputs = {
        "pred_logits": torch.tensor([[[2.0], [1.0]]]),
        "presence_logit_dec": torch.tensor([[9.0]]),
        "pred_boxes": boxes,
    }
    turned = boxes.clone()
    turned[..., 0] = 1 - turned[..., 0]
    assert ranking._disagreement(outputs, {**outputs, "pred_boxes": turned}) == pytest.approx(0)
    nothing = {**outputs, "presence_logit_dec": torch.tensor([[-9.0]])}
    assert ranking._disagreement(outputs, nothing) == pytest.approx(1)
    assert ranking._disagreement(nothing, nothing) == pytest.approx(0)
    far = {**outputs, "pred_boxes": boxes}
    assert box_convert(boxes, "cxcywh", "xyxy")[0, 0, 0] == pytest.approx(0.2)
    assert ranking._disagreement(outputs, far) > 0.5


def test_the_command(command: Command, folder: Path, tmp_path: Path) -> None:
    images, out = folder / "train" / "images", tmp_path / "rank"
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = tmp_path / "list.txt"
    paths = [*sorted(images.iterdir()), tmp_path / "broken.png"]
    listed.write_text("".join(f"{path}\n" for path in paths))
    words = ("rank", "--images", listed, "--checkpoint", NANO, "--top", 3, "--prompt", "circle")
    done = command(*words, "--labelled", folder / "valid", "--output-dir", out)
    assert done.code == 3, done.err
    assert "left out: " in done.out + done.err
    with (out / "rank.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    chosen = (out / "rank.txt").read_text().splitlines()
    assert chosen == [str(Path(row["image"]).resolve()) for row in rows]
    tasks = json.loads((out / "tasks.json").read_text())
    assert [task["data"]["rank"] for task in tasks] == list(range(1, len(rows) + 1))
    for task, row in zip(tasks, rows, strict=True):
        assert task["data"]["image"] == f"/data/local-files/?d={Path(row['image']).name}"
        (prediction,) = task["predictions"]
        assert prediction["score"] == pytest.approx(1 - float(row["doubt"]), abs=1e-4)
        assert prediction["result"] == []
    page = (out / "rank.html").read_text()
    assert page.count("<img") == 3
    assert Path(chosen[0]).name in page
    again = command(*words, "--output-dir", out)
    assert again.code == 2
    assert "holds a list already" in again.err


def test_a_mirrored_image_is_as_doubtful(folder: Path) -> None:
    predictor = Predictor.load(NANO, device="cpu")
    path = sorted((folder / "train" / "images").iterdir())[1]
    image = Image.open(path).convert("RGB")
    one = ranking.look_at(predictor, path, image, ["circle"])
    other = ranking.look_at(predictor, path, ImageOps.mirror(image), ["circle"])
    assert one.mirror == pytest.approx(other.mirror, abs=1e-4)
