"""Decide what each column is: as the user says, else by its type and name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from app.datasets.huggingface.boxes import CONVENTIONS
from app.errors import UserError, nearest

MAPS = ("mask", "instances", "semantic")
FIELDS = ("bbox", "category", "segmentation", "iscrowd")
KEYS = ("image", "objects", *FIELDS, *MAPS, "boxes", "name", "names")
IMAGE_FIELDS = ("id", "file_name", "width", "height")  # of each image in the COCO JSON

# A column of images that is no photograph.
LABELS = re.compile(r"mask|label|annot|segm|instance|semantic|panoptic|truth|gt|target|depth", re.I)
PHOTOGRAPHS = ("image", "img", "photo", "picture")
NAMED: dict[str, re.Pattern[str]] = {
    "bbox": re.compile(r"(bounding_?|b)?box(es)?(_.*)?", re.I),
    "category": re.compile(r"(category|categories|labels?|class(es)?|names?)(_.*)?", re.I),
    "segmentation": re.compile(
        r"(segmentations?|polygons?|contours?|rles?|masks?)(_(rles?|polygons?|points|json|coco))?",
        re.I,
    ),
    "iscrowd": re.compile(r"is_?crowd", re.I),
}

Features = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset by what they hold.

    Attributes:
        objects: column of structs; None where lists of the row itself are the objects' fields.
        bbox, category, segmentation, iscrowd: fields of the objects.
        mask: image whose pixels above 0 are objects of one class.
        instances: image of object numbers.
        semantic: image of class numbers; with `instances`, the classes of those.
        undecided: image that is one of these three.
    """

    image: str
    objects: str | None = None
    bbox: str | None = None
    category: str | None = None
    segmentation: str | None = None
    iscrowd: str | None = None
    mask: str | None = None
    instances: str | None = None
    semantic: str | None = None
    undecided: str | None = None

    def describe(self) -> str:
        """Return the columns as --columns takes them, where nothing is undecided."""
        pairs = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{key}={value}" for key, value in pairs.items() if value)


def parse(text: str | None) -> dict[str, str]:
    """Parse the keys and values of --columns.

    Raises:
        UserError: it is not KEY=VALUE,KEY=VALUE, or has a key or convention that nothing reads.
    """
    choice, problems = dict[str, str](), []
    for part in text.split(",") if text else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in KEYS or not equals or not value:
            problems.append(
                f"--columns: '{part}' must be KEY=VALUE, the key one of {', '.join(KEYS)}."
                f"{nearest(key, KEYS)}"
            )
        choice[key] = value
    if (boxes := choice.get("boxes", "xywh")) not in CONVENTIONS:
        problems.append(f"--columns: boxes={boxes}: must be one of {', '.join(CONVENTIONS)}")
    if problems:
        raise UserError(problems)
    return choice


def guess(features: Features, choice: Mapping[str, str], where: str) -> Columns:
    """Return the columns as `choice` names them, and the others by their types and names.

    Raises:
        UserError: a column named is not there, or it cannot be told; lists the columns.
    """
    _check_choice(features, choice, where)
    image = choice.get("image") or _photograph(features, where)
    by_hand = {key: choice[key] for key in MAPS if key in choice}
    if by_hand:
        return Columns(image, **by_hand)
    objects, fields = _objects(features, choice, where)
    maps = {} if "objects" in choice else _maps(features, image)
    if "segmentation" in fields or (fields and not maps):
        return Columns(image, objects, **fields)
    if fields:
        raise _untold("whether the boxes or the maps are the labels", features, where)
    if not maps:
        raise _untold("which column holds the labels", features, where)
    return Columns(image, **maps)


def check_group(column: str, features: Features, where: str) -> None:
    """Refuse a column that cannot say what an image belongs with.

    Raises:
        UserError: it is not there, or holds neither text nor whole numbers; lists the columns. Or
            it has the name of a field that each image of COCO has.
    """
    if column not in features or not _names_a_class(features[column]):
        raise UserError(
            f"{where}: --group-column {column}: there is no such column of text or whole numbers."
            f"{nearest(column, list(features))} There are {_list(features)}"
        )
    if column in IMAGE_FIELDS:
        raise UserError(
            f"{where}: --group-column {column}: COCO keeps something else of each image under this "
            "name. Name another column"
        )


def item_type(feature: Any) -> Any:
    """Return the type of a list's items; None for a type that is no list."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def item_fields(feature: Any) -> dict[str, Any]:
    """Return each object's fields: of a list of structs, or of a struct of lists; else none."""
    if isinstance(item := item_type(feature), dict):
        return item
    if not isinstance(feature, dict):
        return {}
    lists = {name: item_type(field) for name, field in feature.items()}
    return {name: item for name, item in lists.items() if item is not None}


def object_fields(features: Features, objects: str | None) -> dict[str, Any]:
    """Return the types of the fields that an object can have, by name."""
    return item_fields(dict(features) if objects is None else features[objects])


def _check_choice(features: Features, choice: Mapping[str, str], where: str) -> None:
    choices = {key: list(features) for key in ("image", "objects", *MAPS)}
    if choice.get("objects", next(iter(features))) in features:
        columns = [choice["objects"]] if "objects" in choice else [None, *features]
        fields = [name for column in columns for name in object_fields(features, column)]
        choices |= dict.fromkeys(FIELDS, fields)
    problems = [
        f"{where}: --columns {key}={choice[key]}: there is no such column."
        f"{nearest(choice[key], names)} There are {_list(features)}"
        for key, names in choices.items()
        if key in choice and choice[key] not in names
    ]
    if problems:
        raise UserError(problems)


def _photograph(features: Features, where: str) -> str:
    plain = [name for name in _images(features) if not LABELS.search(name)]
    usual = [name for name in plain if name.lower() in PHOTOGRAPHS]
    for names in (usual, plain, _images(features)):
        if len(names) == 1:
            return names[0]
    raise _untold("which column is the image", features, where)


def _images(features: Features) -> list[str]:
    return [name for name, feature in features.items() if is_image(feature)]


def is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _objects(
    features: Features, choice: Mapping[str, str], where: str
) -> tuple[str | None, dict[str, str]]:
    """Return the column of objects, None for the row itself, and its fields, which may be none."""
    candidates = [choice["objects"]] if "objects" in choice else [None, *features]
    by_column = {}
    for column in candidates:
        fields = _fields(object_fields(features, column), choice)
        if "bbox" in fields or "segmentation" in fields:
            by_column[column] = fields
    if len(by_column) > 1:
        raise _untold("which column holds the objects", features, where)
    if "objects" in choice and not by_column:
        raise _untold(f"where '{choice['objects']}' has boxes or shapes", features, where)
    return next(iter(by_column.items()), (None, {}))


def _fields(types: Mapping[str, Any], choice: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each field that is known by hand or by name, and has a fit type."""
    holds: dict[str, Callable[[Any], int]] = {
        "bbox": lambda kind: int(item_type(kind) is not None),
        "category": _names_a_class,
        "segmentation": _is_a_shape,
        "iscrowd": _names_a_class,
    }
    fields = {}
    for role in FIELDS:
        names = [
            name
            for name, kind in types.items()
            if NAMED[role].fullmatch(name) and holds[role](kind)
        ]
        names.sort(key=lambda name: -holds[role](types[name]))
        if choice.get(role) in types:
            fields[role] = choice[role]
        elif names:
            fields[role] = names[0]
    return fields


def _names_a_class(kind: Any) -> int:
    """Rate a type as a class: a name is better than a number; 0 for what can be none."""
    if type(kind).__name__ == "ClassLabel":
        return 3
    dtype = getattr(kind, "dtype", "") if type(kind).__name__ == "Value" else ""
    if "string" in dtype:
        return 2
    return int("int" in dtype or dtype == "bool")


def _is_a_shape(kind: Any) -> int:
    """Rate a type as a shape; text may be JSON."""
    if type(kind).__name__ == "Value":
        return int("string" in kind.dtype)
    return 0 if type(kind).__name__ == "ClassLabel" else 2


def _maps(features: Features, image: str) -> dict[str, str]:
    names = [name for name in _images(features) if name != image and LABELS.search(name)]
    by_name = {
        kind: [name for name in names if kind.removesuffix("s") in name.lower()]
        for kind in ("instances", "semantic")
    }
    if len(names) == 1 and not any(by_name.values()):
        return {"undecided": names[0]}
    return {kind: fitting[0] for kind, fitting in by_name.items() if len(fitting) == 1}


def _untold(what: str, features: Features, where: str) -> UserError:
    return UserError(
        f"{where}: cannot tell {what}. The columns are {_list(features)}. Say it by hand, as "
        "--columns image=A,objects=B, or image=A with mask=B,name=CLASS or with instances=B or "
        "semantic=B and names=CLASS;CLASS"
    )


def _list(features: Features) -> str:
    return "; ".join(f"'{name}': {_short(feature)}" for name, feature in features.items())


def _short(feature: Any) -> str:
    if is_image(feature):
        return "Image"
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_short(kind)}" for name, kind in feature.items()) + "}"
    if (item := item_type(feature)) is not None:
        return f"List({_short(item)})"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
