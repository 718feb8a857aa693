"""The ring, closed: proposals, a scripted person, two rounds, and a champion that gets better."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.datasets.build import load_splits, survey
from app.datasets.coco import Dataset
from app.datasets.editing import LabelFile, Shape
from app.datasets.synthetic.shapes import make_shapes
from app.ring.review import Review, review
from app.ring.rounds import rounds
from tests.helpers import REPOSITORY, Command

NANO = REPOSITORY / "app" / "assets" / "nano"
FIRST, EVERY = 6, 4  # labelled images at the beginning; more that begin a round
VALID = 20  # images of the validation set: enough to show a gain
TOP = 8  # images that are asked for after a round
TRAINING = ["training.epochs=10", "loss=boxes", "training.precision=fp32", "optim.lr_scale=1"]
TRAINING += ["evaluation.every=10", "evaluation.pictures=0", "training.save_every=5"]


@dataclass
class Person:
    """Somebody who knows what is in the images, and labels in the page's file what is proposed.

    Attributes:
        truth: of all images.
        folder: of the images and their labels.
    """

    truth: Dataset
    folder: Path

    def label(self, names: set[str]) -> None:
        """Correct what is proposed in these images, and finish them."""
        file = LabelFile(self.folder)
        classes = {category.id: category.name for category in self.truth.categories}
        for image in self.truth.images:
            if image.path.name not in names:
                continue
            shapes = [
                Shape(None, classes[each.category_id], each.bbox_xywh, each.segmentation, None)
                for each in self.truth.annotations_by_image[image.id]
            ]
            now = file.read(image.path.name)
            file.write(image.path.name, now.version, shapes, finished=True)


@pytest.fixture
def person(tmp_path: Path) -> Person:
    """Twenty images of shapes that nano does not know, beside a validation set of boxes."""
    drawn = {"kinds": ["star", "ring"], "label_by": "kind", "fog": 0, "width": 160, "height": 120}
    make_shapes(tmp_path / "drawn", train=20, valid=VALID, seed=8, **drawn)
    splits = load_splits(tmp_path / "drawn")
    (tmp_path / "photos").mkdir()
    for image in splits.train.images:
        shutil.copy(image.path, tmp_path / "photos")
    shutil.copytree(tmp_path / "drawn" / "valid", tmp_path / "validation")
    labels = tmp_path / "validation" / "_annotations.coco.json"
    document = json.loads(labels.read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    labels.write_text(json.dumps(document))
    person = Person(splits.train, tmp_path / "photos")
    person.label({image.path.name for image in splits.train.images[:FIRST]})
    settings = {
        "labels": "photos",
        "images": "photos",
        "validation": "validation",
        "folder": "ring",
        "champion": str(NANO),
        "every": EVERY,
        "top": TOP,
        "classes": ["star", "ring"],
        "to": "page",
        "train": TRAINING,
    }
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(settings))
    return person


def _proposed(folder: Path) -> set[str]:
    """The images that a person is to look at."""
    listed = (folder / "chosen.txt").read_text().splitlines()
    return {Path(line).name for line in listed}


@pytest.mark.slow
def test_two_rounds(command: Command, person: Person, tmp_path: Path, stop_after: Any) -> None:
    """The first is stopped in its training, and goes on by the same command."""
    ring, words = tmp_path / "ring", ("ring", tmp_path / "ring.yaml")
    stop_after(3)
    stopped = command(*words)
    assert stopped.code == 143, stopped.err
    assert not rounds(ring)
    done = command(*words)
    assert done.code == 0, done.err
    (first,) = rounds(ring)
    assert (first.images, first.number) == (FIRST, 1)
    assert first.after > first.before + 0.02
    assert first.is_better
    assert first.low > 0
    state = json.loads((ring / "ring.json").read_text())
    assert state["champion"] == str(ring / "rounds/001/run/weights/best")
    proposed = _proposed(ring / "rounds" / "001")
    assert len(proposed) == TOP
    known = {image.path.name for image in person.truth.images[:FIRST]}
    assert not proposed & known
    counts = LabelFile(person.folder).counts()
    shown = {name for name, (finished, _, proposals) in counts.items() if proposals}
    assert shown  # in the page, where they wait for a person
    assert shown <= proposed
    assert not any(counts[name][0] for name in shown)
    waiting = command(*words)
    assert waiting.code == 0
    assert f"0 images labelled since the last round; {EVERY} begin the next" in waiting.out
    assert len(rounds(ring)) == 1

    person.label(proposed)
    settings = yaml.safe_load((tmp_path / "ring.yaml").read_text())
    settings["train"] = [*TRAINING, "training.epochs=2"]
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(settings))
    done = command(*words)
    assert done.code == 0, done.err
    _, second = rounds(ring)
    assert second.images == FIRST + TOP
    assert second.before == pytest.approx(first.after)
    assert second.review.images == TOP
    looked = second.review
    proposals = survey(ring / "rounds/001/proposals").splits["train"]
    count = looked.unchanged + looked.moved + looked.removed
    assert count == len(proposals.annotations)
    environment = json.loads((ring / "rounds/002/run/environment.json").read_text())
    assert environment["data"]["train"]["images"] == FIRST + TOP
    page = (ring / "ring.html").read_text()
    assert f"{second.low:+.3f} to {second.high:+.3f}" in page
    assert "Labels worth a second look" in page


def test_what_would_spoil_the_verdict_is_refused(
    command: Command, person: Person, tmp_path: Path
) -> None:
    shutil.copy(
        next((tmp_path / "validation" / "images").iterdir()),
        tmp_path / "photos" / person.truth.images[0].path.name,
    )
    done = command("ring", tmp_path / "ring.yaml")
    assert done.code == 2
    assert "1 image of the validation set" in done.err
    document = json.loads((tmp_path / "photos" / "_annotations.coco.json").read_text())
    document["annotations"][0] |= {"source": "proposal", "score": 0.4}
    (tmp_path / "photos" / "_annotations.coco.json").write_text(json.dumps(document))
    done = command("ring", tmp_path / "ring.yaml")
    assert done.code == 2
    assert "1 objects are proposals that nobody has looked at" in done.err


def test_a_folder_without_labels_gets_its_first_proposals(
    command: Command, tmp_path: Path, shapes: Path
) -> None:
    """What a person has begun is not written over."""
    for name in ("photos", "validation"):
        (tmp_path / name).mkdir()
    images = sorted(shapes.glob("train/images/*"))
    for image in images:
        shutil.copy(image, tmp_path / "photos")
    shutil.copytree(shapes / "valid", tmp_path / "validation", dirs_exist_ok=True)
    settings = {"labels": "photos", "images": "photos", "validation": "validation", "to": "page"}
    settings |= {"folder": "ring", "champion": str(NANO), "classes": ["circle", "square"]}
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(settings))
    file = LabelFile(tmp_path / "photos")
    first = file.names()[0]
    begun = Shape(None, "moon", (1, 1, 9, 9), None, None)
    kept = file.write(first, file.read(first).version, [begun], finished=False)
    done = command("ring", tmp_path / "ring.yaml")
    assert done.code == 0, done.err
    assert file.read(first) == kept
    counts = file.counts()
    assert sum(proposals for _, _, proposals in counts.values()) > 0
    assert not any(finished for finished, _, _ in counts.values())
    assert sorted(file.classes)[0] == "circle"


def test_settings_are_checked_whole(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "ring.yaml"
    file.write_text("labels: a\nimages: b\nvalidation: c\nchampion: d\ntrain: [epochs]\n")
    done = command("ring", file)
    assert done.code == 2
    file.write_text(file.read_text() + "to: page\nfolder: a/ring\nlabel_studio: 3\n")
    done = command("ring", file)
    assert done.code == 2
    named = ("labels", "images", "validation", "champion", "'epochs' is no KEY=VALUE")
    for name in (*named, "images: to: page needs them", "folder: must not lie"):
        assert name in done.err
    file.write_text("labels: a\never: 3\n")
    done = command("ring", file)
    assert done.code == 2
    assert "ever: nothing reads this key" in done.err
    assert command("ring", tmp_path / "none.yaml").code == 2


def test_a_review_counts_what_a_person_did(shapes: Path, tmp_path: Path) -> None:
    truth = load_splits(shapes).train
    image = max(truth.images, key=lambda each: len(truth.annotations_by_image[each.id]))
    objects = truth.annotations_by_image[image.id]
    assert len(objects) >= 3
    x, y, w, h = objects[1].bbox_xywh
    moved = replace(objects[1], segmentation=None, bbox_xywh=(x, y, w * 0.8, h * 0.9))
    far = replace(objects[2], segmentation=None, bbox_xywh=(0.0, 0.0, 1.0, 1.0))
    proposed = Dataset((image,), (objects[0], moved, far), truth.categories)
    found = review(proposed, truth)
    assert found == Review(1, unchanged=1, moved=1, removed=1, added=len(objects) - 2)
    assert found.accepted == pytest.approx(1 / 3)
    other = review(proposed, truth.subset(i.id for i in truth.images if i.id != image.id))
    assert other == Review()
    assert other.accepted is None
