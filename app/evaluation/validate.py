"""Score a finder on a dataset: what validation measures is what `infer.sh` runs.

Several processes can share a validation. The dataset is cut into batches, in the order of its
images; in each round every rank answers one batch, and the answers are gathered. Which images
share a batch does not depend on the number of ranks, so neither do the figures, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.datasets.coco import Dataset, Image
from app.datasets.images import open_image
from app.errors import UserError
from app.evaluation.concepts import SCORE
from app.evaluation.off_prompt import Firing, OffPrompts
from app.evaluation.scoring import score
from app.inference.finder import Finder
from app.inference.outputs import coco_results
from app.signals import Stopped


@dataclass(frozen=True)
class Validation:
    """Hold the figures of a validation, and the detections that they were computed from.

    Attributes:
        figures: of `evaluation.scoring.score`; the same on every rank.
        results: COCO results in the order of the images; on rank 0 alone, others hold none.
        off_prompts: detections on nouns that no image shows; on rank 0 alone.
    """

    figures: dict[str, float]
    results: list[dict[str, Any]]
    off_prompts: OffPrompts


@dataclass(frozen=True)
class Ranks:
    """Describe the processes that share a validation; by default this one alone.

    Attributes:
        rank: of this process, from 0.
        world_size: number of processes.
        gather: list of this process → the lists of all ranks, joined in their order; a collective
            call, such as `accelerate.utils.gather_object`.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda own: own


ALONE = Ranks()


@dataclass(frozen=True)
class Answers:
    """Hold the contribution of one rank to a round.

    Attributes:
        failure: the error that ended the batch; None where it was answered.
    """

    results: list[dict[str, Any]]
    firings: list[Firing]
    failure: type[BaseException] | None = None


def validate(
    finder: Finder,
    dataset: Dataset,
    *,
    max_detections: int,
    threshold: float = SCORE,
    nouns: Sequence[str] = (),
    batch_size: int = 1,
    ranks: Ranks = ALONE,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Validation:
    """Ask for every class in every image, and for the nouns; score the answers.

    Args:
        max_detections: an image, over all classes.
        threshold: 0..1, above which a detection on an absent thing is counted.
        nouns: things that no image shows; they take no detection's place among the classes.
        batch_size: images that are answered together. On a CPU 1 is as fast as more, and matrix
            products of other shapes round otherwise there: only 1 gives the bits of `predict`.
        ranks: the processes that share the images; each of them must make the same call.
        on_images: called after each batch of this rank with the number of images that all ranks
            have answered, and their total. It may raise Stopped.

    Raises:
        UserError, Stopped: on every rank in the same round, whichever rank met it. Any other
            error ends its process alone, and the launcher has to end the others.
    """
    total = len(dataset.images)
    results: list[dict[str, Any]] = []
    firings: list[Firing] = []
    for start in range(0, total, batch_size * ranks.world_size):
        first = start + batch_size * ranks.rank
        done = min(start + batch_size * ranks.world_size, total)
        own, error = Answers([], []), None
        try:
            batch = dataset.images[first : first + batch_size]  # none in a last, short round
            own = _answer(finder, dataset, batch, nouns, threshold, max_detections)
            on_images(done, total)
        except (UserError, Stopped) as caught:
            error = caught
            own = Answers([], [], UserError if isinstance(caught, UserError) else Stopped)
        answers: list[Answers] = ranks.gather([own])
        _raise_on_all_ranks(error, answers)
        if ranks.rank == 0:
            results += [result for answer in answers for result in answer.results]
            firings += [firing for answer in answers for firing in answer.firings]
    off_prompts = OffPrompts(tuple(nouns), tuple(firings))
    figures: dict[str, float] = {}
    if ranks.rank == 0:
        figures = score(dataset, results, threshold=threshold, off_prompts=off_prompts)
    return Validation(ranks.gather([figures])[0], results, off_prompts)


def _answer(
    finder: Finder,
    dataset: Dataset,
    batch: Sequence[Image],
    nouns: Sequence[str],
    threshold: float,
    max_detections: int,
) -> Answers:
    """Return COCO results and firings of a few images, which may be none."""
    if not batch:
        return Answers([], [])
    images = [open_image(image.path, finder.levels or image.levels) for image in batch]
    prompts = [category.name for category in dataset.categories]
    category_ids = [category.id for category in dataset.categories]
    results: list[dict[str, Any]] = []
    for image, detections in zip(
        batch,
        finder.predict_batch(images, prompts, threshold=0.0, max_detections=max_detections),
        strict=True,
    ):
        results += coco_results(detections, image.id, category_ids)
    firings: list[Firing] = []
    if nouns:
        least = min(threshold, SCORE)
        for image, detections in zip(
            batch,
            finder.predict_batch(images, nouns, threshold=least, max_detections=max_detections),
            strict=True,
        ):
            pairs = zip(detections.prompt_ids, detections.scores, strict=True)
            firings += [Firing(image.id, nouns[id], float(value)) for id, value in pairs]
    return Answers(results, firings)


def _raise_on_all_ranks(own: BaseException | None, answers: Sequence[Answers]) -> None:
    """Raise the same kind of error on every rank where any rank met one: an error before a stop."""
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if not failures:
        return
    kind = UserError if UserError in failures else Stopped
    if own is not None and isinstance(own, kind):
        raise own
    raise kind("another process of this run cannot go on")
