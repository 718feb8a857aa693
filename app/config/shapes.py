"""Settings of the synthetic images of shapes (`dataset.shapes`), and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from app.errors import nearest

KINDS = ("circle", "rectangle", "triangle", "ellipse", "star", "ring", "cross", "hexagon", "blob")
# fmt: off
COLOR_NAMES = (
    "red", "green", "blue", "yellow", "orange", "purple",
    "pink", "brown", "cyan", "white", "black", "gray",
)
# fmt: on
LABEL_BY = ("kind", "color", "both", "all")
BACKGROUNDS = ("plain", "gradient", "texture")
MOST_RADIUS = 0.45  # of the image's shorter side
MOST_FOG = 0.9  # beyond it, shapes are within rounding of what is behind them
_KEY = "dataset.shapes"


class Thing(NamedTuple):
    """A shape to draw: a kind, in a named color or in any."""

    kind: str
    color: str | None


class ShapesConfig(BaseModel):
    """The shapes to draw, and their names. The schema lists every problem, each with its remedy.

    Attributes:
        train, valid: images.
        width, height: pixels.
        min_shapes, max_shapes: an image, both ends included.
        radius: least and most, of the image's shorter side.
        turn: degrees, most, either way.
        kinds: of `KINDS`, shapes to draw.
        colors: of `COLOR_NAMES`, to draw them in; None for any color.
        label_by: a category is a kind ("circle"), a color ("red thing") or both ("red circle");
            with "all" each shape is labelled three times, once for each of these.
        exclude: pairs never drawn, as "red circle".
        background: its style, or mixed: each image takes one.
        fog: share of each pixel that is a light gray; it takes as much of all contrast.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: int = 20
    valid: int = 5
    width: int = 640
    height: int = 480
    min_shapes: int = 2
    max_shapes: int = 3
    radius: list[float] = [0.15, 0.3]
    turn: float = 15.0
    kinds: list[str] = ["circle", "rectangle", "triangle"]
    colors: list[str] | None = None
    label_by: str = "kind"
    exclude: list[str] = []
    background: str = "mixed"
    fog: float = 0.8

    @model_validator(mode="after")
    def _check(self) -> ShapesConfig:
        problems = [*self._number_problems(), *self._name_problems()]
        if problems := problems or self._class_problems():
            raise ValueError("\n".join(f"{_KEY}.{problem}" for problem in problems))
        return self

    def _number_problems(self) -> list[str]:
        ranges = {
            "train": (1, 100_000),
            "valid": (0, 100_000),
            "width": (32, 8192),
            "height": (32, 8192),
            "min_shapes": (1, self.max_shapes),
            "max_shapes": (1, 12),
            "turn": (0, 180),
            "fog": (0, MOST_FOG),
        }
        problems = [
            f"{key} is {getattr(self, key)}: must be {low} to {high}"
            for key, (low, high) in ranges.items()
            if not low <= getattr(self, key) <= high
        ]
        if len(self.radius) != 2 or not 0 < self.radius[0] <= self.radius[1] <= MOST_RADIUS:
            problems.append(
                f"radius is {self.radius}: must be least and most, above 0, up to {MOST_RADIUS}"
            )
        return problems

    def _name_problems(self) -> list[str]:
        problems = _list_problems("kinds", self.kinds, KINDS)
        if self.colors is not None:
            problems += _list_problems("colors", self.colors, COLOR_NAMES)
        for key, choices in (("label_by", LABEL_BY), ("background", (*BACKGROUNDS, "mixed"))):
            if (value := getattr(self, key)) not in choices:
                problems.append(
                    f"{key} is '{value}': must be one of {', '.join(choices)}."
                    f"{nearest(value, choices)}"
                )
        if self.colors is None and self.label_by in ("color", "both", "all"):
            problems.append(
                f"label_by is {self.label_by}: needs colors, for example {_KEY}.colors=[red,blue]"
            )
        pairs = [f"{color} {kind}" for color in self.colors or () for kind in self.kinds]
        problems += [
            f"exclude names '{pair}': no such color and kind.{nearest(pair, pairs)}"
            for pair in self.exclude
            if pair not in pairs
        ]
        return problems

    def _class_problems(self) -> list[str]:
        classes, room = self.things_by_class(), self.train * self.max_shapes
        if not classes:
            return ["exclude leaves nothing to draw; take a pair from it"]
        if room < len(classes):
            return [
                f"train is {self.train}: so many images of at most {self.max_shapes} shapes cannot "
                f"hold each of {', '.join(classes)}; raise train or max_shapes"
            ]
        return []

    def things(self) -> list[Thing]:
        """Return every kind in every color, without the pairs that are left out."""
        pairs = [Thing(kind, color) for kind in self.kinds for color in self.colors or (None,)]
        return [thing for thing in pairs if f"{thing.color} {thing.kind}" not in self.exclude]

    def names(self, thing: Thing) -> tuple[str, ...]:
        """Return the categories that a thing is labelled with; the last is the narrowest."""
        names = {
            "kind": thing.kind,
            "color": f"{thing.color} thing",
            "both": f"{thing.color} {thing.kind}",
        }
        return tuple(names.values()) if self.label_by == "all" else (names[self.label_by],)

    def categories(self) -> list[str]:
        """Return all names in the order of their ids; 1 is the first."""
        return list(dict.fromkeys(name for t in self.things() for name in self.names(t)))

    def things_by_class(self) -> dict[str, list[Thing]]:
        """Return what may be drawn for each category; of a thing's three, for the narrowest."""
        grouped: dict[str, list[Thing]] = {}
        for thing in self.things():
            grouped.setdefault(self.names(thing)[-1], []).append(thing)
        return grouped


def _list_problems(key: str, names: Sequence[str], choices: Sequence[str]) -> list[str]:
    problems = [
        f"{key} names '{name}': there are {', '.join(choices)}.{nearest(name, choices)}"
        for name in names
        if name not in choices
    ]
    if not names:
        problems.append(f"{key} is empty: name one or more of {', '.join(choices)}")
    if len(set(names)) < len(names):
        problems.append(f"{key} names one twice: {', '.join(names)}")
    return problems
