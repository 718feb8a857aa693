"""What a training step holds in memory, counted without doing its arithmetic.

The step runs on hollow tensors, and every allocation is counted: activations, what activation
checkpointing makes anew, gradients.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from app.compression import distillation
from app.compression.distillation import Distiller, Matches
from app.compression.teaching import TaughtLosses
from app.config.schema import Config, ModelConfig
from app.inference.predictor import Predictor
from app.model.build import build_model
from app.planning.hollow import Hollow, Hollowing, hollow, run_hollow
from app.training import method
from app.training.losses import LabelLosses, Losses


def step_bytes(
    config: Config, model: Sam3Image, batch: BatchedDatapoint, precision: torch.dtype
) -> int:
    """Most bytes that the forward and backward pass of `batch` hold at once beside the weights.

    Args:
        model: on the meta device; its tensors may be hollow afterwards.
        batch: a real one.
    """
    parts = (config.model, config.loss, config.distill)
    key = (
        precision,
        *(part.model_dump_json() for part in parts),
        *((tuple(p.shape), p.requires_grad) for p in model.parameters()),
        tuple(batch.img_batch.shape),
        *batch.find_targets[0].num_boxes.tolist(),
    )
    if key not in _counted:
        _counted[key] = _count_step(config, model, batch, precision)
    return _counted[key]


_counted: dict[Any, int] = {}  # by all that the bytes of a step depend on


def _count_step(
    config: Config, model: Sam3Image, batch: BatchedDatapoint, precision: torch.dtype
) -> int:
    objects = batch.find_targets[0].num_boxes.tolist()
    teacher = distillation.teacher_on_meta(config, model, precision)
    criterion: Any = instantiate(config.loss.criterion, _convert_="all")
    model.matcher = criterion.matcher = _AnyMatcher(objects, 1)
    if criterion.o2m_matcher is not None:
        criterion.o2m_matcher = _AnyMatcher(objects, criterion.o2m_matcher.topk)
    grid = config.model.resolution // config.model.vision.patch_size
    with Hollowing():
        hollow(model)
        method.set_training(model)
        known = [model]
        losses: Losses = LabelLosses(criterion, precision)
        if teacher is not None:
            hollow(teacher.model)
            known.append(teacher.model)
            distiller = Distiller(teacher, config.distill, match=_any_match(objects))
            losses = TaughtLosses(LabelLosses(criterion, precision), distiller)
        called = losses.wrap(model)
    weights = (t for part in known for t in (*part.parameters(), *part.buffers()))
    live = LiveBytes(weights, without_contents=True)
    settings: Any = torch.fx.experimental._config
    every_mask = settings.patch(meta_nonzero_assume_all_nonzero=True)
    with live, _KnownValues(len(batch.img_batch), grid), every_mask:
        losses(called, batch, config.training.epochs)["loss"].backward()
    model.zero_grad()  # and all else that a next step would find
    return live.peak


def count_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image and one prompt, multiplications and additions apart.

    Those of matrix products and convolutions; a model of the size is made without contents.
    """
    model = build_model(config, device="meta")
    with Hollowing():
        hollow(model)
        predictor = Predictor(model, config)
        pixels = torch.zeros(1, 3, config.resolution, config.resolution)
        grid = config.resolution // config.vision.patch_size
        words = config.vocabulary or ["thing"]
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, _KnownValues(1, grid), sdpa_kernel(SDPBackend.MATH):
            features = model.backbone.forward_image(pixels)
            predictor._ground(features, words[:1], torch.zeros(0, 1, 4), torch.zeros(0).bool())
    return counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within: `now`, while they live, and at the `peak`.

    Args:
        known: tensors from before, which are not counted, nor views of them.
        without_contents: `Hollowing` as well, as each mode costs time with every operation.
    """

    def __init__(self, known: Iterable[Tensor], *, without_contents: bool = False) -> None:
        super().__init__()
        self.without_contents = without_contents
        self.peak = self.now = 0
        self._sizes: dict[int, int] = {}
        self._known = {_storage(tensor)._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.without_contents:
            outputs = run_hollow(func, types, args, kwargs)
        else:
            outputs = func(*args, **kwargs)
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
    return (tensor.meta if isinstance(tensor, Hollow) else tensor).untyped_storage()


class _KnownValues(TorchFunctionMode):
    """Answers where upstream reads values, which fake tensors lack, as real ones would.

    Args:
        images: of the batch; each is asked for (sam3_image.py:142).
        grid: side of the feature map in cells (decoder.py:520).
    """

    def __init__(self, images: int, grid: int) -> None:
        super().__init__()
        self.images = images
        self.known = {
            Tensor.__int__: grid,
            Tensor.__bool__: True,  # upstream.py: has any object a mask?
            Tensor.item: 1,  # loss_fns.py:1137: prompts with an object
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.unique:
            return torch.arange(self.images), args[0]
        return self.known[func] if func in self.known else func(*args, **kwargs)


def _any_match(objects: Sequence[int]) -> Callable[[Any, Any], Matches]:
    """A match for each object, of no query in particular."""

    def match(student: dict[str, Tensor], _teacher: dict[str, Tensor]) -> Matches:
        matches = sum(min(student["pred_logits"].shape[1], n) for n in objects)
        return Matches(*torch.zeros(4, matches, dtype=torch.long).unbind())

    return match


class _AnyMatcher(nn.Module):
    """As many matches as upstream's matchers make at most, of no query in particular.

    Args:
        objects: of each prompt.
        most: queries that an object is matched with.
    """

    def __init__(self, objects: Sequence[int], most: int) -> None:
        super().__init__()
        self.objects, self.most = objects, most

    def forward(
        self, outputs: dict[str, Tensor], *_: Any, repeat_batch: int = 1, **__: Any
    ) -> tuple[Tensor, ...]:
        """Indices of batch, query and target, each (matches,) int64."""
        queries = outputs["pred_logits"].shape[1]
        matches = sum(min(queries, n * self.most) for n in self.objects) * repeat_batch
        return tuple(torch.zeros(matches, dtype=torch.long) for _ in range(3))
