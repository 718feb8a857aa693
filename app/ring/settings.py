"""The settings of a ring: a YAML that names labels, images, a validation set and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.config.schema import ProposalForm, problems_of
from app.config.yaml_data import read_yaml
from app.errors import UserError
from app.model.weight_files import find_file


class RingConfig(BaseModel):
    """Hold what a ring works on; paths are relative to the YAML's folder.

    Attributes:
        labels: folder of labelled images, in any format that training reads; it grows.
        images: folder of images, of which those without labels are proposed.
        validation: dataset that decides between weights; nothing is ever trained on it.
        folder: of the rounds.
        champion: weights to begin with.
        every: images newly labelled that begin a round.
        top: images that are proposed after a round.
        classes: what is proposed; none: the classes of the labels.
        to: form of the proposals; page: beside the labels, for the page of ./serve.sh --label.
        train: `KEY=VALUE`s of configs/train.yaml, of each round's run.
        register_as: name in MLflow's registry that better weights get; None: none.
        mlflow: address of MLflow.
        label_studio: number of the project whose labels are exported to `labels` before a round;
            the address and the token are LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. None: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Path
    images: Path
    validation: Path
    folder: Path = Path("outputs/ring")
    champion: Path
    every: int = Field(default=20, ge=1)
    top: int = Field(default=50, ge=1)
    classes: list[str] = []
    to: ProposalForm | Literal["page"] = "coco"
    train: list[str] = []
    register_as: str | None = None
    mlflow: str = "auto"
    label_studio: int | None = Field(default=None, ge=1)


def read_ring(file: Path) -> RingConfig:
    """Read the settings of a ring.

    Raises:
        UserError: each problem of the file, and each path that is not there.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; docs/labelling.md shows one")
    content = read_yaml(file)
    try:
        config = RingConfig.model_validate(content)
    except ValidationError as error:
        raise UserError([f"{file}: {problem}" for problem in problems_of(error)]) from None
    here = file.resolve().parent
    paths = {
        name: here / getattr(config, name)
        for name in ("labels", "images", "validation", "folder", "champion")
    }
    problems = [
        f"{file}: {name}: {paths[name]} is no folder"
        for name in ("labels", "images", "validation")
        if not paths[name].is_dir()
    ]
    try:
        find_file(paths["champion"])
    except UserError as error:
        problems += [f"{file}: champion: {problem}" for problem in error.problems]
    inside = paths["images"].resolve().is_relative_to(paths["labels"].resolve())
    if (config.to == "page" or config.label_studio is not None) and not inside:
        why = "to: page" if config.to == "page" else "label_studio"
        problems.append(f"{file}: images: {why} needs them in the folder of labels, or in it below")
    if paths["folder"].resolve().is_relative_to(paths["labels"].resolve()):
        problems.append(
            f"{file}: folder: must not lie in the folder of labels, which it would join"
        )
    problems += [
        f"{file}: train: '{text}' is no KEY=VALUE" for text in config.train if "=" not in text
    ]
    if problems:
        raise UserError(problems)
    return config.model_copy(update=paths)
