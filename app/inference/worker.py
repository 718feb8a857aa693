"""Predict on a folder's images in torch: in this process, or in several that share them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import chain
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from app.config.compose import load_model_config
from app.errors import UserError
from app.inference.batch import Job, Outcome, Work, predict_batches
from app.inference.concepts import read_all
from app.inference.encoding import encode, read_examples
from app.inference.predictor import Predictor
from app.inference.settings import RANDOM, Settings
from app.model.build import build_model
from app.model.device import choose_device, choose_precision, choose_threads, in_words
from app.model.halves import hold_all

log = logging.getLogger("app")
CHUNKS = 4  # batches that a process takes at once


@contextlib.contextmanager
def open_work(settings: Settings, output: Path, processes: int) -> Iterator[tuple[Work, str]]:
    """Yield a function that predicts on batches, in their order, and the precision of it.

    With one process, it is this one. Else each of several has a GPU of its own, or where there is
    none its share of the cores, and takes the next batches when it is done with its last.

    Raises:
        UserError: fewer GPUs than processes, or a process died.
    """
    if processes == 1:
        predictor = load_predictor(settings)
        predictor.check_length(settings.prompts)
        yield partial(predict_batches, predictor, settings, output), _precision(predictor)
        return
    gpus = torch.cuda.device_count() if choose_device(settings.device).type == "cuda" else 0
    if 0 < gpus < processes:
        raise UserError(f"--num-gpus {processes}: this machine has {gpus}")
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    rank = context.Value("i", 0)
    pool = ProcessPoolExecutor(processes, context, _begin_process, (rank, processes, gpus > 0))
    task = partial(_predict_in_process, settings, output)
    try:
        precision = pool.submit(_precision_in_process, settings).result()

        def work(batches: Sequence[Sequence[Job]]) -> Iterator[Outcome]:
            chunks = [batches[at : at + CHUNKS] for at in range(0, len(batches), CHUNKS)]
            return chain.from_iterable(pool.map(task, chunks))

        yield work, precision
    except BrokenProcessPool:
        raise UserError(
            f"--num-gpus {processes}: a process ended before its work did, as when memory runs "
            "out. What is done is kept: run the same command again, with fewer processes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def load_predictor(settings: Settings) -> Predictor:
    """Load the checkpoint of the settings, or make a model of random weights; set the threads."""
    options: dict[str, Any] = {"size": settings.size, "resolution": settings.resolution}
    if settings.checkpoint != RANDOM:
        choice = {"device": settings.device, "precision": settings.precision}
        predictor = Predictor.load(settings.checkpoint, **choice, **options)
        choose_threads(predictor.device, predictor.config)
        learn_concepts(predictor, settings)
        return predictor
    changes = [f"model.resolution={settings.resolution}"] if settings.resolution else []
    config = load_model_config(settings.size or "nano", changes)
    log.info("weights: random; what is found means nothing")
    torch.manual_seed(0)
    target = choose_device(settings.device)
    choose_threads(target, config)
    precision = choose_precision(settings.precision, target, config)
    model = build_model(config)
    hold_all(model, precision)
    return Predictor(model.to(target), config, precision)


def learn_concepts(predictor: Predictor, settings: Settings) -> None:
    """Let the predictor find what files of concepts and example boxes show."""
    concepts = read_all(settings.concepts)
    if settings.examples is not None:
        concepts += encode(predictor, read_examples(Path(settings.examples)))
    if concepts:
        predictor.learn(concepts)


def _precision(predictor: Predictor) -> str:
    return in_words(predictor.device, predictor.precision)


def _begin_process(rank: Synchronized[int], processes: int, on_gpu: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the first one answers it
    with rank.get_lock():
        mine = rank.value
        rank.value += 1
    if on_gpu:
        torch.cuda.set_device(mine)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


_predictor_of_process = lru_cache(maxsize=1)(load_predictor)


def _precision_in_process(settings: Settings) -> str:
    predictor = _predictor_of_process(settings)
    predictor.check_length(settings.prompts)
    return _precision(predictor)


def _predict_in_process(
    settings: Settings, output: Path, batches: Sequence[Sequence[Job]]
) -> list[Outcome]:
    return list(predict_batches(_predictor_of_process(settings), settings, output, batches))
