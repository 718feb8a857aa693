"""A prepared run, trained to its end: the story, top to bottom."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra.utils import instantiate
from sam3.model.sam3_image import Sam3Image

from app.config.schema import Config, Resume
from app.console import counted, duration
from app.datasets.build import Splits
from app.datasets.dataset_report import write_page
from app.datasets.depth import levels_of
from app.evaluation import report
from app.evaluation.evaluate import score_dataset, score_examples, write_predictions
from app.evaluation.intervals import with_intervals
from app.evaluation.model_card import write_card
from app.evaluation.record import Record, read_before
from app.evaluation.report_page import write_report
from app.evaluation.run_files import read_figures
from app.evaluation.summary import gain_in_words
from app.evaluation.validate import Ranks, Validation
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model, count_parameters, padding_note
from app.model.device import choose_device, choose_precision, choose_threads, in_words, peak_memory
from app.signals import StopRequest
from app.training import checkpoints, compiling, features, method
from app.training.batches import Batches, query_dataset
from app.training.checkpoints import RunState
from app.training.fingerprint import fingerprint
from app.training.losses import LabelLosses, Losses
from app.training.metric import metric_name
from app.training.optimizer import learning_rates
from app.training.output_folder import log_next_steps
from app.training.preview import draw_first
from app.training.step import Step, build_accelerator
from app.training.trainer import Figures, Recorder, Trainer, ranks_of
from app.training.warm_start import warm_start

log = logging.getLogger("app")
TOLERANCE = 0.005  # of a figure, between two validations of the same weights on CUDA

# Adds a teacher's losses to those of the labels: (config, model, splits, label losses) -> both.
Teach = Callable[[Config, Sam3Image, Splits, LabelLosses], Losses]


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, and the figures of its best weights."""

    folder: Path
    figures: Figures


def train(
    config: Config,
    splits: Splits,
    pretrained_path: Path | None,
    *,
    recorder: Recorder | None,
    resume: Resume | None = None,
    stop: StopRequest | None = None,
    teach: Teach | None = None,
    validated: Validation | None = None,
) -> Outcome:
    """Fine-tune, validate after each epoch, save; the output folder then holds the run.

    Args:
        config: the whole of it, as `prepare` checks it.
        splits: the images to train on and to validate on.
        pretrained_path: file or folder of the weights to start from; None for random ones.
        recorder: of figures; None on all ranks but the first.
        resume: go on from the newest checkpoint in the output folder; "weights": from its weights.
        stop: asked for by signals.
        teach: adds a teacher's losses, where the run has a teacher.
        validated: stands for the validation of the weights at the last epoch, which are those that
            are kept: what folds found. None: each epoch is validated, and the best are kept.

    Raises:
        Stopped: by a signal; the state is saved.
        FloatingPointError: a loss or gradient is not finite; the state before is saved.
        torch.OutOfMemoryError: the GPU's memory is used up; says what is saved.
        UserError: the disk is full; the last checkpoint is whole.
    """
    if pretrained_path is not None:
        pretrained_path = weights.find_file(pretrained_path)
    started = begin(
        config,
        splits,
        pretrained_path,
        recorder=recorder,
        resume=resume,
        stop=stop,
        teach=teach,
        validated=validated,
    )
    trainer, accelerator, folder = started.trainer, started.trainer.accelerator, started.folder
    config, precision = trainer.config, trainer.precision
    is_main = accelerator.is_main_process
    was_finished = trainer.is_finished()
    trainer.run()

    # The end: the best weights, reloaded as a user would, make predictions, figures and report.
    state, begun = trainer.state, trainer.begun  # of the first leg, where the run was resumed
    rates = learning_rates(config.optim, trainer.model, started.lr_scale)
    device, frozen, encoders = started.device, started.frozen, started.encoders
    del trainer, started  # makes room for the best weights
    free(accelerator)
    ranks = ranks_of(accelerator)
    if validated is None:
        scored = score_best(config, splits, precision, device, ranks, frozen, encoders)
        check_reloaded(scored.figures, state, config, device)
    else:
        weights.load(folder / "weights" / "best")  # or an error
        scored = validated
    if is_main:
        with checkpoints.disk_errors(folder):
            evaluation = Record("valid", splits.valid, scored.results)
            before = read_before(folder, splits.valid)
            figures = with_intervals(scored.figures, splits.valid, scored.results, before)
            write_predictions(folder, evaluation, config)
            report.plot_curves(state.rows, folder / "plots")
            cost = {
                "seconds": round(time.monotonic() - begun, 1),
                "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
            }
            if was_finished:
                before_that = read_figures(folder)
                cost |= {key: before_that[key] for key in cost if key in before_that}
            if recorder is not None:
                recorder.finish(all_figures(figures, state, cost))
            write_page(folder, splits)
            page = write_report(folder, evaluation)
            write_card(
                config,
                pretrained_path,
                splits,
                learning_rates=rates,
                processes=accelerator.num_processes,
                precision=precision,
            )
        log.info(
            "done in %s; figures in %s, report in %s",
            duration(cost["seconds"]),
            folder / "metrics.json",
            page,
        )
        for line in gain_in_words(state.baseline, figures, splits.valid):
            log.info("%s", line)
        if config.evaluation.pictures:
            log.info("pictures of truth and prediction: %s", folder / "plots" / "valid_*.png")
        log_next_steps(folder / "weights" / "best", splits)
    accelerator.end_training()
    return Outcome(folder, scored.figures)


@dataclass(frozen=True)
class Started:
    """A run that can go on: its trainer, and what its end needs.

    Attributes:
        frozen: encoders that are not trained.
        encoders: those whose features are cached on disk.
    """

    trainer: Trainer
    device: torch.device
    frozen: list[str]
    encoders: list[str]
    lr_scale: float

    @property
    def folder(self) -> Path:
        return self.trainer.folder


def begin(
    config: Config,
    splits: Splits,
    pretrained_path: Path | None,
    *,
    recorder: Recorder | None,
    resume: Resume | None = None,
    stop: StopRequest | None = None,
    teach: Teach | None = None,
    validated: Validation | None = None,
    keeps_results: bool = False,
) -> Started:
    """Return a run ready for its first update, or for the next one where it is resumed.

    The arguments are those of `train`.

    Args:
        keeps_results: as of `Trainer`: the run is a fold.
    """
    begun = time.monotonic()
    folder = Path(config.output_dir)
    if pretrained_path is not None:
        pretrained_path = weights.find_file(pretrained_path)
    if config.training.cache_features == "auto":
        meta = method.on_meta(config, pretrained=pretrained_path is not None)
        config = features.decide_feature_cache(config, splits, resume, meta)
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    if teach is None:  # a teacher is wide
        choose_threads(device, config.model)
    accelerator = build_accelerator(device, find_unused=method.leaves_unused(config.method))
    is_main = accelerator.is_main_process

    # The model: pretrained or resumed weights, frozen parts, adapters, the feature cache.
    checkpoint = checkpoints.find_newest(folder / "checkpoints") if resume else None
    if resume and checkpoint is None and not keeps_results:
        log.info("nothing was saved yet in %s: from the beginning", folder)
    set_seed(config.seed)
    model = load_model(config, splits, pretrained_path, checkpoint, device, precision)
    frozen, encoders = features.frozen_encoders(model), features.cached_encoders(config, model)
    stores = features.cache_encoders(model, encoders, features.FOLDER, precision)
    features.cache_prompts(model, frozen)
    if encoders and is_main:
        log.info("features of the frozen %s: cached in %s", " and ".join(encoders), features.FOLDER)

    # What an update needs: losses, batches, optimizer.
    labels = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), precision)
    losses: Losses = labels if teach is None else teach(config, model, splits, labels)
    data = query_dataset(config, splits.train)
    batches = Batches(config, data, accelerator, [*stores, *losses.stores])
    # Pretrained weights move at a tenth of the rate; adapters, like random weights, begin at zero.
    moves_pretrained = pretrained_path is not None and config.method.lora is None
    lr_scale = config.optim.lr_scale or (0.1 if moves_pretrained else 1.0)
    step = Step(config, model, losses, accelerator, batches, lr_scale=lr_scale)

    # The run itself.
    header = weights.Header(
        model=config.model,
        prompts=splits.train.class_names,
        data_hash=splits.train.content_hash(),
        levels=levels_of(splits.train),
        base=None if pretrained_path is None else weights.origin(pretrained_path),
    )
    if is_main and header.base is not None and header.base.layout == "3.1":
        log.info(
            "weights: began as SAM 3.1, whose tracker and its necks (interactive_convs, "
            "propagation_convs) are set aside: export --format sam3 brings them back"
        )
    trainer = Trainer(
        config,
        model,
        batches,
        step,
        accelerator,
        valid=splits.valid,
        header=header,
        fingerprint=fingerprint(config, splits, accelerator.num_processes),
        precision=precision,
        recorder=recorder,
        stop=stop or StopRequest(),
        begun=begun,
        validated=validated,
        keeps_results=keeps_results,
    )
    if checkpoint is not None and resume == "weights":
        trainer.restart(checkpoint)
        log.info("from the weights of %s; the schedule starts anew", checkpoint)
    elif checkpoint is not None:
        trainer.resume(checkpoint)
        done = trainer.state
        log.info("resumed from %s, after epoch %d, update %d", checkpoint, done.epoch, done.updates)
        if trainer.is_finished():
            log.info("nothing is left to train: more --epochs go on; the best weights are scored")
    if is_main and not keeps_results:
        describe(config, model, splits, accelerator, precision, lr_scale)
        if checkpoint is None:
            data = query_dataset(config, splits.train)  # a new one: training draws from its own
            with checkpoints.disk_errors(folder):
                draw_first(
                    data, iter(batches.sampler), folder / "plots", config.evaluation.pictures
                )
    updates = batches.updates_per_epoch * config.training.epochs - trainer.state.updates
    if compiling.is_wanted(config, device, updates, cached="vision" in encoders):
        step.set_training()
        images = config.training.batch_size
        compiling.compile_trunk(model, images, config.model.resolution, precision)
    return Started(trainer, device, frozen, encoders, lr_scale)


def free(accelerator: Accelerator) -> None:
    """Give back the memory of a run whose trainer nobody holds, once all ranks are here."""
    accelerator.free_memory()
    gc.collect()
    accelerator.wait_for_everyone()


def load_model(
    config: Config,
    splits: Splits,
    pretrained_path: Path | None,
    checkpoint: Path | None,
    device: torch.device,
    precision: torch.dtype,
) -> Sam3Image:
    """Return the model as training begins or goes on: loaded, frozen in part, with its adapter.

    Args:
        checkpoint: whose weights take the place of the pretrained ones; an adapter goes onto them.
    """
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    adapts = config.method.lora is not None
    checkpoint_adapts = adapts and checkpoint is not None and weights.is_adapter(checkpoint)
    start = pretrained_path
    if checkpoint is not None and not checkpoint_adapts:
        start = checkpoint
    if start is not None:
        start = weights.find_file(start)
        weights.load_into(model, start, merge=True)
    elif config.training.warm_start.method == "pixels":
        warm = config.training.warm_start
        warm_start(model.to(device), config.model, splits.train, warm, config.seed, precision)
    base = weights.base_reference(start) if adapts and start is not None else None
    method.prepare(model, config.method, pretrained=pretrained_path is not None, base=base)
    if checkpoint is not None and checkpoint_adapts:
        weights.load_into(model, checkpoint, merge=False)
    return model


def describe(
    config: Config,
    model: Sam3Image,
    splits: Splits,
    accelerator: Accelerator,
    precision: torch.dtype,
    lr_scale: float,
) -> None:
    """Log what is trained, on what, and how."""
    for note in (*splits.notes, padding_note(config.model)):
        if note:
            log.info("note: %s", note)
    log.info(
        "model %s: %.1f M parameters, %d px, on %s in %s, %s",
        config.model.name,
        count_parameters(model)["total"] / 1e6,
        config.model.resolution,
        accelerator.device,
        in_words(accelerator.device, precision),
        counted(accelerator.num_processes, "process"),
    )
    method.describe(model, config.method.name)
    log.info(
        "data: %d training and %s; classes: %s",
        len(splits.train.images),
        counted(len(splits.valid.images), "validation image"),
        ", ".join(splits.train.class_names),
    )
    if config.distill.teacher is not None:
        log.info("teacher: %s", config.distill.teacher)
    rates = learning_rates(config.optim, model, lr_scale)
    log.info(
        "learning rates: %s (lr_scale %g)",
        ", ".join(f"{part} {rate:.2g}" for part, rate in rates.items()),
        lr_scale,
    )


def score_best(
    config: Config,
    splits: Splits,
    precision: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    frozen: list[str],
    encoders: list[str],
) -> Validation:
    """Reload the best weights, as a user would, and score them.

    Args:
        frozen: encoders that were not trained.
        encoders: those whose features are cached on disk.
    """
    best, header = weights.load(Path(config.output_dir) / "weights" / "best")
    features.cache_encoders(best, encoders, features.FOLDER, precision)
    features.cache_prompts(best, frozen)
    predictor = Predictor(best.to(device), header.model, precision)
    title = "best weights, reloaded"
    scored = score_dataset(predictor, splits.valid, config, title, ranks=ranks)
    if ranks.rank:
        return scored
    by_examples = score_examples(predictor, splits.train, splits.valid, config)
    return replace(scored, figures=scored.figures | by_examples)


def check_reloaded(figures: Figures, state: RunState, config: Config, device: torch.device) -> None:
    """Compare what reloaded weights score with what they scored when they were saved.

    On CUDA a difference beyond TOLERANCE is logged: kernels add in any order there, and one
    detection of few is much of a figure.

    Raises:
        RuntimeError: they differ on a CPU, where they are the same to the bit.
    """
    again = figures[metric_name(figures, config.evaluation.metric)]
    if again == state.best:
        return
    problem = f"weights/best reloaded give {again}, and gave {state.best} when saved"
    if state.best is None or device.type == "cpu":
        raise RuntimeError(problem)
    if abs(again - state.best) > TOLERANCE:
        log.warning("note: %s", problem)


def all_figures(
    best: Figures, state: RunState, cost: Mapping[str, float]
) -> dict[str, float | str | int]:
    """Return metrics.json: the best weights' figures by plain names, the others with a prefix."""
    last = {k: v for k, v in state.rows[-1].items() if k != "epoch"}
    return {
        **best,
        **{f"last/{name}": value for name, value in last.items()},
        **{f"baseline/{name}": value for name, value in state.baseline.items()},
        "epochs": state.epoch,
        **cost,
    }
