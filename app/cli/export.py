"""`python -m app export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import options
from app.cli.options import DATA, OUTPUT, PROMPTS
from app.console import command
from app.errors import UserError, nearest

if TYPE_CHECKING:
    from app.deploy.export import Wanted

log = logging.getLogger("app")
cli = typer.Typer(add_completion=False)
FORMATS = ("onnx", "triton", "hf", "sam3")
GRAPHS = "Graphs"


@dataclass(frozen=True)
class DatasetFlags(options.SourceFlags):
    """Hold the flags of `SourceFlags`, where --format is the format of the export."""

    format: Annotated[
        str | None,
        typer.Option(
            "--dataset-format", help="of --dataset-dir, decided by hand", rich_help_panel=DATA
        ),
    ] = None


@dataclass(frozen=True)
class OnnxFlags:
    """Hold the flags that --format onnx alone reads."""

    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16, bf16, int8; several in one where commas part them. Of sam3 one",
            rich_help_panel=GRAPHS,
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="what can be asked for; the classes of the weights unless given",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="a file of prompts: .txt, or YAML class: prompt", rich_help_panel=PROMPTS
        ),
    ] = None
    open_vocabulary: Annotated[
        bool,
        typer.Option(
            "--open-vocabulary",
            help="any words: exports the text encoder as well",
            rich_help_panel=PROMPTS,
        ),
    ] = False
    prompts_a_pass: Annotated[
        int | None,
        typer.Option(help="prompts that one run of the graph answers", rich_help_panel=GRAPHS),
    ] = None
    top: Annotated[
        int | None,
        typer.Option(
            help="masks of so many queries a prompt alone, as 32; all", rich_help_panel=GRAPHS
        ),
    ] = None
    resolution: options.Resolution = None
    images: Annotated[
        str | None,
        typer.Option(
            help="images without labels to compare and calibrate on: folder, file, glob",
            rich_help_panel=DATA,
        ),
    ] = None
    tensorrt: Annotated[
        str | None, typer.Option(help="version that it is for; noted", rich_help_panel=GRAPHS)
    ] = None
    target: Annotated[
        str | None, typer.Option(help="device that it is for; noted", rich_help_panel=GRAPHS)
    ] = None

    def given(self) -> list[str]:
        """Return the names of the flags that were given."""
        names = [field.name for field in fields(self) if getattr(self, field.name)]
        return [f"--{name.replace('_', '-')}" for name in names]

    def wanted(self) -> Wanted:
        """Return what is to be exported.

        Raises:
            UserError: prompts beside an open vocabulary, or a file that is none of prompts.
        """
        from app.deploy.export import Wanted
        from app.inference.inputs import read_prompts

        prompts = list(self.prompt or ())
        if self.prompts is not None:
            prompts += read_prompts(self.prompts)
        if self.open_vocabulary and prompts:
            raise UserError("--open-vocabulary answers any words: leave out --prompt and --prompts")
        precisions = [word.strip() for text in self.precision or () for word in text.split(",")]
        target = {"tensorrt": self.tensorrt, "target": self.target}
        return Wanted(
            tuple(precisions) or ("fp32",),
            None if self.open_vocabulary else tuple(prompts),
            self.prompts_a_pass,
            self.top,
            self.resolution,
            {key: value for key, value in target.items() if value},
        )


@cli.command()
@options.with_flags
def export(
    *,
    checkpoint: options.Weights,
    overrides: options.Overrides = None,
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output", "--output-dir", help="folder for what is exported", rich_help_panel=OUTPUT
        ),
    ],
    to_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx (any runtime, TensorRT), triton (its model repository), hf (transformers) "
            "or sam3 (Meta's own code)",
            rich_help_panel=OUTPUT,
        ),
    ] = "onnx",
    base: Annotated[
        Path | None,
        typer.Option(
            help="of sam3, hf --video: Meta's file that the weights began as, where it was moved",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    video: Annotated[
        bool,
        typer.Option(
            "--video", help="of hf: with the tracker, for Sam3VideoModel", rich_help_panel=OUTPUT
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    flags: OnnxFlags,
    measure_on: Annotated[
        int, typer.Option(min=1, help="most images to compare on", rich_help_panel=DATA)
    ] = 20,
    source: DatasetFlags,
) -> None:
    """Write weights for other runtimes, each file compared with the model it came from."""
    given = options.to_overrides(overrides, source.by_key())
    if to_format not in FORMATS:
        raise UserError(
            f"--format {to_format}: there is {', '.join(FORMATS)}.{nearest(to_format, FORMATS)}"
        )
    from app.deploy.output import check_output

    check_output(output_dir, checkpoint, overwrite=overwrite)  # before torch is imported
    options.check_paths([*given, f"checkpoint={checkpoint}"])
    has_graphs = to_format in ("onnx", "triton")
    unread = [] if has_graphs else [*flags.given(), *given]
    if base is not None and to_format != "sam3" and not (to_format == "hf" and video):
        unread.append("--base")
    if video and to_format != "hf":
        unread.append("--video")
    if to_format == "sam3" and "--precision" in unread:
        unread.remove("--precision")
    if unread:
        raise UserError(f"{', '.join(unread)}: nothing reads it beside --format {to_format}")
    if has_graphs:
        write_graphs(
            checkpoint,
            output_dir,
            given,
            flags,
            measure_on=measure_on,
            overwrite=overwrite,
            for_triton=to_format == "triton",
        )
        return
    if to_format == "sam3":
        from app.deploy import upstream_file

        precisions = flags.precision or ["fp32"]
        upstream_file.export(
            checkpoint,
            output_dir,
            base_file=base,
            precision=",".join(precisions),
            overwrite=overwrite,
        )
        log.info("weights: %s", output_dir / upstream_file.PT)
        return
    from app.deploy import transformers_folder

    folder = transformers_folder.export(
        checkpoint, output_dir, video=video, base_file=base, overwrite=overwrite
    )
    log.info("weights: %s", folder)


def write_graphs(
    checkpoint: Path,
    folder: Path,
    overrides: list[str],
    flags: OnnxFlags,
    *,
    measure_on: int,
    overwrite: bool,
    for_triton: bool,
) -> None:
    """Write ONNX graphs of the weights, and log how large they are and how to use them.

    Args:
        overrides: of the configuration: where labelled images come from.
        for_triton: write them as a model repository of Triton's.

    Raises:
        UserError: what cannot be exported.
    """
    from app.config.compose import load_config
    from app.datasets.read_splits import read_splits
    from app.inference.inputs import find_images

    images = None if flags.images is None else find_images(flags.images, "--images")
    from app.deploy import export as onnx  # torch: only where there is something to do

    wanted = flags.wanted()
    valid, max_detections = None, 100
    if any(text.startswith("dataset.") for text in overrides):
        config = load_config(["transforms=none", *overrides], None, None)
        valid, max_detections = read_splits(config).valid, config.evaluation.max_detections
    options: dict[str, Any] = {
        "images": images,
        "valid": valid,
        "max_detections": max_detections,
        "measure_on": measure_on,
    }
    if for_triton:
        from app.deploy import triton

        triton.export(checkpoint, folder, wanted, overwrite=overwrite, **options)
        log.info("exported: %s", folder)
        log.info("serve it: %s", command("tritonserver", "--model-repository", folder.resolve()))
        return
    manifest = onnx.export(checkpoint, folder, wanted, overwrite=overwrite, **options)
    size = sum(file["bytes"] for file in manifest.files.values())
    log.info("exported: %s, %.1f MB in %d files", folder, size / 1e6, len(manifest.files) + 1)
    run = command("python", "-m", "app.deploy.runtime", folder)
    log.info("use it: %s --input IMAGES --output DIR", run)
