"""What a run leaves to the memory of its device."""

from __future__ import annotations

import logging

from app.config.schema import Component, Config
from app.model.device import choose_device, is_wide
from app.planning.plan import GB, Plan, Planner, recomputed_in_words
from app.training.prepare import RECOMPUTED, Prepared

log = logging.getLogger("app")

# What is computed anew in the backward pass, from the fastest to what takes the least memory. The
# trunk's activations are the most of a step's.
CHOICES: tuple[bool | list[Component], ...] = (False, ["vision"], True)
MARGIN = 0.1  # of a plan's memory, that must be left over: a run that runs out of it ends


def choose_recomputed(prepared: Prepared, planner: Planner) -> Prepared:
    """Return the run with what is computed anew in the backward pass decided, where that is auto.

    On a GPU it is the least that fits. On a CPU it is all of a wide model, whose machine has other
    things to do with its memory, and nothing of a narrow one, which takes little.
    """
    config = prepared.config
    if config.model.activation_checkpointing != "auto":
        return prepared
    if choose_device(config.training.device).type == "cpu":
        return prepared.decide({RECOMPUTED: is_wide(config.model)})
    plans = (planner.plan(recomputing(config, choice)) for choice in CHOICES)
    plan = next((plan for plan in plans if fits_well(plan)), None)
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


def recomputing(config: Config, choice: bool | list[Component]) -> Config:
    """Return a configuration with this choice of what is computed anew."""
    model = config.model.model_copy(update={"activation_checkpointing": choice})
    return config.model_copy(update={"model": model})


def fits_well(plan: Plan) -> bool:
    """Return whether a plan leaves the memory by which it may be wrong."""
    return plan.spare_memory >= MARGIN * plan.memory.total
