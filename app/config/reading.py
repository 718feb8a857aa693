"""What a user decides about a dataset's files where they leave it open."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Boxes = Literal["xywh", "xyxy", "cxcywh", "shares", "cxcywh-shares", "masks"]
Crowd = Literal["ignore", "instances"]
MaskNumbers = Literal["auto", "objects", "classes"]


class ReadingConfig(BaseModel):
    """Decisions on how labels are read; the defaults are what most files mean.

    Attributes:
        boxes: what the four numbers of a COCO box are: corner and size in pixels (xywh), two
            corners (xyxy), center and size (cxcywh), either as shares of the image, or `masks`:
            take the box of each mask.
        crowd: whether what is marked as a crowd is passed over or is an object like others.
        void: value of mask pixels that belong to nothing; None where the files tell.
        attribute: name of the attribute that says the class, where objects have several.
        masks: whether numbers in mask PNGs count objects or name classes; auto where files tell.
        group_column: name of a table's column, or field of a COCO image, that says what an image
            belongs with, such as a patient: images that it says alike stay on one side of a split.
        accept_above: 0..1, the least score of a proposal that counts as a label; None: any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes: Boxes = "xywh"
    crowd: Crowd = "ignore"
    void: int | None = Field(default=None, ge=0, le=65535)
    attribute: str | None = None
    masks: MaskNumbers = "auto"
    group_column: str | None = Field(default=None, min_length=1, max_length=200)
    accept_above: float | None = Field(default=None, ge=0, le=1)


AS_WRITTEN = ReadingConfig()
