"""From the words of a command to a run that can begin: everything checked, nothing written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam3.model.sam3_image import Sam3Image

from app.config.compose import (
    load_config,
    load_model_config,
    model_names,
    recipe_file,
)
from app.config.schema import Config, Resume
from app.config.yaml_data import read_yaml
from app.console import Formatter, command, counted
from app.datasets.build import Splits
from app.datasets.coco import Dataset
from app.datasets.read_splits import read_splits
from app.errors import UserError, nearest
from app.evaluation.evaluate import choose_split
from app.files import flatten, free_folder, last_folder
from app.inference.inputs import check_length
from app.model import weights
from app.model.build import tokenizer
from app.model.bundled import bundled_nano
from app.model.device import PRECISIONS, choose_device, choose_precision
from app.model.vocabulary import unknown_words
from app.training import checkpoints, method
from app.training.features import decide_feature_cache
from app.training.fingerprint import check_same, differences, fingerprint
from app.training.output_folder import RESOLVED, prepare_folder, write_settings
from app.training.recipe import auto

log = logging.getLogger("app")
BATCH_SIZE, GRAD_ACCUM = "training.batch_size", "training.grad_accum"
PRECISION = "training.precision"
RECOMPUTED = "model.activation_checkpointing"
RUNS = Path("outputs/train")  # `output_dir` of configs/train.yaml
GROUPS = {"model", "method", "loss", "transforms", "optim"}  # of configs/


@dataclass(frozen=True)
class Request:
    """The words of a command, as they were given.

    Attributes:
        overrides: `KEY=VALUE`s of configs/train.yaml.
        size: of the model, or auto.
        file: YAML in our schema.
        recipe: auto, none, or a YAML of configs/recipe by its name; None: auto for nano from
            its own weights, as it is only from these that they were chosen.
        lr: learning rate of the detector; the others keep their ratio.
        eval_only: score the split `evaluation.split`, do not train.
        download: get Meta's weights where they are meant and not at hand.
    """

    overrides: Sequence[str]
    size: str = "auto"
    file: Path | None = None
    recipe: str | None = None
    lr: float | None = None
    eval_only: bool = False
    resume: Resume | None = None
    overwrite: bool = False
    download: bool = True

    @property
    def fits_batch(self) -> bool:
        """Return whether the batch size is still to be found: `auto`, without a number."""
        given = [text for text in self.overrides if text.startswith(f"{BATCH_SIZE}=")]
        return bool(given) and set(given) == {f"{BATCH_SIZE}=auto"}

    @property
    def gives_batch(self) -> bool:
        """Return whether the user says how many images a step or an update takes."""
        words = {text.partition("=")[0] for text in _without_auto(self.overrides)}
        in_file = flatten(read_yaml(self.file)) if self.file is not None else {}
        return not {BATCH_SIZE, GRAD_ACCUM}.isdisjoint({*words, *in_file})


@dataclass(frozen=True)
class Prepared:
    """A run that can begin.

    Attributes:
        config: with all that was decided.
        overrides: that were given, and those of `--recipe auto`: what config.yaml will hold.
        decided: overrides that were settled here, once, and hold for all processes of the run.
        pretrained_path: weights to start from; None for random ones. Under `Request.download`
            false the file may not be there yet.
        meta_model: the model as it will be trained, on the meta device; None for an evaluation.
        elsewhere: the run will be handed to a cluster, where its last decisions are made.
    """

    request: Request
    config: Config
    splits: Splits
    pretrained_path: Path | None
    overrides: tuple[str, ...]
    decided: tuple[str, ...] = ()
    meta_model: Sam3Image | None = None
    elsewhere: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def processes(self) -> int:
        """Return the number of processes of the whole run, over all machines."""
        return self.config.training.num_gpus * self.config.cluster.nodes

    @property
    def fits_batch(self) -> bool:
        """Return whether the largest batch size is to be found here."""
        return self.request.fits_batch and not self.elsewhere and not self._has_batch

    @property
    def chooses_batch(self) -> bool:
        """Return whether a GPU's memory decides the batch size here, as nobody else does.

        Not where each of several machines would decide for itself.
        """
        is_open = not (self.request.gives_batch or self.request.fits_batch or self._has_batch)
        is_here = not self.elsewhere and self.config.cluster.nodes == 1
        return is_open and is_here and choose_device(self.config.training.device).type == "cuda"

    @property
    def _has_batch(self) -> bool:
        return any(text.startswith(f"{BATCH_SIZE}=") for text in self.decided)

    @property
    def chooses_by_memory(self) -> bool:
        """Return whether something is left to the memory of a device, to be decided here."""
        return self.fits_batch or self.chooses_batch or self.chooses_recomputed

    @property
    def chooses_recomputed(self) -> bool:
        """Return whether it is open what is computed anew in the backward pass.

        A GPU may have less memory than the one that chose before the run was stopped.
        """
        if self.elsewhere or self.config.model.activation_checkpointing == "auto":
            return not self.elsewhere
        given = any(text.startswith(f"{RECOMPUTED}=") for text in self.request.overrides)
        goes_on = self.request.file == self.folder / RESOLVED and not given
        return goes_on and choose_device(self.config.training.device).type == "cuda"

    def decide(self, values: Mapping[str, Any]) -> Prepared:
        """Return the run with these keys decided, each `GROUP.KEY`."""
        config = self.config
        for name, value in values.items():
            group, key = name.split(".")
            part = getattr(config, group).model_copy(update={key: value})
            config = config.model_copy(update={group: part})
        words = (f"{name}={json.dumps(value)}" for name, value in values.items())
        return replace(self, config=config, decided=(*self.decided, *words))

    def configure(self, more: Sequence[str]) -> Config:
        """Return the configuration with further overrides, of the same model and weights."""
        at_hand = self.pretrained_path is None or self.pretrained_path.is_file()
        fixed = f"checkpoint={(self.pretrained_path or 'none') if at_hand else 'auto'}"
        overrides = [*_without_auto(self.overrides), *self.decided, *more, fixed]
        request = replace(self.request, overrides=overrides, size=self.config.model.name)
        config = configure(request, told=True)[0]
        return config.model_copy(update={"checkpoint": self.config.checkpoint})


def prepare(request: Request, *, in_job: bool = False) -> Prepared:
    """Check everything that can be checked, and decide everything that is decided once.

    Args:
        in_job: this process runs in a cluster's job, so that the run is made here.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    if request.recipe not in (None, "auto", "none"):
        request = replace(request, file=recipe_file(str(request.recipe)))
    request = with_settings_of_folder(request)
    config, pretrained_path = configure(request)
    elsewhere = config.cluster.name == "slurm" and not in_job
    if not elsewhere:
        choose_device(config.training.device)
    meta_model = None if request.eval_only else method.check(config, pretrained_path)
    splits = read_splits(config, folds=not request.eval_only and config.distill.teacher is None)
    check_words(config, splits)
    prepared = Prepared(
        request,
        config,
        splits,
        pretrained_path,
        tuple(request.overrides),
        meta_model=meta_model,
        elsewhere=elsewhere,
    )
    if takes_auto_recipe(prepared):
        prepared = _with_auto_recipe(prepared)
    if request.eval_only:
        choose_split(prepared.config, splits)
        return prepared
    check_masks(prepared.config, splits.train)
    prepared = _keep_batch(prepared)
    if elsewhere:
        return prepared
    assert prepared.meta_model is not None
    config = decide_precision(prepared.config, request.resume)
    config = decide_feature_cache(config, splits, request.resume, prepared.meta_model)
    decided = (
        f"{PRECISION}={config.training.precision}",
        f"training.cache_features={json.dumps(config.training.cache_features)}",
        f"dataset.views={json.dumps(config.dataset.views)}",
    )
    return replace(prepared, config=config, decided=(*prepared.decided, *decided))


def _keep_batch(prepared: Prepared) -> Prepared:
    """Take the batch of the run that goes on, where none is given: it decides the data's order."""
    request, training = prepared.request, prepared.config.training
    newest = None
    if request.resume and (request.fits_batch or not request.gives_batch):
        newest = checkpoints.find_newest(prepared.folder / "checkpoints")
    if newest is None:
        return prepared
    then = checkpoints.read(newest)[1]
    kept = {BATCH_SIZE: int(then[BATCH_SIZE])}
    if not request.fits_batch:
        kept[GRAD_ACCUM] = int(then[GRAD_ACCUM])
    now = {BATCH_SIZE: training.batch_size, GRAD_ACCUM: training.grad_accum}
    if request.fits_batch or kept != now:
        size = counted(kept[BATCH_SIZE], "image")
        log.info("batch size: %s, as the run has it that goes on", size)
    return prepared.decide(kept)


def decide_precision(config: Config, resume: Resume | None) -> Config:
    """Return the configuration with `training.precision` decided, where it is auto.

    A resumed run keeps the one of its checkpoint, because it decides the weights.
    """
    if config.training.precision != "auto":
        return config
    newest = None
    if resume in ("all", "auto"):
        newest = checkpoints.find_newest(Path(config.output_dir) / "checkpoints")
    if newest is not None:
        name = checkpoints.read(newest)[1][PRECISION]
    else:
        device = choose_device(config.training.device)
        dtype = choose_precision(config.training.precision, device, config.model)
        name = next(name for name, each in PRECISIONS.items() if each == dtype)
    training = config.training.model_copy(update={"precision": name})
    return config.model_copy(update={"training": training})


def with_settings_of_folder(request: Request) -> Request:
    """Take what is not given from the folder of the run to resume, which knows its settings.

    Not where a size, a file, or a choice of a group is given: these bring settings of their own,
    which `check_resume` compares with those of the run.
    """
    choices = _user_choices(request.overrides, None)
    brings_own = request.file or request.recipe or request.size != "auto"
    if request.resume not in ("all", "auto") or brings_own or GROUPS & choices.keys():
        return request
    folder = Path(choices["output_dir"]) if "output_dir" in choices else last_folder(RUNS)
    if folder is None or not (folder / RESOLVED).is_file():
        return request
    log.info("settings that are not given: those of %s", folder / RESOLVED)
    overrides = [f"output_dir={folder}", *request.overrides]
    return replace(request, overrides=overrides, file=folder / RESOLVED)


def takes_auto_recipe(prepared: Prepared) -> bool:
    """Return whether settings are chosen by the number of images: where asked, and for nano."""
    request = prepared.request
    if request.recipe is not None or request.file is not None:
        return request.recipe == "auto"
    is_pretrained = prepared.pretrained_path is not None
    return prepared.config.model.name == "nano" and is_pretrained and not request.eval_only


def _with_auto_recipe(prepared: Prepared) -> Prepared:
    """Add the settings that fit the number of images; the user's own stay."""
    request, config = prepared.request, prepared.config
    other_flags = ["optim.lr_scale"] if request.lr else []
    chosen = auto(
        len(prepared.splits.train.images),
        config.model.name,
        [*request.overrides, *other_flags],
        pretrained=prepared.pretrained_path is not None,
    )
    prepared = replace(prepared, overrides=(*chosen, *request.overrides))
    config = prepared.configure([])
    meta_model = None if request.eval_only else method.check(config, prepared.pretrained_path)
    return replace(prepared, config=config, meta_model=meta_model)


def configure(request: Request, *, told: bool = False) -> tuple[Config, Path | None]:
    """Return the run's configuration, and the weights that it starts from (None: random).

    Args:
        told: which size, weights and folder are taken was logged before.
    """
    overrides = _without_auto(request.overrides)
    choices = _user_choices(overrides, request.file)
    size = str(choices.get("model", "auto")) if request.size == "auto" else request.size
    if size not in ("auto", *model_names()):
        raise UserError(
            f"--model {size}: there is no such size; there are auto, {', '.join(model_names())}."
            f"{nearest(size, model_names())}"
        )
    checkpoint = str(choices.get("checkpoint", "auto"))
    if checkpoint in ("none", "auto"):
        size, pretrained_path = default_weights(
            size, random=checkpoint == "none", download=request.download, told=told
        )
    else:
        pretrained_path = weights.find_file(Path(checkpoint))
    expected = None if size == "auto" else size
    at_hand = pretrained_path if pretrained_path and pretrained_path.is_file() else None
    model = weights.describe(at_hand, expected).model if at_hand else load_model_config(size)
    if at_hand:  # recomputation is of training, not of weights
        known = model.name in model_names()
        recomputed = load_model_config(model.name).activation_checkpointing if known else "auto"
        model = model.model_copy(update={"activation_checkpointing": recomputed})
    overrides = [text for text in overrides if not text.startswith("model=")]
    config = load_config(overrides, request.file, model)
    if request.lr is not None:
        if request.lr <= 0:
            raise UserError(f"--lr {request.lr:g}: must be greater than 0")
        optim = config.optim.model_copy(update={"lr_scale": request.lr / config.optim.lr})
        config = config.model_copy(update={"optim": optim})
    warm_start = config.training.warm_start.method
    if pretrained_path and warm_start != "none" and not request.eval_only:
        raise UserError(
            f"training.warm_start.method={warm_start}: is for random weights, and would spoil "
            f"those of {pretrained_path}; leave it out, or --checkpoint none"
        )
    if "output_dir" not in choices:
        folder = unnamed_folder(
            Path("outputs/eval" if request.eval_only else config.output_dir),
            request.resume,
            told=told,
        )
        config = config.model_copy(update={"output_dir": str(folder)})
    return config, pretrained_path


def unnamed_folder(folder: Path, resume: Resume | None, *, told: bool = False) -> Path:
    """Return where a run without --output-dir goes: a free folder, or the last one to resume.

    Args:
        told: which folder was logged before.
    """
    last = last_folder(folder) if resume else None
    chosen = last or free_folder(folder)
    if chosen != folder and not told:
        why = "the last run's" if last else f"{folder} is taken"
        log.info("output folder: %s (%s; --output-dir names another)", chosen, why)
    return chosen


def _without_auto(overrides: Sequence[str]) -> list[str]:
    """Leave out the word for a batch size that is still to be found."""
    return [text for text in overrides if text != f"{BATCH_SIZE}=auto"]


def _user_choices(overrides: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Return top-level keys that the user set, in the file or on the command line, which wins."""
    content = read_yaml(file) if file is not None else {}
    items = content.items() if isinstance(content, dict) else ()
    choices = {key: value for key, value in items if isinstance(value, str)}
    if isinstance(content, dict) and isinstance(size := content.get("model"), dict):
        choices |= {"model": size["name"]} if "name" in size else {}
    for text in overrides:
        key, _, value = text.partition("=")
        choices[key] = value
    return choices


def default_weights(
    size: str, *, random: bool, download: bool, told: bool = False
) -> tuple[str, Path | None]:
    """Return size and weights where no checkpoint is named; log which, and why, unless told."""
    say = (lambda *_: None) if told else log.info
    if size == "auto":
        cached = not random and weights.cached_sam3() is not None
        size = "sam3" if choose_device().type == "cuda" and cached else "nano"
        why = (
            "a GPU and SAM 3's weights are at hand"
            if size == "sam3"
            else ("no GPU with SAM 3's weights at hand")
        )
        say("model: %s (%s; --model decides by hand)", size, why)
    if random:
        return size, None
    if size == "sam3":
        if not download and weights.cached_sam3() is None:
            say("weights: %s/%s (to be downloaded, 3.4 GB)", *weights.HUB)
            return size, Path(weights.HUB[1])
        return size, weights.published_sam3()
    if size == "nano" and (nano := bundled_nano()) is not None:
        say("weights: %s (the project's own; --checkpoint none for random ones)", nano)
        return size, weights.find_file(nano)
    say("weights: random; size %s has no published ones (--checkpoint names yours)", size)
    return size, None


def check_words(config: Config, splits: Splits) -> None:
    """Refuse words that weights with a stored vocabulary do not have, and two that are one prompt.

    Raises:
        UserError: each class, synonym and near miss that is not among their prompts; names that
            differ only beyond the tokens that the model reads.
    """
    names = [name for c in splits.train.categories for name in (c.name, *c.synonyms)]
    if problems := unknown_words(config.model.vocabulary, [*names, *config.dataset.near_misses]):
        raise UserError(problems)
    if config.model.vocabulary is None:
        length = config.model.text.context_length
        if note := check_length(names, lambda name: tokenizer().encode(name), length):
            log.info("%s", note)


def check_masks(config: Config, dataset: Dataset) -> None:
    """Refuse a loss of masks for a model without a mask head; log a dataset without masks."""
    wants = config.loss.criterion.get("loss_fn_semantic_seg") is not None
    if wants and not config.model.segmentation:
        raise UserError(
            "The model has no mask head (its weights were trained without masks), and the loss "
            "asks for masks. Add loss=boxes."
        )
    if wants and not any(a.segmentation for a in dataset.annotations):
        log.info("note: the dataset has boxes only; the mask head is not trained")


def check_resume(prepared: Prepared, processes: int, open_keys: Sequence[str] = ()) -> None:
    """Refuse to resume from a checkpoint of another run, or from weights of another method.

    Args:
        processes: of the run.
        open_keys: settings that are decided where the run will be, and are not compared here.
    """
    config, folder, resume = prepared.config, prepared.folder, prepared.request.resume
    newest = checkpoints.find_newest(folder / "checkpoints")
    if newest is None:
        return
    then = checkpoints.read(newest)[1]
    now = fingerprint(config, prepared.splits, processes)
    now |= {name: then[name] for name in open_keys if name in then}
    if resume != "weights":
        check_same(newest, then, now)
        return
    changed = [key for key in differences(then, now) if key.startswith("method.lora")]
    if changed:
        raise UserError(
            f"--resume=weights: {newest} is of method {then['method.name']}, whose weights are no "
            f"beginning for this one ({', '.join(changed)}). Give "
            f"{command('--checkpoint', folder / 'weights' / 'best')} and another --output-dir"
        )


def open_folder(prepared: Prepared) -> logging.Handler:
    """Make the output folder ready, check its disk, write the settings, and log to train.log.

    Returns:
        What logs there; it is in place.
    """
    request, folder = prepared.request, prepared.folder
    prepare_folder(folder, resume=request.resume, overwrite=request.overwrite)
    if prepared.meta_model is not None:
        checkpoints.check_space(folder, prepared.config, prepared.meta_model)
    overrides = [*_without_auto(prepared.overrides), *prepared.decided]
    write_settings(folder, prepared.config, overrides, prepared.splits, request.resume)
    logging.raiseExceptions = False  # a full disk is told once, not by each line of the log
    written = logging.FileHandler(folder / "train.log", encoding="utf-8")
    written.setFormatter(Formatter())
    log.addHandler(written)
    return written
