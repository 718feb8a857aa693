"""What a sweep is to try: a YAML of keys, datasets and seeds → cells, each an ordinary run."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.config.schema import problems_of
from app.config.yaml_data import read_yaml
from app.console import command
from app.errors import UserError
from app.files import check_no_links, read_json, short_hash, write_json
from app.sweeps.words import Words
from app.training.prepare import Request, configure

PLAN = "sweep.json"  # in the sweep's folder
RUNS, TRIALS = "runs", "trials"  # folders in it
TEST = "test"  # the split, and the folder of a run with its figures
TRAIN = ("train", "_annotations.coco.json")  # of a dataset of a collection
COLLECTIONS = {"rf100vl": Path("data/rf100vl"), "odinw13": Path("data/odinw13")}
FLAGS = {"model": "--model", "recipe": "--recipe", "lr": "--lr"}  # keys that are flags of train
SOURCES = ("dataset.dir", "dataset.huggingface.", "dataset.roboflow")  # keys of a dataset
OWN = ("output_dir", "cluster.", "seed")  # keys that are the sweep's
MOST = 100_000  # cells
LONGEST = 80  # characters of a setting's name
DRAWN = "trial"  # how the names of settings begin that Optuna draws
Value = float | int | bool | str | list[Any] | None


class Range(BaseModel):
    """Values of a key between two, of which some are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    low: float = Field(alias="from")
    high: float = Field(alias="to")
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"from {self.low} must be below to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("log: from must be above 0")
        return self


class SweepFile(BaseModel):
    """The content of a sweep's YAML.

    Attributes:
        search: grid: all combinations; random: `trials` of them; optuna: chosen by what was found.
        keys: key of configs/train.yaml, or a flag of FLAGS → values, or a range of them.
        datasets: folders, globs, names on HuggingFace (hf:OWNER/NAME), Roboflow's
            (roboflow:WORKSPACE/PROJECT/VERSION), or a collection; none: that of the words.
        seeds: of each cell.
        overrides: `KEY=VALUE`s of all cells.
        trials: settings to draw.
        pruner: of optuna; asha ends a trial early that is behind the others.
        draw_seed: of what random and optuna draw.
        split: whose figures count; test: each run's best weights are scored on it as well.
        metric: figure that cells are judged by; auto: AP of masks, or of boxes where one has none.
        cluster: keys of `cluster.*`, of the jobs that a cluster makes of it.
        published: figure → what a paper gives for it, to stand in the table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: Literal["grid", "random", "optuna"] = "grid"
    keys: dict[str, list[Value] | Range] = {}
    datasets: list[str] = []
    seeds: list[int] = Field(default=[0], min_length=1)
    overrides: list[str] = []
    trials: int | None = Field(default=None, ge=1, le=MOST)
    pruner: Literal["none", "asha"] = "none"
    draw_seed: int = 0
    split: Literal["valid", "test"] = "valid"
    metric: str = "auto"
    cluster: dict[str, Value] = {}
    published: dict[str, float] = {}

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        if (self.search == "grid") != (self.trials is None):
            raise ValueError("trials: is of random and optuna, which need it, and not of grid")
        if self.search != "optuna" and self.pruner != "none":
            raise ValueError("pruner: is of search: optuna")
        for key, values in self.keys.items():
            if isinstance(values, Range) and self.search == "grid":
                raise ValueError(f"keys: {key}: a range is for random and optuna; give values")
            if values == []:
                raise ValueError(f"keys: {key}: give one value or more")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is there twice")
        words = [*self.keys, *self.overrides]
        if own := [word for word in words if word.startswith((*OWN, *SOURCES))]:
            raise ValueError(f"{', '.join(own)}: the sweep itself sets it, by datasets and seeds")
        return self


@dataclass(frozen=True)
class Cell:
    """Hold one run of a sweep.

    Attributes:
        setting: name of its values.
        values: key → value.
        dataset: name of it.
        source: of the dataset: key and value; empty: that of the sweep's words.
        seed: of the run.
    """

    setting: str
    values: Mapping[str, Value]
    dataset: str
    source: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.dataset}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Hold a sweep that can begin.

    Attributes:
        folder: of the sweep.
        base: words of `train` that all cells have.
        file: what was asked.
        sources: name of a dataset → key and value of it.
    """

    folder: Path
    base: tuple[str, ...]
    file: SweepFile
    sources: Mapping[str, str]

    @property
    def is_drawn(self) -> bool:
        """Return whether what is tried hangs on what was found."""
        return self.file.search == "optuna"

    def cells(self) -> list[Cell]:
        """Return all cells: those of random and grid, or of the trials that Optuna has drawn."""
        return [cell for name, values in self.settings() for cell in self.of(name, values)]

    def of(self, name: str, values: Mapping[str, Value]) -> list[Cell]:
        """Return the cells of a setting."""
        return [
            Cell(name, values, dataset, source, seed)
            for dataset, source in self.sources.items()
            for seed in self.file.seeds
        ]

    @property
    def units(self) -> int:
        """Return how many pieces an array of jobs has: cells, or trials of Optuna's."""
        return self.file.trials or 0 if self.is_drawn else len(self.cells())

    def settings(self) -> Iterator[tuple[str, Mapping[str, Value]]]:
        """Yield name and values of each setting."""
        if self.is_drawn:
            for number in range(self.file.trials or 0):
                if (values := self.trial(number)) is not None:
                    yield trial_name(number), values
            return
        keys = list(self.file.keys)
        for combination in self._combinations():
            held = dict(zip(keys, combination, strict=True))
            yield setting_name(held), held

    def trial(self, number: int) -> dict[str, Value] | None:
        """Return the values that Optuna drew for a trial; None: it has not yet."""
        file = self.trial_file(number)
        content = read_json(file) if file.is_file() else None
        return content["values"] if isinstance(content, dict) else None

    def trial_file(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:03}.json"

    def _combinations(self) -> Iterator[tuple[Value, ...]]:
        choices = list(self.file.keys.values())
        if self.file.search == "grid":
            yield from itertools.product(*(c for c in choices if not isinstance(c, Range)))
            return
        chance, seen = random.Random(self.file.draw_seed), set()
        for _ in range(100 * (self.file.trials or 0)):  # few values may not have so many
            drawn = tuple(draw(choice, chance) for choice in choices)
            if json.dumps(drawn) not in seen:
                seen.add(json.dumps(drawn))
                yield drawn
            if len(seen) == self.file.trials:
                return

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / RUNS / cell.name

    def figures_folder(self, cell: Cell) -> Path:
        """Return the folder whose metrics.json has the figures that count."""
        folder = self.run_folder(cell)
        return folder / TEST if self.file.split == TEST else folder

    def scoring_words(self, cell: Cell) -> list[str]:
        """Return the words of `train` that score a cell's weights on the test split."""
        *words, _ = self.words(cell)
        for flag in ("--recipe", "--lr"):
            if flag in words:
                del words[(at := words.index(flag)) : at + 2]
        best = self.run_folder(cell) / "weights" / "best"
        own = [f"evaluation.split={TEST}", f"checkpoint={best}"]
        return [
            *words,
            *own,
            f"output_dir={self.figures_folder(cell)}",
            "--eval-only",
            "--overwrite",
        ]

    def words(self, cell: Cell) -> list[str]:
        """Return the words of `train` that make a cell."""
        words = list(self.base)
        for key, value in cell.values.items():
            words += [FLAGS[key], str(value)] if key in FLAGS else [f"{key}={as_word(value)}"]
        source = [cell.source] if cell.source else []
        return [*words, *source, f"seed={cell.seed}", f"output_dir={self.run_folder(cell)}"]

    def command(self, cell: Cell) -> str:
        """Return the command that makes a cell again, in a folder of its own."""
        return command("./train.sh", *self.words(cell)[:-1])


def trial_name(number: int) -> str:
    return f"{DRAWN}-{number:03}"


def draw(choice: Sequence[Value] | Range, chance: random.Random) -> Value:
    """Return a value of a key: one of several, or of a range."""
    if not isinstance(choice, Range):
        return chance.choice(choice)
    if choice.log:
        value = choice.low * (choice.high / choice.low) ** chance.random()
    else:
        value = chance.uniform(choice.low, choice.high)
    return round(value) if choice.whole else float(f"{value:.4g}")


def as_word(value: Value) -> str:
    """Return a value as `KEY=VALUE` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def setting_name(values: Mapping[str, Value]) -> str:
    """Return a name for values that can be a folder's, and differs where they do."""
    if not values:
        return "as-given"
    lasts = [key.rpartition(".")[2] for key in values]
    shown = [
        f"{last if lasts.count(last) == 1 else key}={as_word(value)}"
        for (key, value), last in zip(values.items(), lasts, strict=True)
    ]
    name = ",".join(shown)
    plain = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", name)
    if plain == name and len(name) <= LONGEST:
        return name
    return f"{plain[:LONGEST]}-{short_hash(name, 8)}"


def read_plan(file: Path, base: Words, folder: Path) -> Plan:
    """Return the sweep of a YAML, all of it checked but for the datasets' content.

    Args:
        base: what `train` was asked for beside it; its folder, seed and dataset are left out.

    Raises:
        UserError: every problem of the file, and of each setting, as of a key that there is not.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be keys and their values, as docs/sweeps.md has them")
    try:
        asked = SweepFile.model_validate(content)
    except ValidationError as error:
        raise UserError([f"{file}: {problem}" for problem in problems_of(error)]) from None
    if asked.datasets and (given := [t for t in base.overrides if t.startswith(SOURCES)]):
        raise UserError(f"{file}: datasets, and {given[0]}: give one of them")
    words = [text for text in base.overrides if not text.startswith(OWN)] + asked.overrides
    if base.size != "auto":
        words += ["--model", base.size]
    if base.recipe is not None:
        words += ["--recipe", base.recipe]
    if base.lr is not None:
        words += ["--lr", str(base.lr)]
    plan = Plan(folder, tuple(words), asked, _sources(file, asked.datasets))
    if plan.units > MOST:
        raise UserError(f"{file}: has {plan.units} cells, and {MOST} is the most")
    _check_settings(file, plan)
    return plan


def _check_settings(file: Path, plan: Plan) -> None:
    """Raise UserError where a value is none that a run takes; each is tried beside the others'."""
    choices = {
        key: [_end(choice, end) for end in (choice.low, choice.high)]
        if isinstance(choice, Range)
        else choice
        for key, choice in plan.file.keys.items()
    }
    first = {key: values[0] for key, values in choices.items()}
    settings = [{**first, key: value} for key, values in choices.items() for value in values]
    problems: list[str] = []
    for values in settings or [first]:
        cell = Cell("", values, "", "", plan.file.seeds[0])
        try:
            configure(to_request(plan.words(cell)), told=True)
        except UserError as error:
            problems += [f"{file}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def _end(choice: Range, value: float) -> Value:
    return round(value) if choice.whole else value


def to_request(words: Sequence[str]) -> Request:
    """Return what `train` makes of words as `Plan.words` gives them."""
    overrides, given = [], {}
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            given[word] = next(rest)
        else:
            overrides.append(word)
    return Request(
        overrides,
        size=given.get("--model", "auto"),
        recipe=given.get("--recipe"),
        lr=float(given["--lr"]) if "--lr" in given else None,
        download=False,
    )


def _sources(file: Path, datasets: Sequence[str]) -> dict[str, str]:
    """Return name → key and value of each dataset.

    Raises:
        UserError: a dataset that is not there, or two of one name.
    """
    found: list[tuple[str, str]] = []
    problems = []
    for entry in datasets:
        kind, _, rest = entry.partition(":")
        if entry in COLLECTIONS or kind in COLLECTIONS:
            try:
                found += [(f.name, f"dataset.dir={f}") for f in _collection(kind, rest)]
            except UserError as error:
                problems += error.problems
        elif kind == "hf" and rest:
            found.append((rest, f"dataset.huggingface.name={rest}"))
        elif kind == "roboflow" and rest:
            found.append((rest, f"dataset.roboflow={rest}"))
        elif Path(entry).exists():
            found.append((Path(entry).resolve().name, f"dataset.dir={entry}"))
        elif several := sorted(Path().glob(entry)) if not Path(entry).is_absolute() else []:
            found += [(f.name, f"dataset.dir={f}") for f in several if f.is_dir()]
        else:
            problems.append(
                f"{file}: datasets: {entry}: no such folder. One of HuggingFace's is hf:OWNER/NAME"
            )
    if problems:
        raise UserError(problems)
    sources: dict[str, str] = {}
    for name, source in found:
        plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
        while plain in sources and sources[plain] != source:
            plain += f"-{short_hash(source, 4)}"
        sources[plain] = source
    return sources or {"data": ""}


def _collection(name: str, folder: str) -> list[Path]:
    """Return the datasets of a collection: folders of a folder, each with its splits."""
    root = Path(folder) if folder else COLLECTIONS[name]
    found = sorted(each for each in root.glob("*") if each.joinpath(*TRAIN).is_file())
    if found:
        return found
    get = ""
    if name == "rf100vl":
        get = (
            f" Get them by a key of Roboflow's: pip install rf100vl; ROBOFLOW_API_KEY=… python -c "
            f"\"import rf100vl; rf100vl.download_rf100vl('{root}')\"."
        )
    raise UserError(
        f"datasets: {name}: {root} holds no DATASET/{'/'.join(TRAIN)}.{get} Where they are "
        f"elsewhere: {name}:FOLDER"
    )


def save_plan(plan: Plan) -> None:
    """Write the plan to its folder, for `status`, `table` and a cluster's jobs.

    Raises:
        UserError: the folder holds a sweep of other words, whose runs would not compare.
    """
    check_no_links(plan.folder, [PLAN])
    now = _content(plan)
    if (plan.folder / PLAN).exists():
        before = _content(load_plan(plan.folder))
        changed = [key for key in ("search", "overrides", "base") if before[key] != now[key]]
        if plan.is_drawn and before["keys"] != now["keys"]:
            changed.append("keys")
        if changed:
            told = "; ".join(f"{key} was {before[key]}, now {now[key]}" for key in changed)
            raise UserError(
                f"--output-dir {plan.folder}: holds a sweep of other words ({told}). Name another "
                "folder; values, datasets and seeds alone may come to one that is there"
            )
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN, now)


def _content(plan: Plan) -> dict[str, Any]:
    content = plan.file.model_dump(mode="json", by_alias=True)
    return {**content, "base": list(plan.base), "sources": dict(plan.sources)}


def load_plan(folder: Path) -> Plan:
    """Return the plan that a sweep's folder holds.

    Raises:
        UserError: there is none, or it was changed by hand.
    """
    file = folder / PLAN
    if not file.is_file():
        raise UserError(f"{folder}: holds no sweep; python -m app sweep FILE makes one")
    content = read_json(file)
    try:
        base, sources = content.pop("base"), content.pop("sources")
        asked = SweepFile.model_validate(content)
        if not all(isinstance(word, str) for word in [*base, *sources, *sources.values()]):
            raise TypeError
    except (ValidationError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is not as a sweep writes it; name another folder") from None
    return Plan(folder, tuple(base), asked, sources)
