"""Flags that several commands share, and flags → `KEY=VALUE` of configs/train.yaml."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from app.errors import UserError
from app.model.weight_files import ADAPTER, FILE, find_file

log = logging.getLogger("app")

# Panels of a command's help.
DATA, LABELS, MODEL, METHOD, SCHEDULE = "Data", "Labels", "Model", "Method", "Schedule"
OUTPUT, CLUSTER, PROMPTS, DETECTION = "Output", "Cluster", "Prompts", "Detection"
FILMS = "Films"
MANY = "Images by the million"

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of configs/train.yaml")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="replace what is there", rich_help_panel=OUTPUT)
]
Resolution = Annotated[
    int | None, typer.Option(help="pixels, square; the weights' own", rich_help_panel=MODEL)
]
Size = Annotated[
    str,
    typer.Option(help="size, for weights that do not say theirs", rich_help_panel=MODEL),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda", rich_help_panel=MODEL)]
Input = Annotated[
    str,
    typer.Option(
        help="an image, a folder, a quoted glob, or a .txt with a path a line", rich_help_panel=DATA
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Option(
        help="weights file or folder; last: of the newest run",
        callback=lambda weights: last_weights(weights),
        rich_help_panel=MODEL,
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        help="a class; several; without any, the classes of the weights", rich_help_panel=PROMPTS
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="least score; the weights' own unless given, else 0.5",
        rich_help_panel=DETECTION,
    ),
]


def last_weights(weights: Any) -> Any:
    """Return what "last" stands for: the best weights of the run in ./outputs that wrote last.

    Args:
        weights: a str or Path, as typer parsed it; the answer is of the same type. Or None.

    Raises:
        UserError: no run there has weights.
    """
    if str(weights) != "last" or Path("last").exists():
        return weights
    files = [
        file for name in (FILE, ADAPTER) for file in Path("outputs").glob(f"**/weights/best/{name}")
    ]
    if not files:
        raise UserError("--checkpoint last: no run in outputs has weights; name a file or a folder")
    newest = max(files, key=lambda file: file.stat().st_mtime)
    ahead = newest.stat().st_mtime > time.time() + 60  # the clock of another machine may differ
    why = ", by a date in the future: name the run, if another is meant" if ahead else ""
    log.info("weights: %s (the newest run's%s)", newest.parent, why)
    return type(weights)(newest.parent)


Weights = Annotated[
    Path,
    typer.Argument(help="weights folder or file; last: of the newest run", callback=last_weights),
]


@dataclass(frozen=True)
class LabelFlags:
    """Hold the flags that decide what labels mean where their files leave it open."""

    boxes: Annotated[
        str | None,
        typer.Option(
            help="COCO's: xywh, xyxy, cxcywh, shares, cxcywh-shares, or masks: those of the masks",
            rich_help_panel=LABELS,
        ),
    ] = None
    crowd: Annotated[
        str | None,
        typer.Option(help="crowds: ignore, or instances (objects)", rich_help_panel=LABELS),
    ] = None
    void: Annotated[
        int | None,
        typer.Option(help="value of mask pixels of no object", rich_help_panel=LABELS),
    ] = None
    attribute: Annotated[
        str | None,
        typer.Option(help="the one of several that says the class", rich_help_panel=LABELS),
    ] = None
    masks: Annotated[
        str | None,
        typer.Option(help="numbers in mask PNGs: objects or classes", rich_help_panel=LABELS),
    ] = None
    group_column: Annotated[
        str | None,
        typer.Option(
            help="of CSV, imagefolder or HuggingFace, or field of a COCO image: what it says alike "
            "stays on one side of a split",
            rich_help_panel=LABELS,
        ),
    ] = None
    accept_above: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="take proposals of app label from this score on; a class of lower ones is not "
            "asked for in their image",
            rich_help_panel=LABELS,
        ),
    ] = None

    def decisions(self) -> dict[str, object]:
        """Return the flags by their keys in configs/train.yaml."""
        keys = ("boxes", "crowd", "void", "attribute", "masks", "group_column", "accept_above")
        return {f"dataset.reading.{key}": getattr(self, key) for key in keys}


@dataclass(frozen=True)
class OriginFlags:
    """Hold the flags that say where labelled images come from; without any: synthetic shapes."""

    dataset_dir: Annotated[
        str | None,
        typer.Option(help="folder or zip of labelled images", rich_help_panel=DATA),
    ] = None
    hf_dataset: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME[@REVISION]", help="from huggingface.co", rich_help_panel=DATA
        ),
    ] = None
    hf_config: Annotated[
        str | None,
        typer.Option(
            help="configuration of --hf-dataset, where it has several", rich_help_panel=DATA
        ),
    ] = None
    hf_split: Annotated[
        str | None,
        typer.Option(help="take this split of --hf-dataset alone", rich_help_panel=DATA),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="image=A,objects=B",
            help="of --hf-dataset; see configs/train.yaml",
            rich_help_panel=DATA,
        ),
    ] = None
    roboflow: Annotated[
        str | None,
        typer.Option(
            metavar="WORKSPACE/PROJECT/VERSION", help="from Roboflow", rich_help_panel=DATA
        ),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(help="of --dataset-dir, decided by hand", rich_help_panel=DATA),
    ] = None


@dataclass(frozen=True)
class SourceFlags(LabelFlags, OriginFlags):
    """Hold the flags of a dataset: where it comes from, and then what its labels mean."""

    def by_key(self) -> dict[str, object]:
        """Return the flags by their keys in configs/train.yaml."""
        return {
            "dataset.dir": self.dataset_dir,
            "dataset.huggingface.name": self.hf_dataset,
            "dataset.huggingface.config": self.hf_config,
            "dataset.huggingface.split": self.hf_split,
            "dataset.huggingface.columns": self.columns,
            "dataset.roboflow": self.roboflow,
            "dataset.format": self.format,
            **self.decisions(),
        }


@dataclass(frozen=True)
class ModelFlags:
    """Hold the flags that say which weights a run starts from, or scores."""

    model: Annotated[
        str,
        typer.Option(
            help="sam3, small, nano, or auto: that of --checkpoint; without one sam3 where a GPU "
            "and its weights are at hand, else nano",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="weights to start from or to score: file or folder; last: of the newest run; "
            "none: random ones",
            callback=last_weights,
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True)
class SweepFlags:
    """Hold the flags of how a sweep is made."""

    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="cells at a time",
            show_default="one a GPU, else one",
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    retry: Annotated[
        bool,
        typer.Option("--retry", help="try cells that failed once more", rich_help_panel=SCHEDULE),
    ] = False
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="jobs of a cluster that run together", rich_help_panel=CLUSTER),
    ] = None


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose parameters of a dataclass's type are that class's fields instead.

    typer reads a command's flags from its signature. Each field of such a class stands in the
    signature as a flag of its own, where the parameter stood; the command is called with the
    dataclass.

    Raises:
        ValueError: two flags have one name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flags: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            flags.append(_flag(name, parameter.default, hints[name]))
            continue
        field_hints = get_type_hints(groups[name], include_extras=True)
        flags += [_flag(f.name, f.default, field_hints[f.name]) for f in fields(groups[name])]

    @functools.wraps(command)
    def called_by_typer(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        command(**values)

    called_by_typer.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    called_by_typer.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return called_by_typer


def _flag(name: str, default: object, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def to_overrides(overrides: Sequence[str] | None, flags: Mapping[str, object]) -> list[str]:
    """Return the user's `KEY=VALUE`s, and those of the flags that were given, which win."""
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return [*(overrides or []), *given]


def check_paths(overrides: Sequence[str]) -> None:
    """Refuse a dataset or weights that are not there, before torch is imported, which takes long.

    Args:
        overrides: the command's `KEY=VALUE`s, of which the last of a key holds.

    Raises:
        UserError: names all of them.
    """
    named = dict(text.partition("=")[::2] for text in overrides)
    given = {key: value for key, value in named.items() if value not in ("", "null")}
    problems = []
    if "dataset.dir" in given and not Path(given["dataset.dir"]).exists():
        problems.append(f"--dataset-dir {given['dataset.dir']}: no such folder or zip")
    for key in ("checkpoint", "distill.teacher"):
        if given.get(key, "none") not in ("auto", "none"):
            try:
                find_file(Path(given[key]))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
