"""The full state of a run: saved whole, found, resumed."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from sam3.model.sam3_image import Sam3Image

from app.config.schema import Config
from app.errors import UserError
from app.files import atomic_folder, clear_up, read_json, write_json
from app.model import weights
from app.model.adapters import has_lora
from app.model.halves import originals
from app.training.fingerprint import Fingerprint
from app.training.random_state import restore_random_state
from app.training.step import Step

KEEP = 2  # newest checkpoints


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        epoch: epochs that are done, validated where that was due.
        updates: updates that are done, over all epochs.
        losses, images, seconds: summed over the updates of the epoch under way.
        skipped: of these updates, as their scaled gradients were beyond float16.
        best: the best value of the chosen metric so far; None before the first validation.
        stale: validations in a row that did not better it.
        rows: the rows of metrics.csv.
        baseline: figures before training.
        durations: how many updates, validations and saves were timed, and their seconds (`Pace`).
        elapsed: seconds of the run until it was saved, over all of its legs.
    """

    epoch: int = 0
    updates: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float | None = None
    stale: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    baseline: dict[str, float] = field(default_factory=dict)
    durations: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0


_STATE = TypeAdapter(RunState)  # only compared: it makes 1.0 of 1, which tables would show


def save(
    folder: Path,
    state: RunState,
    model: Sam3Image,
    header: weights.Header,
    step: Step,
    *,
    fingerprint: Fingerprint,
    random_states: Sequence[dict[str, Any]],
) -> Path:
    """Write `folder/update-NNNNNNNN/`, whole or not at all, and drop all but the newest two.

    Args:
        random_states: of each process, by its rank.

    Returns:
        The checkpoint's folder.
    """
    _clear_up(folder)
    checkpoint = path(folder, state)
    with atomic_folder(checkpoint) as temporary:
        weights.save(model, temporary, header)
        _write({**step.state_dict(), "random": list(random_states)}, temporary / "state.pt")
        content = {"state": asdict(state), "fingerprint": fingerprint}
        write_json(temporary / "run.json", content)
        for part in (temporary / "state.pt", temporary):  # the others are flushed already
            _flush(part)
    _flush(folder)
    others = [old for old in _all(folder) if old != checkpoint]
    drop_all_but(checkpoint, *others[1 - KEEP :])
    return checkpoint


def path(folder: Path, state: RunState) -> Path:
    """Return the folder of a checkpoint in `folder`; sorted by name, they are sorted by update."""
    return folder / f"update-{state.updates:08d}"


def drop_all_but(*keep: Path) -> None:
    """Remove the other checkpoints beside these."""
    for other in keep[0].parent.glob("update-*"):
        if other not in keep:
            (other / "state.pt").unlink(missing_ok=True)  # first: half of one is none
            shutil.rmtree(other)


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`; None where a run was stopped before its first."""
    _clear_up(folder)
    checkpoints = _all(folder)
    return checkpoints[-1] if checkpoints else None


def read(checkpoint: Path) -> tuple[RunState, Fingerprint]:
    """Return how far the run had come, and its fingerprint.

    Raises:
        UserError: run.json is not as it was written.
    """
    file = checkpoint / "run.json"
    content = read_json(file)
    try:
        state = RunState(**content["state"])
        if _STATE.validate_python(content["state"]) != state:
            raise TypeError("texts stand where numbers must be")
        return state, {**content["fingerprint"]}
    except (ValidationError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: is not as it was written ({' '.join(str(error).split())}); resume from "
            "another checkpoint, or take the weights alone: --resume=weights"
        ) from None


def restore(checkpoint: Path, step: Step, rank: int) -> RunState:
    """Load what `save` wrote, the random states of process `rank` included, but for the weights."""
    try:
        content = _load(checkpoint / "state.pt")
        step.load_state_dict(content)
        restore_random_state(content["random"][rank])
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: cannot be resumed with these settings ({error}). Resume with the "
            "settings it was started with, or take its weights alone: --resume=weights"
        ) from None
    return read(checkpoint)[0]


def check_space(folder: Path, config: Config, model: Sam3Image) -> None:
    """Refuse a run whose checkpoints and weights find no room in `folder`.

    Args:
        model: as `method.prepare` leaves it, on any device.

    Raises:
        UserError: with what is needed and what is free.
    """
    parts = (folder / "checkpoints", folder / "weights")
    there = [file for part in parts for file in part.rglob("*") if file.is_file()]
    more = sum(run_bytes(config, model)) - sum(file.stat().st_size for file in there)
    needed = max(more, checkpoint_bytes(config, model))  # one is replaced when the next is whole
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--output-dir {folder}: {free / 1e9:.2f} GB are free, and this run needs "
            f"{needed / 1e9:.2f} GB: {checkpoint_bytes(config, model) / 1e9:.2f} GB for each of "
            f"{KEEP} checkpoints, and weights. Free {(needed - free) / 1e9:.2f} GB, or name a "
            "folder on another disk."
        )


def run_bytes(config: Config, model: Sam3Image) -> tuple[int, int]:
    """Return the bytes of checkpoints and weights that a run leaves, and those it adds to save.

    Args:
        model: as `method.prepare` leaves it.
    """
    checkpoint, training = checkpoint_bytes(config, model), config.training
    saves = math.ceil(training.epochs / training.save_every)
    if training.save_minutes is not None or training.warm_start.method != "none":
        saves += 1
    left = min(saves, KEEP) * checkpoint + 2 * weight_bytes(model)
    return left, checkpoint if saves > KEEP else weight_bytes(model)


def checkpoint_bytes(config: Config, model: Sam3Image) -> int:
    """Return the bytes of a checkpoint: the weights, AdamW's moments, an EMA.

    Args:
        model: as `method.prepare` leaves it.
    """
    return weight_bytes(model) + optimizer_bytes(config, model)


def weight_bytes(model: Sam3Image) -> int:
    """Return the bytes of saved weights: the model, or its adapter alone."""
    if has_lora(model):
        return trained_bytes(model)
    held = originals(model)
    return sum(held.get(name, parameter).nbytes for name, parameter in model.named_parameters())


def optimizer_bytes(config: Config, model: Sam3Image) -> int:
    """Return the bytes of AdamW's two moments, and of the EMA where there is one."""
    return (2 if config.training.ema is None else 3) * trained_bytes(model)


def trained_bytes(model: Sam3Image) -> int:
    """Return the bytes of the trainable parameters."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of a full or lost disk, while a run writes to `folder`, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        newest = find_newest(folder / "checkpoints")
        left = f"The last checkpoint is whole: {newest}" if newest else "There is no checkpoint yet"
        raise UserError(
            f"--output-dir {folder}: could not be written ({error}). {left}. Free "
            "space on its disk, then go on with the same command and --resume."
        ) from None


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None


def _write(content: dict[str, Any], file: Path) -> None:
    """Save by torch, whose errors do not say that a disk is full; raise OSError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        free = shutil.disk_usage(file.parent).free / 1e9
        raise OSError(f"{file.name} was cut short; {free:.2f} GB are free") from error


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("update-*") if (path / "state.pt").is_file())


def _clear_up(folder: Path) -> None:
    """Finish or remove what a killed `save` left, whichever checkpoint it was."""
    for part in folder.glob(".update-*.part-*"):
        clear_up(folder / part.name[1:].partition(".")[0])


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
