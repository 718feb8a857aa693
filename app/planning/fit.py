"""What a run leaves to the memory of its device."""

from __future__ import annotations

import logging

from app.config.schema import Component
from app.console import counted
from app.errors import UserError
from app.model.device import choose_device, is_wide
from app.planning.plan import GB, Plan, Planner, recomputed_in_words
from app.training.prepare import BATCH_SIZE, GRAD_ACCUM, RECOMPUTED, Prepared

log = logging.getLogger("app")

# What is computed anew in the backward pass, from the fastest to what takes the least memory. The
# trunk's activations are the most of a step's.
CHOICES: tuple[bool | list[Component], ...] = (False, ["vision"], True)
# Images a step from which on a GPU's time decides, and not the host's, how long an update takes.
MOST_IMAGES = 4
LEAST_UPDATES = 500  # of a run, that a larger batch than the settings' must leave
MARGIN = 0.1  # of a plan's memory, that must be left over: a run that runs out of it ends


def choose(prepared: Prepared, planner: Planner) -> Prepared:
    """Return the run with all decided that it leaves to its device's memory.

    Images at once come first: what is computed anew costs a GPU less time than the host takes for
    more steps.

    Raises:
        UserError: the largest batch is asked for, and not even one image fits.
    """
    if prepared.fits_batch:
        prepared = _largest_batch(prepared, planner)
    elif prepared.chooses_batch:
        prepared = _choose_batch(prepared, planner)
    return choose_recomputed(prepared, planner)


def _largest_batch(prepared: Prepared, planner: Planner) -> Prepared:
    size = planner.largest_batch()
    if not size:
        raise UserError(
            "--batch-size auto: not even one image a step fits. --plan --batch-size 1 says what "
            "would"
        )
    log.info("batch size: %s (the largest that fits)", counted(size, "image"))
    return prepared.decide({BATCH_SIZE: size})


def _choose_batch(prepared: Prepared, planner: Planner) -> Prepared:
    """Take as many images a step as fit, up to MOST_IMAGES, of which an update has several.

    An update has as many images as the settings say, and MOST_IMAGES where that leaves the run
    LEAST_UPDATES. The learning rate stays as it is.
    """
    training = prepared.config.training
    share = len(prepared.splits.train.images) / prepared.processes
    images = training.batch_size * training.grad_accum  # of an update
    if training.epochs * share / MOST_IMAGES >= LEAST_UPDATES:
        images = max(images, MOST_IMAGES)
    sizes = [size for size in range(MOST_IMAGES, 0, -1) if images % size == 0]
    fitting = (n for n in sizes if _fits(planner.plan(prepared.decide({BATCH_SIZE: n}).config)))
    size = next(fitting, 1)
    log.info(
        "batch size: %s a step, %s an update (by the GPU's memory; --batch-size decides by hand)",
        *(counted(size, "image"), counted(images // size, "step")),
    )
    return prepared.decide({BATCH_SIZE: size, GRAD_ACCUM: images // size})


def choose_recomputed(prepared: Prepared, planner: Planner) -> Prepared:
    """Return the run with what is computed anew in the backward pass decided, where that is open.

    On a GPU it is the least that fits. On a CPU it is all of a wide model, whose machine has other
    things to do with its memory, and nothing of a narrow one, which takes little.
    """
    config = prepared.config
    if not prepared.chooses_recomputed:
        return prepared
    if choose_device(config.training.device).type == "cpu":
        return prepared.decide({RECOMPUTED: is_wide(config.model)})
    plans = (planner.plan(prepared.decide({RECOMPUTED: choice}).config) for choice in CHOICES)
    plan = next((plan for plan in plans if _fits(plan)), None)
    choice = CHOICES[-1] if plan is None else plan.config.model.activation_checkpointing
    prepared = prepared.decide({RECOMPUTED: choice})
    log.info(
        "recomputed in the backward pass: %s (%s; %s decides by hand)",
        recomputed_in_words(prepared.config.model),
        "not even this fits"
        if plan is None
        else f"{plan.memory.total / GB:.1f} of {plan.free_memory / GB:.1f} GB",
        RECOMPUTED,
    )
    return prepared


def _fits(plan: Plan) -> bool:
    """Return whether a plan leaves the memory by which it may be wrong."""
    return plan.spare_memory >= MARGIN * plan.memory.total
