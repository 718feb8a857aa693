"""The memory that a training step takes, counted without doing its arithmetic.

The step runs on fake tensors, and every allocation is counted: activations, those that activation
checkpointing recomputes, gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.compression import distillation
from app.compression.distillation import Distiller, Matches
from app.compression.teaching import TaughtLosses
from app.config.schema import Config
from app.model.fake import Fake, FakeMode, KnownValues, OutputCache, make_fake
from app.training import method
from app.training.losses import LabelLosses, Losses


class StepBytes:
    """Counts the most bytes that steps hold at once beside their weights; equal steps once."""

    def __init__(self) -> None:
        self._counted: dict[Any, int] = {}  # by all that the bytes of a step depend on
        self._cache: OutputCache = {}

    def __call__(
        self, config: Config, model: Sam3Image, batch: BatchedDatapoint, precision: torch.dtype
    ) -> int:
        """Return the peak of the forward and backward pass of a batch.

        Args:
            model: on the meta device; its tensors may be fake afterwards.
            batch: with real labels; its pixels are not read.
            precision: float32, or the half to multiply in.
        """
        parts = (config.model, config.loss, config.distill)
        key = (
            precision,
            *(part.model_dump_json() for part in parts),
            *((tuple(p.shape), p.requires_grad) for p in model.parameters()),
            tuple(batch.img_batch.shape),
            *batch.find_targets[0].num_boxes.tolist(),
        )
        if key not in self._counted:
            self._counted[key] = self._count(config, model, batch, precision)
        return self._counted[key]

    def _count(
        self, config: Config, model: Sam3Image, batch: BatchedDatapoint, precision: torch.dtype
    ) -> int:
        """Run the step on fake tensors; its matchers match any queries."""
        objects = batch.find_targets[0].num_boxes.tolist()
        criterion: Any = instantiate(config.loss.criterion, _convert_="all")
        model.matcher = criterion.matcher = _AnyMatcher(objects, 1)
        if criterion.o2m_matcher is not None:
            criterion.o2m_matcher = _AnyMatcher(objects, criterion.o2m_matcher.topk)
        losses: Losses = LabelLosses(criterion, precision)
        teacher = distillation.teacher_on_meta(config, model, precision)
        fake = FakeMode(self._cache)
        models = [model] if teacher is None else [model, teacher.model]
        with fake:
            for each in models:
                make_fake(each)
            method.set_training(model)
            if teacher is not None:
                distiller = Distiller(teacher, config.distill, match=_any_match(objects))
                losses = TaughtLosses(LabelLosses(criterion, precision), distiller)
            called = losses.wrap(model)
        weights = (t for each in models for t in (*each.parameters(), *each.buffers()))
        live = LiveBytes(weights, fake=fake)
        grid = config.model.resolution // config.model.vision.patch_size
        settings: Any = torch.fx.experimental._config
        every_mask = settings.patch(meta_nonzero_assume_all_nonzero=True)
        with live, KnownValues(len(batch.img_batch), grid), every_mask:
            losses(called, batch, config.training.epochs)["loss"].backward()
        model.zero_grad()  # gradients, which the next step would count as there already
        return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while the mode is active.

    Args:
        known: tensors from before; neither they nor views of them are counted.
        fake: a mode to run operations in as well: each mode of its own costs time with each.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: the most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor], *, fake: FakeMode | None = None) -> None:
        super().__init__()
        self.fake = fake
        self.peak = self.now = 0
        self._sizes: dict[int, int] = {}
        self._known = {_storage(tensor)._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.fake is None:
            outputs = func(*args, **kwargs)
        else:
            outputs = self.fake.run(func, types, args, kwargs)
        for output in [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._count(_storage(output))
        return outputs

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, Fake) else tensor).untyped_storage()


def _any_match(objects: Sequence[int]) -> Callable[[Any, Any], Matches]:
    """Return a matcher that matches each object of the teacher with the first query."""

    def match(student: dict[str, Tensor], _teacher: dict[str, Tensor]) -> Matches:
        matches = sum(min(student["pred_logits"].shape[1], n) for n in objects)
        return Matches(*torch.zeros(4, matches, dtype=torch.long).unbind())

    return match


class _AnyMatcher(nn.Module):
    """Makes as many matches as upstream's matchers make at most, all of the first query.

    Args:
        objects: number of objects of each prompt.
        most: number of queries that an object is matched with.
    """

    def __init__(self, objects: Sequence[int], most: int) -> None:
        super().__init__()
        self.objects, self.most = objects, most

    def forward(
        self, outputs: dict[str, Tensor], *_: Any, repeat_batch: int = 1, **__: Any
    ) -> tuple[Tensor, ...]:
        """Return indices of prompt, query and target, each (matches,) int64."""
        queries = outputs["pred_logits"].shape[1]
        matches = sum(min(queries, n * self.most) for n in self.objects) * repeat_batch
        return tuple(torch.zeros(matches, dtype=torch.long) for _ in range(3))
