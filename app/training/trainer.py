"""A run under way: epochs, validations, saves, and a good place to stop at any moment.

Every rank has the same `RunState`. Rank 0 writes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sam3.model.sam3_image import Sam3Image

from app.config.schema import Config
from app.console import counted, progress
from app.datasets.coco import Dataset
from app.evaluation import record
from app.evaluation.evaluate import score_dataset
from app.evaluation.scoring import THRESHOLD
from app.evaluation.validate import ALONE, Ranks, Validation
from app.inference.golden import answer
from app.inference.postprocess import THRESHOLD as USUAL
from app.inference.predictor import Predictor
from app.model import weights
from app.model.device import told
from app.model.score_counts import ScoreCounts, count_scores
from app.signals import Stopped, StopRequest
from app.training import checkpoints
from app.training.batches import Batches
from app.training.checkpoints import RunState
from app.training.fingerprint import Fingerprint, are_comparable
from app.training.metric import gain, metric_name
from app.training.pace import Pace
from app.training.random_state import random_state
from app.training.step import Step
from app.training.table import Table

log = logging.getLogger("app")
Figures = dict[str, float]  # of a validation, by their names in metrics.json
SKIPPED = "train/skipped_updates"


def ranks_of(accelerator: Accelerator) -> Ranks:
    """Return the processes that share a validation."""
    if accelerator.num_processes == 1:
        return ALONE
    return Ranks(accelerator.process_index, accelerator.num_processes, gather_object)


class Recorder(Protocol):
    """Take the figures of a run, as `tracking.files.Tracker` does."""

    def log_epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take the rows of all epochs so far."""

    def finish(self, figures: Mapping[str, float | str | int]) -> None:
        """Take the figures of the best weights, once."""


class Trainer:
    """Train from where `state` is to the end.

    Args:
        model: the one that `step` updates, not wrapped for several processes.
        valid: the images to validate on.
        header: of the weights that are saved.
        recorder: None on all ranks but the first.
        stop: looked at after each update, and after each image of a validation.
        begun: when this leg of the run began, by `time.monotonic`; None: now.
        validated: stands for the validation of the last epoch, and there is no other; None: each
            epoch is validated.
        keeps_results: write what each validation found, for the folds of a dataset.
    """

    def __init__(
        self,
        config: Config,
        model: Sam3Image,
        batches: Batches,
        step: Step,
        accelerator: Accelerator,
        *,
        valid: Dataset,
        header: weights.Header,
        fingerprint: Fingerprint,
        precision: torch.dtype,
        recorder: Recorder | None,
        stop: StopRequest,
        begun: float | None = None,
        validated: Validation | None = None,
        keeps_results: bool = False,
    ) -> None:
        self.validated, self.keeps_results = validated, keeps_results
        self.last_epoch = min(
            config.training.epochs, config.training.last_epoch or config.training.epochs
        )
        self.config, self.model, self.accelerator = config, model, accelerator
        self.batches, self.step = batches, step
        self.valid, self.header, self.fingerprint = valid, header, fingerprint
        self.precision, self.recorder, self.stop = precision, recorder, stop
        self.folder = Path(config.output_dir)
        self.state = RunState()
        self.pace = Pace(self.state.durations)
        self._saved_at = time.monotonic()
        self.begun = self._saved_at if begun is None else begun

    def run(self) -> None:
        """Train all epochs that are left, or until the chosen figure stays as it is.

        Raises:
            Stopped: by a signal; the state is saved.
            FloatingPointError: a loss or gradient is not finite; the state before is saved.
            torch.OutOfMemoryError: the GPU's memory is used up; says what is saved.
            UserError: the disk is full; the last checkpoint is whole.
        """
        self.table = Table(self.last_epoch)
        with self.stop.deferred():
            try:
                if not self.state.baseline:
                    self.validate_start()
                metric_name(self.state.baseline, self.config.evaluation.metric)  # or a UserError
                while not self.is_finished():
                    self.train_epoch()
                    self.end_epoch()
            except Stopped:
                self.save()
                log.info("stopped %s", self._where())
                raise
            except FloatingPointError as error:
                self.save()
                raise FloatingPointError(f"{error} Stopped {self._where()}") from None
            except torch.OutOfMemoryError as error:
                # Other ranks are in the midst of their step, and take no part in a save.
                if self.step.is_whole and self.accelerator.num_processes == 1:
                    self.save()
                raise torch.OutOfMemoryError(f"{told(error)} Stopped {self._where()}") from None

    def is_finished(self) -> bool:
        return self._is_stale() or self.state.epoch >= self.last_epoch

    def _is_stale(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.state.stale >= patience

    def _where(self) -> str:
        state, folder = self.state, self.folder / "checkpoints"
        saved = f"saved in {folder}; go on with the same command and --resume"
        if checkpoints.find_newest(folder) is None:
            saved = "nothing is saved yet"
        return f"after update {state.updates}, in epoch {state.epoch + 1}; {saved}"

    def validate_start(self) -> None:
        """Take the figures before training, with which all others are compared."""
        found = self.validate("before training")
        self.state.baseline = found.figures
        if self.accelerator.is_main_process:
            record.write_before(self.folder, found.results)
        for line in self.table.row(0, self.state.baseline).splitlines():
            log.info("%s", line)
        if self.config.training.warm_start.method != "none":
            self.save()

    def train_epoch(self) -> None:
        """Do the updates of the epoch under way that are left."""
        state, epochs = self.state, self.last_epoch
        each = self.batches.updates_per_epoch
        title = f"epoch {state.epoch + 1}/{epochs}: update"
        self.step.set_training()
        first = state.updates - state.epoch * each
        with progress(title, each * epochs, state.updates, time_left=self.time_left) as advance:
            begun = time.monotonic()
            for batches in self.batches.epoch(state.epoch, first):
                done = self.step(batches, state.epoch)
                state.updates += 1
                for name, value in done.losses.items():
                    state.losses[name] = state.losses.get(name, 0.0) + value
                state.images += done.images
                state.skipped += done.skipped
                seconds = time.monotonic() - begun
                state.seconds += seconds
                self.pace.add("update", seconds)
                advance(state.updates, f"loss {done.loss:.3g}")
                self.between_updates()
                begun = time.monotonic()

    def time_left(self) -> float | None:
        """Return the seconds that the run has left; None as long as no update was timed."""
        state = self.state
        epochs = range(state.epoch + 1, self.last_epoch + 1)
        validations = sum(self._is_validated(epoch) for epoch in epochs)
        saves = sum(self._is_saved(epoch) for epoch in epochs)
        updates = self.batches.updates_per_epoch * self.last_epoch - state.updates
        # The best weights are validated again at the end, reloaded.
        validations = 0 if self.validated is not None else validations + 1
        return self.pace.left({"update": updates, "validation": validations, "save": saves})

    def between_updates(self) -> None:
        """Stop where any rank was asked to; save where `training.save_minutes` have passed."""
        minutes = self.config.training.save_minutes
        is_due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        requests = torch.tensor([self.stop.asked, is_due], dtype=torch.int32)
        if self.accelerator.num_processes > 1:
            requests = self.accelerator.reduce(requests.to(self.accelerator.device), "sum")
        if requests[0]:
            raise Stopped
        if requests[1]:
            self.save()

    def end_epoch(self) -> None:
        """Validate, keep the best weights, write the figures, save: as is due."""
        state = self.state
        row = self._row()
        if self._is_validated(state.epoch + 1):
            validation = self.validated or self.validate(f"epoch {state.epoch + 1}")
            row |= validation.figures
            if self.keeps_results and self.accelerator.is_main_process:
                with checkpoints.disk_errors(self.folder):
                    record.write_epoch(self.folder, state.epoch + 1, validation)
            self._set_threshold(validation.figures, self._count_scores(validation))
            self._keep_best(validation.figures)
        state.rows.append(row)
        state.epoch += 1
        state.losses, state.images, state.seconds, state.skipped = {}, 0, 0.0, 0
        for line in self.table.row(state.epoch, row, self.time_left()).splitlines():
            log.info("%s", line)
        if skipped := row.get(SKIPPED):
            log.info(
                "note: %d of %s skipped, with gradients beyond float16; the scale is %g now",
                *(skipped, counted(self.batches.updates_per_epoch, "update")),
                self.step.scaler.get_scale(),
            )
        if self._is_stale():
            log.info("no better in %d validations (training.patience): the end", state.stale)
        if self.recorder is not None:
            with checkpoints.disk_errors(self.folder):
                self.recorder.log_epoch(state.rows)
        if self.is_finished() or self._is_saved(state.epoch):
            with self.pace.timed("save"):
                self._save_weights("last")
                self.save()

    def _row(self) -> Figures:
        """Return the epoch's row of metrics.csv, before its validation."""
        state, updates = self.state, self.batches.updates_per_epoch
        skipped = {SKIPPED: state.skipped} if self.step.scaler.is_enabled() else {}
        return {
            "epoch": state.epoch + 1,
            **{f"train/{name}": value / updates for name, value in state.losses.items()},
            "train/learning_rate": self.step.learning_rate,
            "train/seconds_per_update": state.seconds / updates,
            "train/images_per_second": state.images / state.seconds,
            **skipped,
        }

    def _is_validated(self, epoch: int) -> bool:
        if self.validated is not None:
            return epoch == self.last_epoch
        return epoch % self.config.evaluation.every == 0 or epoch == self.last_epoch

    def _is_saved(self, epoch: int) -> bool:
        return epoch % self.config.training.save_every == 0 or epoch == self.last_epoch

    def validate(self, title: str) -> Validation:
        """Score the weights as they are now; every rank scores its share.

        Raises:
            Stopped: on all ranks, where a signal reached one of them.
        """
        with self.pace.timed("validation"), self._averaged_weights():
            predictor = Predictor(self.model, self.config.model, self.precision)
            return score_dataset(
                predictor,
                self.valid,
                self.config,
                title,
                check=self.stop.check,
                ranks=ranks_of(self.accelerator),
                time_left=self.time_left,
            )

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Give the model the weights that are validated and kept: the EMA, where there is one."""
        ema = self.step.ema
        return ema.in_place() if ema is not None else contextlib.nullcontext()

    def _set_threshold(self, row: Mapping[str, float], scores: ScoreCounts | None) -> None:
        """Save the score at which F1 is highest with the weights, and the scores above it."""
        self.header = self.header.model_copy(
            update={"threshold": row.get(THRESHOLD), "scores": scores}
        )

    def _count_scores(self, validation: Validation) -> ScoreCounts:
        classes = {category.id: category.name for category in self.valid.categories}
        threshold = validation.figures.get(THRESHOLD, USUAL)
        return count_scores(len(self.valid.images), classes, validation.results, threshold)

    def _keep_best(self, figures: Figures) -> None:
        """Save `weights/best` when the chosen figure improves; at equal figures the later stays."""
        name = metric_name(figures, self.config.evaluation.metric)
        better = gain(name, figures[name], self.state.best)
        self.state.stale = 0 if better > 0 else self.state.stale + 1
        if better >= 0:
            self.state.best = figures[name]
            self._save_weights("best")

    def _save_weights(self, name: str) -> None:
        if not self.accelerator.is_main_process:
            return
        with self._averaged_weights(), checkpoints.disk_errors(self.folder):
            golden = None
            if name == "best":  # just validated, so that the model is in evaluation mode
                predictor = Predictor(self.model, self.config.model, self.precision)
                golden = answer(predictor, self.header.prompts)
            header = self.header.model_copy(update={"golden": golden})
            weights.save(self.model, self.folder / "weights" / name, header)

    def save(self) -> None:
        """Write a checkpoint of where the run is, with the random states of all ranks."""
        self.state.elapsed = time.monotonic() - self.begun
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            with checkpoints.disk_errors(self.folder):
                checkpoints.save(
                    self.folder / "checkpoints",
                    self.state,
                    self.model,
                    self.header,
                    self.step,
                    fingerprint=self.fingerprint,
                    random_states=random_states,
                )
        self._saved_at = time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the same run, whose weights the model has already."""
        self.state = checkpoints.restore(checkpoint, self.step, self.accelerator.process_index)
        self.pace = Pace(self.state.durations)
        self.begun -= self.state.elapsed
        validated = [row for row in self.state.rows if THRESHOLD in row]
        header = weights.read_header(checkpoint)
        self._set_threshold(validated[-1] if validated else {}, header.scores if header else None)

    def restart(self, checkpoint: Path) -> None:
        """Begin the schedule anew from a checkpoint's weights, which the model has already.

        Figures from before are kept where they can be compared with those to come.
        """
        state, then = checkpoints.read(checkpoint)
        if are_comparable(then, self.fingerprint):
            self.state.best, self.state.baseline = state.best, state.baseline
        self.save()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoints.drop_all_but(checkpoints.path(checkpoint.parent, self.state))
