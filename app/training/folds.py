"""Cross-validation: folds that score every image, and weights that are trained on all of them.

Each fold is a run in `folds/<number>`. Every epoch is judged by what all folds found at it, so that
neither the epoch nor the figures hang on a handful of images.
"""

from __future__ import annotations

import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.config.schema import Config, Resume
from app.console import counted
from app.datasets.build import Splits
from app.errors import UserError
from app.evaluation import record
from app.evaluation.off_prompt import Firing, OffPrompts
from app.evaluation.run_files import read_figures
from app.evaluation.scoring import score
from app.evaluation.validate import Validation
from app.files import read_json, write_json
from app.model.device import is_main
from app.signals import StopRequest
from app.training import checkpoints, run
from app.training.fingerprint import check_same, fingerprint
from app.training.metric import gain, metric_name
from app.training.output_folder import prepare_folder, write_settings
from app.training.run import Outcome, Teach
from app.training.trainer import Recorder

log = logging.getLogger("app")
FOLDER = "folds"
SMOOTHED = 3  # validations, that a fold's best epoch is the best mean of
_FINGERPRINT = "fingerprint.json"
RecordIn = Callable[[Path], Recorder]


@dataclass(frozen=True)
class Chosen:
    """What the folds say: the epoch to end at, and what their weights found at it.

    Attributes:
        best: the best epoch of each fold.
        validation: of all images, each by the fold that had set it aside.
    """

    epoch: int
    best: tuple[int, ...]
    validation: Validation


def train(
    config: Config,
    splits: Splits,
    pretrained_path: Path | None,
    *,
    recorder: Recorder | None,
    record_in: RecordIn,
    resume: Resume | None = None,
    stop: StopRequest | None = None,
    teach: Teach | None = None,
) -> Outcome:
    """Train every fold, choose the epoch, train on all images to it.

    The arguments are those of `run.train`, whose errors are raised. What is done is not done again
    where the run is resumed.

    Args:
        record_in: makes the recorder of a fold, in its folder.

    Raises:
        UserError: a fold was trained by other settings.
    """
    if resume == "weights":
        best = Path(config.output_dir) / "weights" / "best"
        raise UserError(
            f"--resume=weights: is of a run in folds; begin a new one, with --checkpoint {best} "
            "and another --output-dir, or give --folds none"
        )
    # Folds end at the same epoch, to be judged together.
    config = _changed(config, patience=None)
    for note in splits.notes if is_main() else ():
        log.info("note: %s", note)
    for number in range(len(splits.folds)):
        _train_fold(config, splits, number, pretrained_path, record_in, stop, teach)
    chosen = choose(Path(config.output_dir), splits, config)
    log.info(
        "the folds' best epochs: %s; the weights that are kept are trained on all %d images to "
        "epoch %d",
        ", ".join(map(str, chosen.best)),
        len(splits.train.images),
        chosen.epoch,
    )
    return run.train(
        _changed(config, last_epoch=chosen.epoch),
        splits.whole(),
        pretrained_path,
        recorder=recorder,
        resume=resume,
        stop=stop,
        teach=teach,
        validated=chosen.validation,
    )


def fold_config(config: Config, number: int) -> Config:
    """Return the configuration of a fold, counted from 0: the run's own, in its folder."""
    return config.model_copy(
        update={"output_dir": str(Path(config.output_dir) / FOLDER / str(number + 1))}
    )


def _changed(config: Config, **values: int | None) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=values)})


def _train_fold(
    config: Config,
    splits: Splits,
    number: int,
    pretrained_path: Path | None,
    record_in: RecordIn,
    stop: StopRequest | None,
    teach: Teach | None,
) -> None:
    """Train a fold, or go on with it; leave its figures and results, but no weights."""
    config, part = fold_config(config, number), splits.fold(number)
    folder = Path(config.output_dir)
    name = f"fold {number + 1} of {len(splits.folds)}"
    if _is_done(folder, config, part):
        log.info("%s: done before", name)
        return
    log.info(
        "%s: %s to train on, %d to validate on",
        *(name, counted(len(part.train.images), "image"), len(part.valid.images)),
    )
    recorder = None
    if is_main():
        prepare_folder(folder, resume="auto", overwrite=False)
        write_settings(folder, config, (), part, "auto")
        recorder = record_in(folder)
    if newest := checkpoints.find_newest(folder / "checkpoints"):
        then = checkpoints.read(newest)[1]
        check_same(newest, then, fingerprint(config, part, int(then["processes"])))
    started = run.begin(
        config,
        part,
        pretrained_path,
        recorder=recorder,
        resume="auto",
        stop=stop,
        teach=teach,
        keeps_results=True,
    )
    started.trainer.run()
    state, accelerator = started.trainer.state, started.trainer.accelerator
    marks = started.trainer.fingerprint
    del started
    run.free(accelerator)
    if recorder is not None:
        with checkpoints.disk_errors(folder):
            write_json(folder / _FINGERPRINT, marks)
            recorder.finish(
                run.all_figures(state.rows[-1], state, {"seconds": round(state.elapsed, 1)})
            )
        for name in ("checkpoints", "weights"):  # nobody takes them, and they are large
            shutil.rmtree(folder / name, ignore_errors=True)
    accelerator.wait_for_everyone()


def _is_done(folder: Path, config: Config, part: Splits) -> bool:
    """Return whether a fold is trained to its end.

    Raises:
        UserError: by other settings.
    """
    if read_figures(folder).get("epochs", 0) < config.training.epochs:
        return False
    file = folder / _FINGERPRINT
    then = read_json(file)
    check_same(file, then, fingerprint(config, part, int(then["processes"])))
    return True


def choose(folder: Path, splits: Splits, config: Config) -> Chosen:
    """Return the median of the folds' best epochs, and what all folds found at it.

    A fold's best epoch has the best mean of `SMOOTHED` validations around it; of equals the last.
    The figures are of detections by several models: their scores are taken as they are.

    Raises:
        UserError: what a fold found is not there, or not as it was written.
    """
    folders = [folder / FOLDER / str(number + 1) for number in range(len(splits.folds))]
    epochs = sorted(set.intersection(*(set(record.epochs(each)) for each in folders)))
    if not epochs:
        raise UserError(f"{folder / FOLDER}: no epoch was validated by every fold; train them anew")
    parts = [splits.fold(number).valid for number in range(len(splits.folds))]
    threshold = config.prediction.threshold
    best = []
    for each, part in zip(folders, parts, strict=True):
        figures = []
        for epoch in epochs:
            found, off = record.read_epoch(each, epoch, part)
            figures.append(score(part, found, threshold=threshold, off_prompts=off))
        name = metric_name(figures[-1], config.evaluation.metric)
        best.append(_best(name, [row.get(name, 0.0) for row in figures]))
    place = statistics.median_high(best)
    results: list[dict[str, Any]] = []
    firings: list[Firing] = []
    nouns: tuple[str, ...] = ()
    for each, part in zip(folders, parts, strict=True):
        found, off = record.read_epoch(each, epochs[place], part)
        results += found
        firings += off.firings
        nouns = off.nouns
    order = {image.id: index for index, image in enumerate(splits.train.images)}
    results.sort(key=lambda result: order[result["image_id"]])
    off_prompts = OffPrompts(nouns, tuple(firings))
    figures_of_all = score(splits.train, results, threshold=threshold, off_prompts=off_prompts)
    figures_of_all |= {"folds": len(splits.folds), "folds/epoch": epochs[place]}
    validation = Validation(figures_of_all, results, off_prompts)
    return Chosen(epochs[place], tuple(epochs[index] for index in best), validation)


def _best(name: str, values: Sequence[float]) -> int:
    """Return the place of the best smoothed value."""
    half = SMOOTHED // 2
    smooth = [
        float(np.mean(values[max(0, place - half) : place + half + 1]))
        for place in range(len(values))
    ]
    best = 0
    for place, value in enumerate(smooth):
        if gain(name, value, smooth[best]) >= 0:
            best = place
    return best
