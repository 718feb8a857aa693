"""What a server keeps is a sound dataset, bounded, of the images that it was least sure of."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.datasets.build import load_splits
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Query
from app.inference.masks import encode_masks
from app.model.score_counts import BINS, ScoreCounts
from app.serving.keep import Keeper, doubt_of
from app.serving.settings import Limits
from app.serving.uploads import Uploaded, check
from tests.helpers import Command, log_lines, until
from tests.serving.test_metrics import Told, query

FINDER: Any = Told(prompts=("car", "bus"), threshold=0.5)
ASKED = (query("car", "bus", threshold=0.5),)


def picture(number: int, form: str = "JPEG", **options: Any) -> Uploaded:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return check(buffer.getvalue(), Limits(), f"{number}")


def answer(*pairs: tuple[int, float], best: float = 0.1, **change: Any) -> Detections:
    """Detections of cars (0) and buses (1), each a mask of the same size."""
    logits = np.full((40, 60), -1.0, np.float32)
    logits[10:30, 10:35] = 1
    masks = encode_masks([logits] * len(pairs), 40, 60)
    return Detections(
        boxes_xyxy=np.array([[10, 10, 35, 30]] * len(pairs), np.float32).reshape(-1, 4),
        scores=np.array([score for _, score in pairs], np.float32),
        prompt_ids=np.array([prompt for prompt, _ in pairs], np.int64),
        **{"prompts": ("car", "bus"), "masks": masks, "width": 60, "height": 40} | change,
        best_score=max([best, *(score for _, score in pairs)]),
    )


def offer(keeper: Keeper, image: Uploaded, found: Detections, asked: Any = ASKED) -> None:
    """Offer an image, and wait until it is kept or passed over."""
    keeper.offer(FINDER, image, asked, found)
    until(lambda: not keeper._busy.locked(), "the image is kept")


def kept(folder: Path) -> list[str]:
    """The doubts of what is kept, as the JSON lists it; each file is there, and no other."""
    content = json.loads((folder / "train" / "_annotations.coco.json").read_text())
    listed = {Path(image["file_name"]).name for image in content["images"]}
    assert listed == {path.name for path in (folder / "train" / "images").iterdir()}
    return sorted((name.partition("_")[0] for name in listed), reverse=True)


def test_doubt_is_nearness_to_the_threshold_and_rareness() -> None:
    assert doubt_of(FINDER, answer((0, 0.5))) == 1
    assert doubt_of(FINDER, answer((0, 0.95), (1, 0.6))) == pytest.approx(0.8)
    assert doubt_of(FINDER, answer(best=0.45)) == pytest.approx(0.9)  # nearly found
    assert doubt_of(FINDER, answer(best=0.0)) == 0
    often = [0] * BINS
    often[19], often[14] = 99, 1  # of the validation images nearly all scored 0.95 and more
    known: Any = Told(prompts=("car",), threshold=0.5, scores=ScoreCounts(9, {}, {"car": often}))
    sure, odd = (doubt_of(known, answer((0, score))) for score in (0.97, 0.72))
    assert sure == pytest.approx(0.06 / 2, abs=1e-3)
    assert odd == pytest.approx((0.56 + 0.8) / 2, abs=1e-3)


def test_the_sample_is_a_dataset_to_label(tmp_path: Path, command: Command) -> None:
    keeper = Keeper(tmp_path / "kept")
    photo = picture(1)
    offer(keeper, photo, answer((0, 0.55), (1, 0.9)))
    offer(keeper, picture(2, "PNG"), answer(best=0.49))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    offer(keeper, picture(3, exif=turned), answer((1, 0.6), width=40, height=60, masks=None))
    assert kept(tmp_path / "kept") == ["0.9800", "0.9000", "0.8000"]
    names = sorted(path.name for path in (tmp_path / "kept/train/images").iterdir())
    assert [Path(name).suffix for name in names] == [".jpg", ".jpg", ".png"]
    assert (tmp_path / "kept/train/images" / names[1]).read_bytes() == photo.data
    done = command("data", "check", tmp_path / "kept", "--output-dir", tmp_path / "report")
    assert done.code == 0, done.err
    splits = load_splits(tmp_path / "kept", valid_fraction=0.34, test_fraction=0)
    assert splits.train.class_names == ["car", "bus"]
    found = [a for part in (splits.train, splits.valid) for a in part.annotations]
    assert sorted(a.category_id for a in found) == [1, 2, 2]
    assert sum(a.segmentation is not None for a in found) == 2


def test_only_the_most_doubtful_are_kept(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, most=3)
    for number, score in enumerate((0.6, 0.7, 0.65, 0.52, 0.72, 0.9, 0.55)):
        offer(keeper, picture(number), answer((0, score)))
    assert kept(tmp_path) == ["0.9600", "0.9000", "0.8000"]
    offer(keeper, picture(3), answer((0, 0.51)))  # is there already
    assert len(kept(tmp_path)) == 3


def test_what_was_not_asked_for_all_classes_is_passed_over(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    doubtful = answer((0, 0.5))
    offer(keeper, picture(1), answer((0, 0.5), prompts=("car",)), [query("car")])
    offer(keeper, picture(1), answer((0, 0.5), prompts=("car", "cat")), [query("car", "cat")])
    boxes: Query = query("car", "bus", boxes=((1, 2, 3, 4),))
    offer(keeper, picture(1), doubtful, [boxes])
    assert not (tmp_path / "train").exists()
    offer(keeper, picture(1), doubtful)
    assert kept(tmp_path) == ["1.0000"]


def test_a_restart_goes_on(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, most=2)
    offer(keeper, picture(1), answer((0, 0.55), (1, 0.8)))
    orphan = tmp_path / "train" / "images" / f"0.9990_{'ab' * 8}.jpg"  # a killed server's
    orphan.write_bytes(picture(9).data)
    mine = tmp_path / "train" / "images" / "mine.txt"
    mine.write_text("a user's")
    keeper = Keeper(tmp_path, most=2)
    assert not orphan.exists()
    assert mine.exists()
    mine.unlink()
    for number, score in ((2, 0.6), (3, 0.5)):
        offer(keeper, picture(number), answer((0, score)))
    assert kept(tmp_path) == ["1.0000", "0.9000"]
    content = json.loads((tmp_path / "train" / "_annotations.coco.json").read_text())
    assert len(content["annotations"]) == 3
    assert [category["name"] for category in content["categories"]] == ["car", "bus"]


def test_a_folder_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "kept")
    offer(keeper, picture(1), answer((0, 0.5)))
    shutil.move(tmp_path / "kept", tmp_path / "to-label")
    offer(keeper, picture(2), answer((0, 0.6)))
    assert kept(tmp_path / "kept") == ["0.8000"]
    assert kept(tmp_path / "to-label") == ["1.0000"]


def test_what_others_have_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log_lines(monkeypatch)
    keeper = Keeper(tmp_path)
    offer(keeper, picture(1), answer((0, 0.5)))
    labels = tmp_path / "train" / "_annotations.coco.json"
    labels.write_text(labels.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    before = labels.read_bytes()
    for number in (2, 3):
        offer(keeper, picture(number), answer((0, 0.5)))
    assert labels.read_bytes() == before
    assert len(kept(tmp_path)) == 1
    assert len([line for line in lines if "was changed" in line]) == 1
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    (other / "train" / "_annotations.coco.json").write_text('{"info": {"description": "mine"}}')
    with pytest.raises(UserError, match="is there already"):
        Keeper(other)


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log_lines(monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    keeper = Keeper(tmp_path / "kept")
    (tmp_path / "kept" / "train").mkdir()
    (tmp_path / "kept" / "train" / "images").symlink_to(tmp_path / "elsewhere")
    offer(keeper, picture(1), answer((0, 0.5)))
    assert not [*(tmp_path / "elsewhere").iterdir()]
    assert any("is a link" in line for line in lines)
