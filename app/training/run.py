"""A config → a finished run: its story, top to bottom."""

from __future__ import annotations

import gc
import itertools
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam3.model.sam3_image import Sam3Image

from app.compression import distillation
from app.compression.distillation import Distiller
from app.config.compose import to_yaml
from app.config.schema import Config, Resume
from app.console import duration
from app.datasets import sources
from app.datasets.build import Splits, load_splits, many_classes
from app.datasets.coco import Dataset
from app.datasets.dataset_report import write_page
from app.datasets.decoding import decoding_problems
from app.datasets.prompts import NOUNS, name_classes, nouns_beside, read_prompts
from app.datasets.queries import PromptChoice, QueryDataset
from app.errors import UserError
from app.evaluation import record, report
from app.evaluation.model_card import write_card
from app.evaluation.record import Record
from app.evaluation.report_page import write_report
from app.files import existing, write_json, write_text
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model, count_parameters, padding_note
from app.model.device import choose_device, choose_precision
from app.model.upstream.pin import COMMIT
from app.model.vocabulary import askable, unknown_words
from app.signals import StopRequest
from app.tracking.files import Tracker
from app.training import checkpoints, features, method
from app.training.checkpoints import RunState
from app.training.fingerprint import are_comparable, check_same, differences, fingerprint
from app.training.loop import Loop, build_accelerator
from app.training.metric import metric_name
from app.training.preview import draw_first
from app.training.session import Figures, Session, score, summary
from app.training.warm_start import warm_start

log = logging.getLogger("app")

FEATURES = sources.DATA / "features"  # of frozen encoders
# What a run leaves in its folder; --overwrite removes these and nothing else.
LEAVES = (
    *("config.yaml", "config_resolved.yaml", "environment.json", "train.log", "metrics.csv"),
    *("metrics.json", "metrics_by_class.csv", "report.html", "weights", "checkpoints"),
    *("predictions", "plots", "tensorboard", "slurm", "dataset_report.html", "mlflow.json"),
    *("dataset", "dumps", "logs"),  # of upstream's Trainer
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its folder, and the figures of its best weights."""

    folder: Path
    figures: Figures


def train(
    config: Config,
    splits: Splits,
    start: Path | None,
    *,
    resume: Resume | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Fine-tune, validate after each epoch, save; `LEAVES` is what the folder then holds.

    Args:
        config: the whole of it, checked.
        splits: the images to train on and to validate on.
        start: file or folder of the weights to start from; None for random ones.
        resume: go on from the newest checkpoint in the output folder; "weights": from its weights.
        stop: what signals ask for.

    Raises:
        Stopped: by a signal; the state is saved.
        FloatingPointError: a loss or gradient is not finite; the state before is saved.
        UserError: the disk is full; the last checkpoint is whole.
    """
    begun = time.monotonic()
    start = None if start is None else weights.find_file(start)
    config = settle_features(config, splits, resume, trained=start is not None)
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    accelerator = build_accelerator(device, find_unused=method.leaves_unused(config.method))
    folder = Path(config.output_dir)
    main = accelerator.is_main_process

    newest = checkpoints.find_newest(folder / "checkpoints") if resume else None
    if resume and newest is None:
        log.info("nothing was saved yet in %s: from the beginning", folder)
    set_seed(config.seed)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    adapts = config.method.lora is not None
    onto_base = adapts and newest is not None and weights.is_adapter(newest)
    begin = start if newest is None or onto_base else weights.find_file(newest)
    if begin is not None:
        weights.load_into(model, begin)
    elif config.training.warm_start.method == "pixels":
        model.to(device)
        warm = config.training.warm_start
        warm_start(model, config.model, splits.train, warm, config.seed, precision)
    base = weights.base_reference(begin) if adapts and begin is not None else None
    method.prepare(model, config.method, trained=start is not None, base=base)
    if onto_base and newest is not None:
        weights.load_into(model, newest)
    kept = kept_encoders(config, model)
    features.keep(model, kept, FEATURES, precision)
    if kept and main:
        log.info("features of the frozen %s: kept in %s", " and ".join(kept), FEATURES)
    lesson = make_lesson(config, model, splits, device, precision)
    data = query_dataset(config, splits.train)
    new = start is None or adapts  # what is trained has learnt nothing yet
    lr_scale = config.optim.lr_scale or (1.0 if new else 0.1)
    session = Session(
        config,
        model,
        Loop(config, model, data, accelerator, lr_scale=lr_scale, lesson=lesson),
        accelerator,
        valid=splits.valid,
        header=weights.Header(
            model=config.model,
            prompts=splits.train.class_names,
            data_hash=splits.train.content_hash(),
        ),
        fingerprint=fingerprint(config, splits, accelerator.num_processes),
        precision=precision,
        tracker=Tracker(folder) if main else None,
        stop=stop or StopRequest(),
    )
    if newest is not None:
        _go_on(session, newest, resume)
    if main:
        _describe(config, model, splits, accelerator, precision, lr_scale)
        if newest is None:
            data = query_dataset(config, splits.train)
            with checkpoints.disk_errors(folder):
                draw_first(
                    data, iter(session.loop.sampler), folder / "plots", config.evaluation.pictures
                )
    session.run()
    state, tracker = session.state, session.tracker
    # What was trained makes room for the best weights, which are loaded anew.
    del session, model, lesson
    accelerator.free_memory()
    gc.collect()
    figures: Figures = {}
    if tracker is not None:
        with checkpoints.disk_errors(folder):
            figures = _finish(config, splits.valid, state, precision, device, kept)
            tracker.finish(_all_figures(figures, state, time.monotonic() - begun))
            write_page(folder, splits)
            page = write_report(folder)
            write_card(
                config,
                start,
                splits,
                lr_scale=lr_scale,
                processes=accelerator.num_processes,
                precision=precision,
            )
        log.info(
            "done in %s; figures in %s, report in %s",
            duration(time.monotonic() - begun),
            folder / "metrics.json",
            page,
        )
        say_where(folder / "weights" / "best", splits)
    accelerator.end_training()
    return Outcome(folder, figures)


SETTLED = ("training.cache_features", "dataset.views")  # by `settle_features`


def settle_features(
    config: Config, splits: Splits, resume: Resume | None, *, trained: bool
) -> Config:
    """The configuration with `training.cache_features` and `dataset.views` decided.

    A run that goes on has what it decided when it began: they choose what it trains on.

    Args:
        trained: whether the run starts from weights.

    Raises:
        UserError: features do not fit, and were asked for.
    """
    training, folder = config.training, Path(config.output_dir)
    keeps, views = training.cache_features, config.dataset.views
    newest = None
    if resume in ("all", "auto"):
        newest = checkpoints.find_newest(folder / "checkpoints")
    if newest is not None and keeps == "auto":
        then = checkpoints.read(newest)[1]
        keeps, views = then["training.cache_features"], then["dataset.views"]
    elif newest is None and keeps:
        keeps = _has_room_for_features(config, splits, trained=trained)
    if keeps and views is None:
        views = features.VIEWS
    return config.model_copy(
        update={
            "training": training.model_copy(update={"cache_features": keeps}),
            "dataset": config.dataset.model_copy(update={"views": views}),
        }
    )


def _has_room_for_features(config: Config, splits: Splits, *, trained: bool) -> bool:
    """Whether a frozen trunk's features fit on their disk, beside the run's own files."""
    model = method.on_meta(config, trained=trained)
    precision = choose_precision(
        config.training.precision, choose_device(config.training.device), config.model
    )
    needed = kept_bytes(config, splits, model, precision)
    FEATURES.mkdir(parents=True, exist_ok=True)
    output = existing(Path(config.output_dir))
    beside = output.stat().st_dev == FEATURES.stat().st_dev
    own = sum(checkpoints.run_bytes(config, model)) if beside else 0
    try:
        features.check_space(FEATURES, needed, beside=own)
    except UserError as error:
        if config.training.cache_features is True:
            raise
        log.info("note: not kept: %s", error)
        return False
    return needed > 0


def kept_encoders(config: Config, model: Sam3Image) -> list[str]:
    """Frozen encoders whose features go to disk: where the trunk is one."""
    frozen = features.frozen_encoders(model)
    return frozen if config.training.cache_features and "vision" in frozen else []


def kept_bytes(config: Config, splits: Splits, model: Sam3Image, precision: torch.dtype) -> int:
    """On disk, of features: each view by itself; 0 where no trunk is frozen and no one teaches."""
    if not config.training.cache_features:
        return 0
    views = min(config.dataset.views or features.VIEWS, config.training.epochs)
    seen = len(splits.train.images) * views
    total = 0
    if kept_encoders(config, model):
        images = seen + len(splits.valid.images)
        total += images * features.image_bytes(config.model, precision)
    if (size := distillation.teacher_size(config)) is not None:
        total += seen * features.image_bytes(size, precision)
    return total


def make_lesson(
    config: Config,
    model: Sam3Image,
    splits: Splits,
    device: torch.device,
    precision: torch.dtype,
    folder: Path | None = None,
) -> Distiller | None:
    """What the run's teacher teaches the model; None where it has none.

    Args:
        folder: for the features of its encoders, where they are kept; None: `FEATURES`.
    """
    teacher = distillation.load_teacher(config, model, device, precision)
    if teacher is None:
        return None
    if config.training.cache_features:
        features.keep(teacher.model, features.ENCODERS, folder or FEATURES, precision)
    learns = any(p.requires_grad for p in model.backbone.language_backbone.parameters())
    words = [*splits.train.class_names, *NOUNS] if learns else []
    return Distiller(teacher, config.distill, words)


def _go_on(session: Session, newest: Path, resume: Resume | None) -> None:
    """From the newest checkpoint: all of it, or its weights alone."""
    if resume == "weights":
        before, then = checkpoints.read(newest)
        if are_comparable(then, session.fingerprint):
            session.state.best, session.state.baseline = before.best, before.baseline
        session.save()
        session.accelerator.wait_for_everyone()
        if session.accelerator.is_main_process:
            checkpoints.drop_all_but(checkpoints.path(newest.parent, session.state))
        log.info("from the weights of %s; the schedule starts anew", newest)
        return
    session.restore(newest)
    state = session.state
    log.info("resumed from %s, after epoch %d, update %d", newest, state.epoch, state.updates)


def check_resume(
    config: Config,
    splits: Splits,
    resume: Resume,
    processes: int,
    open_yet: Sequence[str] = (),
) -> None:
    """Refuse to go on from a checkpoint of another run, or from weights of another method.

    Args:
        open_yet: settings that are decided where the run will be, which are not compared here.
    """
    folder = Path(config.output_dir)
    newest = checkpoints.find_newest(folder / "checkpoints")
    if newest is None:
        return
    then, now = checkpoints.read(newest)[1], fingerprint(config, splits, processes)
    now |= {name: then[name] for name in open_yet if name in then}
    if resume != "weights":
        check_same(newest, then, now)
        return
    changed = [key for key in differences(then, now) if key.startswith("method.lora")]
    if changed:
        raise UserError(
            f"--resume=weights: {newest} is of method {then['method.name']}, whose weights are no "
            f"beginning for this one ({', '.join(changed)}). Give --checkpoint "
            f"'{folder / 'weights' / 'best'}' and another --output-dir"
        )


def evaluate(config: Config, splits: Splits, start: Path | None) -> Outcome:
    """Score weights on the split `evaluation.split`, without training."""
    dataset = choose_split(config, splits)
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    set_seed(config.seed)
    model = build_model(config.model)
    if start is not None:
        weights.load_into(model, start, merge=False)
    predictor = Predictor(model.to(device), config.model, precision)
    scored = score(predictor, dataset, config, config.evaluation.split)
    folder = Path(config.output_dir)
    _write_predictions(folder, dataset, scored.results, config, config.evaluation.split)
    write_json(folder / "metrics.json", scored.figures)
    log.info("%s", summary(scored.figures))
    log.info("figures: %s; report: %s", folder / "metrics.json", write_report(folder))
    return Outcome(folder, scored.figures)


def choose_split(config: Config, splits: Splits) -> Dataset:
    """The split `evaluation.split`; raises UserError where the dataset has none."""
    name = config.evaluation.split
    dataset: Dataset | None = getattr(splits, name)
    if dataset is None:
        raise UserError(
            f"evaluation.split={name}: the dataset has no {name} split; there are train and valid"
        )
    return dataset


def prepare_folder(folder: Path, *, resume: Resume | None, overwrite: bool) -> None:
    """Make the output folder ready, or refuse: nothing is overwritten unasked."""
    present = [name for name in LEAVES if (folder / name).exists()]
    if resume in ("all", "weights") and not present:
        raise UserError(
            f"--resume: no run in {folder}. Give --output-dir of the run to resume, or leave out "
            "--resume to start one."
        )
    if present and not (resume or overwrite):
        raise UserError(
            f"--output-dir {folder}: holds a run already ({', '.join(present[:3])}, …). "
            "Go on with --resume, replace it with --overwrite, or name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        for path in (folder / name for name in present if overwrite):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for killed in folder.glob("weights/*/.model.safetensors.*"):
            killed.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror})") from None


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that holds no run."""
    names = itertools.chain([folder], (Path(f"{folder}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not any((name / leaf).exists() for leaf in LEAVES))


def write_settings(
    folder: Path, config: Config, overrides: Sequence[str], splits: Splits, resume: Resume | None
) -> None:
    """config.yaml (what was asked for), config_resolved.yaml (all of it), environment.json.

    A run that goes on keeps what it was begun with: of these only config_resolved.yaml is new.
    """
    write_text(folder / "config_resolved.yaml", to_yaml(config))
    if resume in ("all", "auto") and (folder / "environment.json").is_file():
        return
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.from_dotlist(list(overrides))))
    packages = ("torch", "torchvision", "sam3", "accelerate", "peft", "hotcoco", "numpy")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "sam3_commit": COMMIT,
        "packages": {name: version(name) for name in packages},
        "git": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "data": {
            name: {"images": len(split.images), "sha256": split.content_hash()}
            for name in ("train", "valid", "test")
            if (split := getattr(splits, name)) is not None
        },
        "command": sys.argv[1:],
    }
    write_json(folder / "environment.json", environment)


def read_splits(config: Config) -> Splits:
    """The dataset that is named, or the synthetic shapes."""
    dataset = config.dataset
    splits = load_splits(
        sources.fetch(dataset, config.seed),
        format=dataset.format,
        valid_fraction=dataset.valid_fraction,
        test_fraction=dataset.test_fraction,
        max_drop=dataset.max_drop,
        seed=config.seed,
        limit=dataset.limit,
    )
    plan = [fault.remedy for fault in many_classes(splits.train, dataset.max_prompts)]
    splits = replace(splits, notes=(*splits.notes, *plan))
    if dataset.prompts is not None:
        prompts = read_prompts(Path(dataset.prompts), splits.train.categories)
        splits = splits.map(lambda split: name_classes(split, prompts))
    if dataset.bad_images == "skip":
        splits = splits.map(_without_bad_images)
    return splits


def _without_bad_images(dataset: Dataset) -> Dataset:
    """The images that can be decoded; the others are reported, and counted."""
    bad = decoding_problems([image.path for image in dataset.images])
    for problem in bad.values():
        log.warning("note: left out (dataset.bad_images=skip): %s", problem)
    if bad:
        log.warning("note: %d of %d images left out", len(bad), len(dataset.images))
    return dataset.subset(image.id for image in dataset.images if image.path not in bad)


def query_dataset(config: Config, dataset: Dataset) -> QueryDataset:
    """What the configuration makes of a split for training."""
    settings = config.dataset
    names = [name for c in dataset.categories for name in (c.name, *c.synonyms)]
    choice = PromptChoice(
        most=settings.max_prompts,
        negatives=settings.negatives,
        foreign=settings.foreign,
        near_misses=tuple(settings.near_misses),
        nouns=tuple(askable(config.model.vocabulary, nouns_beside(names))),
    )
    transforms = [instantiate(node) for node in config.transforms.train]
    return QueryDataset(dataset, transforms, seed=config.seed, choice=choice, views=settings.views)


def check_words(config: Config, splits: Splits) -> None:
    """Weights with a stored vocabulary can be asked for its prompts alone.

    Raises:
        UserError: each class, synonym and near miss that is not among them.
    """
    names = [name for c in splits.train.categories for name in (c.name, *c.synonyms)]
    if problems := unknown_words(config.model.vocabulary, [*names, *config.dataset.near_misses]):
        raise UserError(problems)


def check_masks(config: Config, dataset: Dataset) -> None:
    """Masks in the loss need a mask head in the model."""
    wants = config.loss.criterion.get("loss_fn_semantic_seg") is not None
    if wants and not config.model.segmentation:
        raise UserError(
            "The model has no mask head (its weights were trained without masks), and the loss "
            "asks for masks. Add loss=boxes."
        )
    if wants and not any(a.segmentation for a in dataset.annotations):
        log.info("note: the dataset has boxes only; the mask head is not trained")


def _describe(
    config: Config,
    model: Sam3Image,
    splits: Splits,
    accelerator: Accelerator,
    precision: torch.dtype,
    lr_scale: float,
) -> None:
    for note in (*splits.notes, padding_note(config.model), distillation.note(config)):
        if note:
            log.info("note: %s", note)
    counts = count_parameters(model)
    log.info(
        "model %s: %.1f M parameters, %d px, on %s in %s, %d process(es)",
        config.model.name,
        counts["total"] / 1e6,
        config.model.resolution,
        accelerator.device,
        str(precision).removeprefix("torch."),
        accelerator.num_processes,
    )
    method.describe(model, config.method.name)
    log.info(
        "data: %d training and %d validation images; classes: %s",
        len(splits.train.images),
        len(splits.valid.images),
        ", ".join(splits.train.class_names),
    )
    optim = config.optim
    log.info(
        "learning rates: detector %.2g, vision %.2g, text %.2g (lr_scale %g)",
        *(rate * lr_scale for rate in (optim.lr, optim.lr_vision, optim.lr_text)),
        lr_scale,
    )


def _finish(
    config: Config,
    dataset: Dataset,
    state: RunState,
    precision: torch.dtype,
    device: torch.device,
    kept: Collection[str],
) -> Figures:
    """Reload the best weights as a user would, check that they are what was saved, draw."""
    folder = Path(config.output_dir)
    best, header = weights.load(folder / "weights" / "best")
    features.keep(best, kept, FEATURES, precision)
    predictor = Predictor(best.to(device), header.model, precision)
    scored = score(predictor, dataset, config, "best weights, reloaded")
    again = scored.figures[metric_name(scored.figures, config.evaluation.metric)]
    # Kernels on CUDA add in any order; on a CPU the figures are the same to the bit.
    tolerance = 0.0 if device.type == "cpu" else 0.005
    if state.best is None or abs(again - state.best) > tolerance:
        raise RuntimeError(f"weights/best reloaded give {again}, and gave {state.best} when saved")
    _write_predictions(folder, dataset, scored.results, config, "valid")
    report.plot_curves(state.rows, folder / "plots")
    return scored.figures


def _write_predictions(
    folder: Path, dataset: Dataset, results: list[dict[str, Any]], config: Config, split: str
) -> None:
    """What the figures stand on: the results, and the truth that they were scored against."""
    record.write(folder, Record(split, dataset, results))
    report.draw_comparisons(
        dataset,
        results,
        folder / "plots",
        count=config.evaluation.pictures,
        threshold=config.prediction.threshold,
    )


def _all_figures(best: Figures, state: RunState, seconds: float) -> dict[str, float | str | int]:
    """metrics.json: the best weights' figures by their plain names, the others with a prefix."""
    last = {k: v for k, v in state.rows[-1].items() if k != "epoch"}
    return {
        **best,
        **{f"last/{name}": value for name, value in last.items()},
        **{f"baseline/{name}": value for name, value in state.baseline.items()},
        "epochs": state.epoch,
        "seconds": round(seconds, 1),
    }


def say_where(weights_folder: Path, splits: Splits) -> None:
    """Print the weights' path and the command that uses them."""
    log.info("weights: %s", weights_folder)
    log.info(
        "use them: ./infer.sh --checkpoint '%s' --input '%s' --prompt '%s' --output-dir '%s'",
        weights_folder,
        splits.valid.images[0].path.parent,
        splits.train.class_names[0],
        weights_folder.parent.parent / "found",
    )


def _git(*words: str) -> str | None:
    """What git says of the program's own repository; None where it lies in none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
