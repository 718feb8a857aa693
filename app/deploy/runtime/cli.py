"""`python -m app.deploy.runtime DIR --input IMAGES --output DIR`: `infer.sh` without torch.

Films are followed. `--loop` runs on each frame of a camera, or on each image that arrives in a
folder, each by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.console import log_to_stdout, show_problems
from app.deploy.runtime.manifest import FILE, PRECISIONS
from app.deploy.runtime.runtime import BACKENDS, Runtime
from app.errors import UserError
from app.files import hash_file
from app.inference.batch import Work, predict_batches
from app.inference.concepts import read_all
from app.inference.films import is_film
from app.inference.folder import list_jobs, predict_folder
from app.inference.following import follow_films, list_films, read_following
from app.inference.journal import file_state
from app.inference.postprocess import THRESHOLD
from app.inference.settings import SAVES, Defaults, Settings, make_settings, with_defaults
from app.inference.track_files import FILMS, TRACK_DEFAULTS, TRACK_SAVES

log = logging.getLogger("app")
FAILED = 3  # exit code: some inputs failed, all others are done


@dataclass(frozen=True)
class RuntimeSettings(Settings):
    """Settings of a run by an exported folder (`checkpoint`) and a backend (`device`)."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for results to share an output folder."""
        concepts = [file_state(Path(file)) for file in self.concepts]
        return {
            **asdict(self),
            "concepts": concepts,
            "manifest": hash_file(Path(self.checkpoint) / FILE),
        }


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        words: arguments; None for those of the process.
    """
    log_to_stdout()
    # A shell starts background processes with SIGINT ignored; an endless loop must obey it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = make_parser().parse_args(words)
    try:
        sys.exit(run(options))
    except UserError as error:
        show_problems(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(options: argparse.Namespace) -> int:
    """Do what the flags say; return the exit code."""
    _check_flags(options)
    runtime = Runtime.load(options.folder, backend=options.backend, precision=options.precision)
    log.info("%s: %s by %s", options.folder, runtime.backend.precision, runtime.backend.name)
    if options.check:
        _check(runtime)
        return 0
    follows = not options.loop and (options.track or is_film(options.input))
    following = read_following(
        *(follows, options.every, options.begin, options.end),
        fill=options.fill_gaps,
        overwrite=options.overwrite,
    )
    settings = _settings(options, runtime, follows)
    if options.concept:
        runtime.learn(read_all(options.concept))
    if follows:
        films = list_films(
            *(options.input, options.output_dir, settings.save),
            fps=options.fps,
            overwrite=options.overwrite,
        )
        problems = follow_films(films, options.output_dir, settings, following, runtime)
        return FAILED if problems else 0
    if options.loop:
        from app.deploy.runtime.camera import serve

        failed = serve(
            runtime,
            options.input,
            settings,
            options.output_dir,
            frames=options.frames,
            overwrite=options.overwrite,
        )
        return FAILED if failed else 0

    @contextlib.contextmanager
    def open_work(settings: Settings, output: Path, _: int) -> Iterator[tuple[Work, str]]:
        yield partial(predict_batches, runtime, settings, output), runtime.backend.precision

    jobs = list_jobs(options.input, options.output_dir, settings.save, overwrite=options.overwrite)
    failures = predict_folder(
        jobs, options.output_dir, settings, open_work, overwrite=options.overwrite
    )
    return FAILED if failures else 0


def _check_flags(options: argparse.Namespace) -> None:
    """Raise UserError with all flags that are missing or contradict each other."""
    problems = []
    if not options.check and options.input is None:
        problems.append("--input: say which images, or which film")
    if not (options.check or options.loop) and options.output_dir is None:
        problems.append("--output: say which folder takes what is found")
    if not options.loop and options.frames is not None:
        problems.append("--frames: is for --loop")
    if problems:
        raise UserError(problems)


def _check(runtime: Runtime) -> None:
    """Raise UserError where this device's outputs are not the exporter's."""
    if misses := runtime.check():
        raise UserError(
            [f"{runtime.folder}: this device's outputs are not those of the exporter:"]
            + [f"  {miss}" for miss in misses]
            + ["  Try a safer --precision, or the other --backend."]
        )
    log.info("%s: this device's outputs are those of the exporter", runtime.folder)


def _settings(options: argparse.Namespace, runtime: Runtime, follows: bool) -> Settings:
    """Return the settings of the flags, checked against what the folder can be asked."""
    manifest = runtime.manifest
    save = TRACK_DEFAULTS if follows else ("coco",) if options.loop else ("overlay", "coco")
    settings: Settings = RuntimeSettings(
        checkpoint=str(options.folder),
        prompts=tuple(options.prompt),
        concepts=tuple(options.concept),
        threshold=options.threshold,
        max_detections=options.max_detections,
        nms=options.nms,
        tile=options.tile,
        overlap=options.overlap,
        save=save,
        device=runtime.backend.name,
        precision=runtime.backend.precision,
    )
    defaults = Defaults(
        manifest.classes,
        manifest.prompts,
        None if manifest.threshold == THRESHOLD else manifest.threshold,
    )
    settings = make_settings(
        settings,
        prompts_file=options.prompts,
        boxes=(),
        negative_boxes=(),
        save=options.save,
        kinds=TRACK_SAVES if follows else SAVES,
        vocabulary=manifest.prompts,
    )
    return with_defaults(settings, defaults)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m app.deploy.runtime",
        description="Find what prompts name in images by an exported folder. The same command goes "
        "on after a stop.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="exported folder, with its manifest.json")
    add(
        "--input",
        help="image or film, folder, glob, list of paths (.txt), camera:0 or RTSP stream; with "
        "--loop a folder, or camera:0 and whatever else OpenCV opens behind camera:",
    )
    add("--output-dir", "--output", type=Path, metavar="DIR", help="folder for what is found")
    add(
        "--prompt",
        action="append",
        default=[],
        help="what to find; several; without any, the classes of the folder",
    )
    add("--prompts", type=Path, metavar="FILE", help="file of prompts: a line each, or YAML")
    add(
        "--concept",
        action="append",
        default=[],
        metavar="FILE",
        help="example boxes, encoded by python -m app concept, that are found by its name; several",
    )
    share = _number(float, 0, 1)
    add("--threshold", type=share, help="least score, 0..1 [default: the folder's]")
    add("--max-detections", type=_number(int, 1), default=100, help="an image, or a tile [100]")
    add("--nms", type=share, help="IoU of masks above which the lower score goes")
    add("--tile", type=_number(int, 32), help="pixels; cut larger images into such tiles")
    add(
        "--overlap",
        type=_number(float, 0, 0.9),
        default=0.2,
        help="of neighbouring tiles [0.2]",
    )
    add(
        "--save",
        action="append",
        default=[],
        help=f"{', '.join(SAVES)}, of films {', '.join([*FILMS, 'youtube-vis', 'mot'])} as well; "
        "several, or parted by commas [overlay,coco; with --loop coco; of films "
        f"{','.join(TRACK_DEFAULTS)}]",
    )
    add("--overwrite", action="store_true", help="replace what is there")
    add("--backend", choices=["auto", *BACKENDS], default="auto", help="runs the graphs")
    add("--precision", choices=PRECISIONS, help="[the fastest that suits the backend]")
    add("--check", action="store_true", help="compare this device's outputs with the exporter's")
    add("--loop", action="store_true", help="go on with each frame or new image, until Ctrl-C")
    add("--track", action="store_true", help="the images are the frames of a film")
    add("--every", type=_number(int, 1), default=1, help="take each second frame, third, … [1]")
    add("--from", dest="begin", metavar="TIME", help="of a film, as 10 or 1:30")
    add("--to", dest="end", metavar="TIME", help="of a film, as 20 or 1:40")
    add("--fill-gaps", action="store_true", help="put a track where it was between two places")
    add("--fps", type=_number(float, 0.01, 1000), default=25, help="of --track [25]")
    add("--frames", type=_number(int, 1), help="end --loop after so many")
    return parser


def _number(
    kind: Callable[[str], float], least: float, most: float = float("inf")
) -> Callable[[str], float]:
    """Return a function with which argparse reads a number within bounds."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: is no number") from None
        if not least <= value <= most:
            bound = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bound}")
        return value

    return read
