"""`--loop`: run on each frame of a camera, or on each image that arrives in a folder, and time it.

OpenCV is imported only for a camera.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from app.datasets.images import EXTENSIONS, ImageError, open_image
from app.deploy.runtime.runtime import STAGES, Runtime
from app.errors import UserError
from app.files import check_no_links, claim, exists_problem
from app.inference.detections import Detections
from app.inference.folder import ended_by_sigterm, unwritable_is_user_error
from app.inference.journal import file_state
from app.inference.outputs import PER_IMAGE, coco_results, write_images
from app.inference.settings import Settings
from app.inference.tables import TABLES

log = logging.getLogger("app")
CAMERA = "camera:"
LINES = "predictions.jsonl"  # of --save coco: a line for each frame, as it comes
EVERY = 30  # frames between two lines of times
WINDOW = 1000  # times are of the last frames, so many
POLL = 0.2  # seconds between two looks at a folder


@dataclass(frozen=True)
class Frame:
    """An image in a folder, or the next one of a camera.

    Attributes:
        name: the stem of its output files.
        read: decodes it; raises ImageError, or EOFError where a camera has ended.
    """

    name: str
    read: Callable[[], Image.Image]


class Speed:
    """Times of frames in seconds: in total, and by stage."""

    def __init__(self) -> None:
        self.frames = 0
        self._totals: deque[float] = deque(maxlen=WINDOW)
        self._stages: dict[str, deque[float]] = {s: deque(maxlen=WINDOW) for s in STAGES}

    def add(self, total: float, stages: Mapping[str, float]) -> None:
        """Add the times of one frame: in total, with reading and writing, and of its stages."""
        self.frames += 1
        self._totals.append(total)
        for stage, seconds in stages.items():
            self._stages[stage].append(seconds)

    def __str__(self) -> str:
        """Return `30 frames, 12.1 a second; ms, mean (median): pre 4.0 (3.9), model …`."""
        if not self.frames:
            return "0 frames"
        parts = [
            f"{stage} {1000 * statistics.fmean(times):.1f} ({1000 * statistics.median(times):.1f})"
            for stage, times in self._stages.items()
        ]
        rate = 1 / statistics.fmean(self._totals)
        return f"{self.frames} frames, {rate:.1f} a second; ms, mean (median): {', '.join(parts)}"


def serve(
    runtime: Runtime,
    source: str,
    settings: Settings,
    output: Path | None,
    *,
    frames: int | None = None,
    overwrite: bool = False,
) -> int:
    """Run on each frame until Ctrl-C, the end of the camera, or `frames` frames; log times.

    Args:
        source: a folder, or `camera:` with a number or whatever else OpenCV opens.
        output: folder for the detections; None only measures times.

    Returns:
        The number of frames that failed.

    Raises:
        UserError: no such source, or an output folder that is not empty.
    """
    if output is not None:
        _check_output(output, settings, overwrite)
    failed, speed = 0, Speed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        stack.callback(lambda: log.info("%s", speed))
        source_frames = stack.enter_context(_frames(source))
        lines = _open_lines(stack, output, settings)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt, EOFError))
        for frame in source_frames:
            try:
                _run_frame(runtime, frame, settings, output, lines, speed)
            except ImageError as error:
                failed += 1
                log.error("failed: %s", error)
                continue
            if speed.frames % EVERY == 0:
                log.info("%s", speed)
            if speed.frames == frames:
                break
    return failed


def _run_frame(
    runtime: Runtime,
    frame: Frame,
    settings: Settings,
    output: Path | None,
    lines: TextIO | None,
    speed: Speed,
) -> None:
    """Read one frame, find objects in it, write them, and add its times."""
    begun, before = time.perf_counter(), dict(runtime.seconds)
    image = frame.read()
    detections = runtime.predict(image, settings.prompts, **settings.limits())
    if output is not None:
        with unwritable_is_user_error(output):
            _write(frame, image, detections, settings, output, lines)
    stages = {stage: runtime.seconds[stage] - before[stage] for stage in STAGES}
    speed.add(time.perf_counter() - begun, stages)


def _write(
    frame: Frame,
    image: Image.Image,
    detections: Detections,
    settings: Settings,
    output: Path,
    lines: TextIO | None,
) -> None:
    """Write what --save asks for: files of the frame, and its line."""
    write_images(output, frame.name, image, detections, settings.save)
    if lines is not None:
        results = coco_results(detections, 0, range(1, len(detections.prompts) + 1))
        entry = {
            "image": frame.name,
            "width": detections.width,
            "height": detections.height,
            "found": [
                {**{k: v for k, v in result.items() if k != "image_id"}, "prompt": prompt}
                for result in results
                if (prompt := detections.prompts[result["category_id"] - 1])
            ],
        }
        lines.write(json.dumps(entry, allow_nan=False) + "\n")
        lines.flush()


def _check_output(output: Path, settings: Settings, overwrite: bool) -> None:
    """Raise UserError where the folder holds anything, or what is saved needs an end."""
    check_no_links(output, [LINES, *(PER_IMAGE[kind].path for kind in PER_IMAGE)])
    problems = []
    if "csv" in settings.save:
        problems.append("--save csv: is written when all is done, which --loop never is; use coco")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        problems.append(exists_problem(output, "is not empty"))
    if problems:
        raise UserError(problems)


def _open_lines(
    stack: contextlib.ExitStack, output: Path | None, settings: Settings
) -> TextIO | None:
    """Write the legends of all frames; return the file for a line of each frame, if asked for."""
    if output is None:
        return None
    with unwritable_is_user_error(output):
        claim(output)
        for kind in ("semantic", "yolo"):  # their legends need no frame
            if kind in settings.save:
                path, write = TABLES[kind]
                write(output / path, (), settings.prompts)
        if "coco" not in settings.save:
            return None
        return stack.enter_context((output / LINES).open("w", encoding="utf-8"))


@contextlib.contextmanager
def _frames(source: str) -> Iterator[Iterator[Frame]]:
    """Open a source; yield its frames."""
    if not source.startswith(CAMERA):
        if not Path(source).is_dir():
            raise UserError(f"--input {source}: --loop takes a folder, or camera:0")
        yield _arriving(Path(source))
        return
    camera = _open_camera(source)
    try:
        yield _camera_frames(source, camera)
    finally:
        camera.release()


def _open_camera(source: str) -> Any:
    """Return OpenCV's camera; raise UserError where there is none."""
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            f"--input {source}: OpenCV cannot be used here ({error}): pip install "
            "opencv-python-headless, or give a folder"
        ) from None
    name = source[len(CAMERA) :]
    camera = cv2.VideoCapture(int(name) if name.isdecimal() else name)
    if not camera.isOpened():
        raise UserError(f"--input {source}: OpenCV finds no such camera; is another one numbered?")
    camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not those in a queue
    return camera


def _camera_frames(source: str, camera: Any) -> Iterator[Frame]:
    """Yield the frames of a camera without end."""
    number = 0

    def read() -> Image.Image:
        there, pixels = camera.read()  # (H, W, 3) uint8 BGR
        if not there and number == 1:
            raise UserError(f"--input {source}: gives no frame; does another program hold it?")
        if not there:
            raise EOFError("the camera gives no more")
        return Image.fromarray(pixels[:, :, ::-1].copy())

    while True:
        number += 1
        yield Frame(f"frame_{number:06d}", read)


def _arriving(folder: Path) -> Iterator[Frame]:
    """Yield the images of a folder, and those that arrive or change, once each is whole.

    An image is taken for whole where two looks find it the same.
    """
    settled: dict[Path, list[int]] = {}
    before: dict[Path, list[int]] = {}
    while True:
        now = _states(folder)
        ready = [path for path, state in now.items() if before.get(path) == state]
        for path in sorted(ready, key=lambda path: (now[path][1], path)):
            if settled.get(path) != now[path]:
                settled[path] = now[path]
                yield Frame(path.name, functools.partial(open_image, path))
        settled = {path: state for path, state in settled.items() if path in now}
        before = now
        time.sleep(POLL)


def _states(folder: Path) -> dict[Path, list[int]]:
    """Return image → what changes when it changes, without those that vanish meanwhile."""
    states = {}
    for path in folder.iterdir():
        if path.suffix.lower() in EXTENSIONS:
            with contextlib.suppress(FileNotFoundError):
                states[path] = file_state(path)
    return states
