"""Flags that several commands share, and flags → `KEY=VALUE` of configs/train.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of configs/train.yaml")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]

# What infer and label look for, and in what.
Input = Annotated[
    str, typer.Option(help="an image, a folder, a quoted glob, or a .txt with a path a line")
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="least score; the weights' own unless given, else 0.5"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]

# Where images come from. Without any: synthetic shapes.
DatasetDir = Annotated[str | None, typer.Option(help="folder or zip of labelled images")]
HfDataset = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME[@REVISION]", help="from huggingface.co")
]
HfConfig = Annotated[
    str | None, typer.Option(help="configuration of --hf-dataset, where it has several")
]
HfSplit = Annotated[str | None, typer.Option(help="take this split of --hf-dataset alone")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="image=A,objects=B", help="of --hf-dataset; see configs/train.yaml"),
]
Roboflow = Annotated[
    str | None, typer.Option(metavar="WORKSPACE/PROJECT/VERSION", help="from Roboflow")
]
Format = Annotated[str | None, typer.Option(help="of --dataset-dir, decided by hand")]


def source(
    dataset_dir: str | None,
    hf_dataset: str | None,
    hf_config: str | None,
    hf_split: str | None,
    columns: str | None,
    roboflow: str | None,
    format: str | None,
) -> dict[str, object]:
    """The flags above by their keys."""
    return {
        "dataset.dir": dataset_dir,
        "dataset.huggingface.name": hf_dataset,
        "dataset.huggingface.config": hf_config,
        "dataset.huggingface.split": hf_split,
        "dataset.huggingface.columns": columns,
        "dataset.roboflow": roboflow,
        "dataset.format": format,
    }


def asked(overrides: Sequence[str] | None, flags: Mapping[str, object]) -> list[str]:
    """The user's `KEY=VALUE`s, and those of the flags that were given, which win."""
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return [*(overrides or []), *given]
