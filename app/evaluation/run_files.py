"""The files that a run leaves in its folder, read: any of them may come from anyone.

What was found is in `record.py`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from app.config.schema import problems_of
from app.config.yaml_data import read_yaml
from app.datasets.geometry import is_number
from app.errors import UserError
from app.files import SETTINGS_BYTES, read_json, read_text

FIGURES = "metrics.json"
TABLE = "metrics.csv"
SETTINGS = "config_resolved.yaml"
ENVIRONMENT = "environment.json"
MAX_ROWS = 100_000  # epochs
SHOWN = 10  # problems of a file
Checked = TypeVar("Checked", bound=BaseModel)
Content = TypeVar("Content")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Split(_Strict):
    """A split that a run used."""

    images: int
    sha256: str


class Environment(_Strict):
    """Where, of which code and on what data a run was made; None and empty where it is not said."""

    sam3_commit: str | None = None
    git: str | None = None
    git_modified: bool | None = None
    gpu: str | None = None
    cpus: int | None = None
    packages: dict[str, str] = {}
    data: dict[str, Split] = {}
    notes: list[str] = []
    command: list[str] = []


class _Model(_Strict):
    name: str
    resolution: int


class _Hub(_Strict):
    name: str | None = None


class _Dataset(_Strict):
    dir: str | None = None
    huggingface: _Hub = _Hub()
    roboflow: str | None = None

    @property
    def source(self) -> str:
        return self.dir or self.huggingface.name or self.roboflow or "shapes"


class _Evaluation(_Strict):
    metric: str = "auto"


class _Tracking(_Strict):
    experiment: str = "sam3-finetuning"
    register_as: str | None = None


class Settings(_Strict):
    """The settings that reports and trackers use."""

    model: _Model | None = None
    dataset: _Dataset = _Dataset()
    evaluation: _Evaluation = _Evaluation()
    tracking: _Tracking = _Tracking()


@dataclass(frozen=True)
class RunFiles:
    """Hold a run's files; what is not there is empty, as an evaluation has no rows.

    Attributes:
        figures: of metrics.json.
        rows: of metrics.csv, one an epoch; an empty cell is left out.
        settings: of config_resolved.yaml, those that are used here.
        all_settings: the whole of it.
        environment: of environment.json; a run from Python has none.
    """

    figures: Mapping[str, float]
    rows: list[dict[str, float]]
    settings: Settings
    all_settings: Mapping[str, Any]
    environment: Environment


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run or of an evaluation.

    Raises:
        UserError: with every problem of every file.
    """
    problems: list[str] = []
    figures: dict[str, float] = _collected(problems, read_figures, folder, {})
    rows: list[dict[str, float]] = _collected(problems, read_rows, folder, [])
    no_settings: tuple[Settings, dict[str, Any]] = Settings(), {}
    settings, all_settings = _collected(problems, read_settings, folder, no_settings)
    environment = _collected(problems, read_environment, folder, Environment())
    if problems:
        raise UserError(problems)
    return RunFiles(figures, rows, settings, all_settings, environment)


def _collected(
    problems: list[str], read: Callable[[Path], Content], folder: Path, nothing: Content
) -> Content:
    try:
        return read(folder)
    except UserError as error:
        problems += error.problems
        return nothing


def _is_figure(name: str, value: object) -> bool:
    """Return whether it is finite and of a sane size; a loss may have grown without bound."""
    is_loss = name.startswith(("train/", "last/train/"))
    return is_number(value) or (is_loss and isinstance(value, float) and math.isfinite(value))


def read_figures(folder: Path) -> dict[str, float]:
    """Return the figures of metrics.json by their names."""
    file = folder / FIGURES
    if not file.exists():
        return {}
    content = read_json(file, most=SETTINGS_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be an object of figures by their names")
    problems = [
        f"{name:.60}: must be a finite number (it is {value!r:.60})"
        for name, value in content.items()
        if not _is_figure(name, value)
    ]
    if problems:
        raise UserError(shortened(file, problems))
    return content


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv, each with its epoch."""
    file = folder / TABLE
    if not file.exists():
        return []
    text = read_text(file)
    if max(map(text.count, "\r\n")) > MAX_ROWS:
        raise UserError(f"{file}: has more than {MAX_ROWS} lines")
    try:
        table = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
    except csv.Error as error:
        raise UserError(f"{file}: cannot be read as a table ({error})") from None
    rows: list[dict[str, float]] = []
    problems: list[str] = []
    for number, cells in enumerate(table, start=1):
        place = f"row {number}"
        if None in cells:  # where DictReader puts what has no column
            problems.append(f"{place}: has more cells than there are columns")
            continue
        row = {name: _number(cell) for name, cell in cells.items() if cell}
        problems += [
            f"{place}: {name:.60}: must be a finite number (it is {cells[name]!r:.60})"
            for name, value in row.items()
            if not _is_figure(name, value)
        ]
        if not row.get("epoch", 0.5).is_integer():
            problems.append(f"{place}: epoch: must be a whole number")
        rows.append(row)
    if problems:
        raise UserError(shortened(file, problems))
    return rows


def read_settings(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Return the settings of config_resolved.yaml that are used, and all of them."""
    file = folder / SETTINGS
    if not file.exists():
        return Settings(), {}
    content = read_yaml(file)
    return _check(Settings, content, file), content


def read_environment(folder: Path) -> Environment:
    """Return environment.json."""
    file = folder / ENVIRONMENT
    if not file.exists():
        return Environment()
    return _check(Environment, read_json(file, most=SETTINGS_BYTES), file)


def _check(schema: type[Checked], content: object, file: Path) -> Checked:
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be keys and their values (it is {content!r:.60})")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError(shortened(file, problems_of(error))) from None


def shortened(file: Path, problems: list[str]) -> list[str]:
    """Return a line for each of the first problems of a file, and how many more there are."""
    more = len(problems) - SHOWN
    lines = [f"{file}: {problem}" for problem in problems[:SHOWN]]
    return [*lines, *([f"  and {more} more"] if more > 0 else [])]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
