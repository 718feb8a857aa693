"""A run from the command's words: trained, scored or planned; here, on a cluster, by upstream."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from app.config.schema import PlanKind
from app.errors import UserError
from app.files import give_up
from app.model.device import is_main, told
from app.signals import StopRequest
from app.training import features, folds, run
from app.training.output_folder import prepare_folder
from app.training.prepare import (
    PRECISION,
    Prepared,
    Request,
    check_resume,
    open_folder,
    prepare,
)
from app.training.run import Teach
from app.training.trainer import Recorder

if TYPE_CHECKING:
    from app.planning.plan import Planner

log = logging.getLogger("app")
WHAT_WOULD_FIT = "What would take less, begun anew or by --resume=weights:"


def start(request: Request, stop: StopRequest, *, base_config: bool, plan: PlanKind | None) -> None:
    """Check the flags against one another, then train, score or plan, by us or by upstream.

    Args:
        base_config: train by upstream's Trainer, on its full fine-tuning.
        plan: print what a training would take, and do not train.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    from app.upstream_trainer.schema import BASE_CONFIG, is_upstream_schema

    sources: dict[str, object] = {
        "--use-base-config": base_config,
        "--config": request.file,
        "--recipe": request.recipe,
    }
    if len(given := [flag for flag, value in sources.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if base_config:
        request = replace(request, file=BASE_CONFIG)
    file, eval_only = request.file, request.eval_only
    by_upstream = file is not None and is_upstream_schema(file)
    tracks = any(text.startswith("tracking.") for text in request.overrides)
    problems = []
    if plan and eval_only:
        problems.append("--plan and --eval-only: a plan is of training; leave one of them out")
    if tracks and eval_only:
        problems.append("--mlflow and --register: of a training; leave them out, or --eval-only")
    if request.resume and eval_only and not by_upstream:
        problems.append("--resume: of a training; leave it out, or --eval-only")
    if by_upstream:
        ours = {"--plan": plan, "--batch-size auto": request.fits_batch}
        ours["--mlflow, --register"] = tracks
        problems += [
            f"{flag}: of this project's own training, and {file} is for upstream's Trainer; "
            "leave one of them out"
            for flag, value in ours.items()
            if value
        ]
    if problems:
        raise UserError(problems)
    if by_upstream:
        from app.upstream_trainer import run as upstream

        upstream.start(request)
    elif eval_only:
        evaluate(request)
    else:
        train(request, stop, plan=plan)


def train(request: Request, stop: StopRequest, *, plan: PlanKind | None = None) -> None:
    """Prepare the run, then plan it, hand it to a cluster or to other processes, or train it here.

    Raises:
        UserError: whatever the user must mend, before anything is written.
    """
    from app.launch import slurm, torchrun
    from app.tracking.state import mlflow_uri

    if not is_main():
        log.setLevel(logging.WARNING)
    prepared = prepare(request, in_job=slurm.is_inside())
    tracking = prepared.config.tracking
    if tracking.register_as and not (tracking.mlflow or mlflow_uri(None)):
        raise UserError("--register: is of MLflow; give --mlflow as well, or MLFLOW_TRACKING_URI")
    if plan or prepared.chooses_by_memory:
        from app.planning import fit
        from app.planning.plan import Planner

        planner = Planner(prepared)
        if prepared.chooses_by_memory:
            prepared = planner.prepared = fit.choose(prepared, planner)
        if plan:
            show_plan(prepared, planner, plan)
            return
    if prepared.elsewhere:
        if request.resume:
            open_keys = [*features.DECIDED]
            if prepared.config.training.precision == "auto":
                open_keys.append(PRECISION)
            check_resume(prepared, prepared.processes, open_keys)
        prepare_folder(prepared.folder, resume=request.resume, overwrite=request.overwrite)
        give_up(prepared.folder)  # the job may begin before this process has ended
        slurm.submit(prepared.config, sys.argv[1:], request.resume)
        return
    if prepared.processes > 1 and not torchrun.is_launched():
        cluster, training = prepared.config.cluster, prepared.config.training
        torchrun.relaunch(training.num_gpus, [*sys.argv[1:], *prepared.decided], cluster.nodes)
    if request.resume:
        check_resume(prepared, int(os.environ.get("WORLD_SIZE", "1")))
    train_here(prepared, stop)


def train_here(prepared: Prepared, stop: StopRequest) -> None:
    """Train in this process, one of the run's; figures go to files, and to MLflow if asked."""
    from app.launch import torchrun
    from app.tracking.files import Tracker, followed_by_mlflow

    recorder: Recorder | None = None
    following: AbstractContextManager[None] = nullcontext()
    teach: Teach | None = None
    opened = contextlib.ExitStack()
    if is_main():
        opened.callback(log.removeHandler, open_folder(prepared))
        recorder = Tracker(prepared.folder)
        following = followed_by_mlflow(prepared.config.tracking, prepared.folder)
    if prepared.config.distill.teacher is not None:
        from app.compression import teaching

        teach = teaching.teach
    train_run = run.train
    if prepared.splits.folds:
        train_run = partial(folds.train, record_in=Tracker)
    with opened, torchrun.end_quietly_if_peer_died(), following:
        try:
            train_run(
                prepared.config,
                prepared.splits,
                prepared.pretrained_path,
                resume=prepared.request.resume,
                stop=stop,
                recorder=recorder,
                teach=teach,
            )
            return
        except torch.OutOfMemoryError as error:
            shortage = told(error)
        # Not before the error is gone, which holds the model and its step.
        raise UserError([f"{shortage} {WHAT_WOULD_FIT}", *what_would_fit(prepared)])


def what_would_fit(prepared: Prepared) -> list[str]:
    """Return lines, each with a change by which a run fits in the memory that it used up.

    Where its plan fits, because that foretold too little or other programs hold the memory, a
    change must spare a fifth of its step.
    """
    from app.planning.plan import Planner

    planner = Planner(prepared)
    plan = planner.plan()
    if plan.spare_memory >= 0:
        planner = Planner(prepared, most_memory=plan.memory.total - plan.memory.step // 5)
        plan = planner.plan()
    return planner.ways_to_fit(plan)


def show_plan(prepared: Prepared, planner: Planner, kind: PlanKind) -> None:
    """Print what the run will take; refuse it where that is not there."""
    from app.planning.plan import measure, show, show_times

    if prepared.elsewhere:
        log.info("--cluster slurm: memory and disk are those of this machine, not of the job's")
    plan = planner.plan(prepared.config)
    show(plan, prepared.splits)
    planner.require_fit(plan)
    if kind == "measure":
        show_times(measure(prepared), plan, prepared.splits)


def evaluate(request: Request) -> None:
    """Score weights on a split; leave figures and a report in the output folder."""
    from app.evaluation.evaluate import evaluate as score

    prepared = prepare(request)
    if prepared.processes > 1:
        log.info("--eval-only: in one process, whatever --num-gpus and --nodes say")
    open_folder(prepared)
    score(prepared.config, prepared.splits, prepared.pretrained_path)
