"""What the model trains on: prompts, negatives, boxes and masks in step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from pycocotools import mask as mask_utils
from torchvision.transforms import v2

from app.config.compose import load_config
from app.datasets.augment import to_numbers
from app.datasets.build import load_splits
from app.datasets.coco import Annotation, Category, Dataset
from app.datasets.coco import Image as ImageRecord
from app.datasets.decoding import decoding_problems
from app.datasets.images import open_image
from app.datasets.queries import PromptChoice, QueryDataset, SemanticTargets, collate, resize_sizes
from app.datasets.square import to_square
from app.errors import UserError
from app.inference.predictor import normalise


def _transforms(*overrides: str):
    config = load_config(["model.resolution=64", "transforms=none", *overrides])
    return [instantiate(node) for node in config.transforms.train]


@pytest.fixture
def dataset(shapes: Path) -> Dataset:
    return load_splits(shapes).train


def test_boxes_and_masks_are_those_of_the_file(dataset: Dataset) -> None:
    """The mask that comes out of the transforms is the file's, resized, and fills its box."""
    items = QueryDataset(dataset, _transforms(), seed=0)
    for index, image in enumerate(dataset.images):
        datapoint = items[index]
        assert datapoint.images[0].data.shape == (3, 64, 64)
        assert {q.query_text for q in datapoint.find_queries} == set(dataset.class_names)
        annotations = dataset.annotations_by_image[image.id]
        found = [o for q in datapoint.find_queries for o in q.object_ids_output]
        assert len(found) == len(annotations)
        for query in datapoint.find_queries:
            category = query.inference_metadata.original_category_id
            wanted = [a for a in annotations if a.category_id == category]
            for i, annotation in zip(query.object_ids_output, wanted, strict=True):
                thing = datapoint.images[0].objects[i]
                x, y, w, h = annotation.bbox_xywh
                scale = torch.tensor([image.width, image.height, image.width, image.height])
                expected = torch.tensor([x + w / 2, y + h / 2, w, h]) / scale
                assert torch.allclose(thing.bbox.flatten(), expected, atol=1e-5)
                share = mask_utils.area(annotation.segmentation) / (image.width * image.height)
                assert thing.segment.float().mean().item() == pytest.approx(share, abs=0.02)


def test_absent_classes_are_negatives(dataset: Dataset) -> None:
    items = QueryDataset(dataset, _transforms(), seed=0)
    for index, image in enumerate(dataset.images):
        present = {a.category_id for a in dataset.annotations_by_image[image.id]}
        for query in items[index].find_queries:
            category = query.inference_metadata.original_category_id
            assert bool(query.object_ids_output) is (category in present)
            assert bool(query.semantic_target.any()) is (category in present)


def test_prompts_are_bounded_and_present_classes_come_first(dataset: Dataset) -> None:
    many = Dataset(
        dataset.images,
        dataset.annotations,
        (*dataset.categories, *(Category(100 + i, f"thing {i}") for i in range(50))),
    )
    items = QueryDataset(many, _transforms(), choice=PromptChoice(most=6), seed=0)
    absent = set()
    for index, image in enumerate(many.images):
        present = {a.category_id for a in many.annotations_by_image[image.id]}
        chosen = [q.inference_metadata.original_category_id for q in items[index].find_queries]
        assert len(chosen) == 6
        assert present <= set(chosen)
        absent |= set(chosen) - present
    assert len(absent) > 6  # drawn anew for each image
    one = QueryDataset(many, _transforms(), choice=PromptChoice(most=1), seed=0)[0]
    assert len(one.find_queries) == 1
    assert one.find_queries[0].object_ids_output


def _asked(dataset: Dataset, choice: PromptChoice, epochs: int = 20) -> list[list[str]]:
    items = QueryDataset(dataset, _transforms(), choice=choice, seed=0)
    return [[q.query_text for q in items[(epoch, 0)].find_queries] for epoch in range(epochs)]


def test_negatives_are_kept_for_what_the_image_lacks(dataset: Dataset) -> None:
    """One class, in each image: without negatives the answer is always yes."""
    image = dataset.images[0]
    own = [a for a in dataset.annotations if a.image_id == image.id]
    one = Dataset(
        (image,),
        tuple(replace(a, category_id=1) for a in own),
        (Category(1, "thing"),),
    )
    assert _asked(one, PromptChoice()) == [["thing"]] * 20
    choice = PromptChoice(negatives=2, near_misses=("almost a thing",), nouns=("yak", "harp"))
    asked = _asked(one, choice)
    assert all(prompts[0] == "thing" and len(set(prompts)) == 3 for prompts in asked)
    assert {p for prompts in asked for p in prompts[1:]} == {"almost a thing", "yak", "harp"}
    tight = _asked(one, replace(choice, most=2))
    assert all(prompts[0] == "thing" and len(prompts) == 2 for prompts in tight)


def test_negatives_have_no_object(dataset: Dataset) -> None:
    choice = PromptChoice(negatives=1, foreign=0.9, nouns=("yak",))
    items = QueryDataset(dataset, _transforms(), choice=choice, seed=0)
    asked = [q for epoch in range(8) for q in items[(epoch, 0)].find_queries]
    nouns = [q for q in asked if q.query_text == "yak"]
    assert nouns
    assert not any(q.object_ids_output or q.semantic_target.any() for q in nouns)
    batch = collate([items[(epoch, 0)] for epoch in range(8)])
    assert "yak" in batch.find_text_batch


def test_absent_classes_are_asked_as_often_as_others_are_shown_them(dataset) -> None:
    """Or a word that is rarely right would be known for wrong without a look at the image."""
    image, common = dataset.images[0], Category(1, "common")
    base = next(a for a in dataset.annotations if a.image_id == image.id)
    others = [replace(image, id=100 + i) for i in range(29)]
    shown = [replace(base, id=i, image_id=o.id, category_id=1) for i, o in enumerate(others, 1)]
    rare = tuple(Category(i, f"rare {i}") for i in range(2, 12))
    data = Dataset((image, *others), tuple(shown), (common, *rare))
    asked = _asked(data, PromptChoice(most=1, negatives=1, foreign=0), 200)
    share = sum(prompts == ["common"] for prompts in asked) / 200
    assert share == pytest.approx(30 / 40, abs=0.1)


def test_an_absent_class_takes_the_place_of_a_present_one_where_room_is_short(dataset) -> None:
    """Otherwise an image with more classes than prompts would never be asked for another."""
    image = dataset.images[0]
    base = next(a for a in dataset.annotations if a.image_id == image.id)
    present = tuple(replace(base, id=i, category_id=i) for i in range(1, 9))
    classes = tuple(Category(i, f"class {i}") for i in range(1, 17))
    asked = _asked(Dataset((image,), present, classes), PromptChoice(most=4, negatives=1), 60)
    for prompts in asked:
        lacking = [p for p in prompts if int(p.split()[1]) > 8]
        assert (len(prompts), len(lacking)) == (4, 1)
    assert len({p for prompts in asked for p in prompts}) == 16


def test_synonyms_are_drawn(dataset: Dataset) -> None:
    names = {c.name for c in dataset.categories}
    categories = tuple(replace(c, synonyms=(f"{c.name} too",)) for c in dataset.categories)
    asked = _asked(replace(dataset, categories=categories), PromptChoice())
    seen = {p for prompts in asked for p in prompts}
    own = {a.category_id for a in dataset.annotations_by_image[dataset.images[0].id]}
    for category in categories:
        if category.id in own:
            assert {category.name, f"{category.name} too"} <= seen
    assert names <= seen


def test_an_item_leaves_a_gpus_generator_alone(dataset: Dataset, monkeypatch) -> None:
    """Else the dropout of a step would come again with the image, and with its view."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    QueryDataset(dataset, _transforms(), seed=0, views=2)[(3, 1)]
    assert not seeds


def test_an_item_depends_on_seed_epoch_and_index_alone(dataset: Dataset) -> None:
    changes = ("transforms.augment.flip=0.5", "transforms.augment.scale=[0.5,1.0]")
    items = QueryDataset(dataset, _transforms(*changes), seed=0)
    pixels = [items[(epoch, 1)].images[0].data for epoch in range(6)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(items[(3, 1)].images[0].data, pixels[3])
    assert torch.equal(torch.get_rng_state(), state)  # the run's own state is left alone
    assert len({p.numpy().tobytes() for p in pixels}) > 1
    other = QueryDataset(dataset, _transforms(*changes), seed=1)
    assert any(not torch.equal(other[(e, 1)].images[0].data, pixels[e]) for e in range(6))


def test_a_batch_without_any_object(dataset: Dataset, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "empty.png")
    empty = Dataset((ImageRecord(1, tmp_path / "empty.png", 20, 10),), (), dataset.categories)
    batch = collate([QueryDataset(empty, _transforms(), seed=0)[0]])
    target = batch.find_targets[0]
    assert batch.img_batch.shape == (1, 3, 64, 64)
    assert target.segments.shape == (0, 64, 64)
    assert target.semantic_segments.shape == (3, 64, 64)
    assert target.num_boxes.tolist() == [0, 0, 0]


def test_an_object_without_a_mask_leaves_its_prompt_without_a_semantic_target(tmp_path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    rle = mask_utils.frPyObjects([[2, 2, 8, 2, 8, 8, 2, 8]], 10, 20)[0]
    masks = {"size": rle["size"], "counts": rle["counts"].decode()}
    annotations = (
        Annotation(1, 1, 1, (2, 2, 6, 6), masks, 36, False),
        Annotation(2, 1, 1, (10, 2, 6, 6), None, 36, False),
        Annotation(3, 1, 2, (2, 2, 6, 6), masks, 36, False),
    )
    image = ImageRecord(1, tmp_path / "a.png", 20, 10)
    data = Dataset((image,), annotations, (Category(1, "mixed"), Category(2, "masked")))
    datapoint = QueryDataset(data, _transforms(), seed=0)[0]
    has_target = {q.query_text: bool(q.semantic_target.any()) for q in datapoint.find_queries}
    assert has_target == {"mixed": False, "masked": True}
    valid = collate([datapoint]).find_targets[0].is_valid_segment
    assert sorted(valid.tolist()) == [False, True, True]
    assert isinstance(SemanticTargets(), SemanticTargets)


def test_training_sees_what_prediction_sees(dataset: Dataset) -> None:
    """To the bit; and within a grey level of upstream's processor, which resizes so itself."""
    record = dataset.images[0]
    trained = QueryDataset(dataset, _transforms(), seed=0)[0].images[0].data
    image = open_image(record.path)
    assert trained.dtype == torch.uint8
    assert torch.equal(to_numbers(trained[None], [()]), normalise(to_square(image, 64)))
    upstream = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.uint8, scale=True), v2.Resize(size=(64, 64))]
    )
    assert (to_square(image, 64).int() - upstream(image).int()).abs().max() <= 1


def test_resize_sizes() -> None:
    assert resize_sizes(128, 1.0) == [128]
    assert resize_sizes(1008, 480 / 1008) == list(range(496, 1009, 32))


def test_images_come_upright_and_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20), (255, 0, 0))
    image.putpixel((0, 0), (0, 255, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (20, 30)
    assert open_image(tmp_path / "a.png").getpixel((19, 0)) == (0, 255, 0)
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (8, 8)).save(tmp_path / f"x.{suffix}")
        assert open_image(tmp_path / f"x.{suffix}").mode == "RGB"


def test_images_that_cannot_be_decoded_are_found(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    paths = [tmp_path / "whole.png", tmp_path / "cut.png"]
    assert list(decoding_problems(paths)) == [tmp_path / "cut.png"]


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="no such image"):
        open_image(tmp_path / "b.png")
