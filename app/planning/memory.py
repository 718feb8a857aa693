"""The memory that a training step takes, counted without doing its arithmetic.

The step runs on fake tensors, and every allocation is counted: activations, those that activation
checkpointing recomputes, gradients.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.compression import distillation
from app.compression.distillation import Distiller, Matches
from app.compression.teaching import TaughtLosses
from app.config.schema import Config
from app.model.fake import Fake, FakeMode, KnownValues, OutputCache, make_fake
from app.training import method
from app.training.losses import LabelLosses, Losses

# What autocast computes in float32 on CUDA and not on a CPU, of what a step calls
# (torch/include/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE).
IN_FLOAT32 = (
    *("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log"),
    *("pow.Tensor_Scalar", "sum", "sum.dim_IntList", "cumsum", "linalg_vector_norm"),
    *("binary_cross_entropy_with_logits", "l1_loss", "smooth_l1_loss", "kl_div"),
    *("cosine_similarity", "upsample_nearest2d", "upsample_bilinear2d"),
)


class StepBytes:
    """Counts the most bytes that steps hold at once beside their weights; equal steps once."""

    def __init__(self) -> None:
        self._counted: dict[Any, int] = {}  # by all that the bytes of a step depend on
        self._cache: OutputCache = {}

    def __call__(
        self,
        config: Config,
        model: Sam3Image,
        batch: BatchedDatapoint,
        precision: torch.dtype,
        device: torch.device,
    ) -> int:
        """Return the peak of the forward and backward pass of a batch.

        Args:
            model: on the meta device; its tensors may be fake afterwards.
            batch: with real labels; its pixels are not read.
            precision: float32, or the half to multiply in.
            device: whose kernels compute it; it need not be there.
        """
        parts = (config.model, config.loss, config.distill)
        key = (
            precision,
            device.type,
            *(part.model_dump_json() for part in parts),
            *((tuple(p.shape), p.requires_grad) for p in model.parameters()),
            tuple(batch.img_batch.shape),
            *batch.find_targets[0].num_boxes.tolist(),
        )
        if key not in self._counted:
            with kernels_of(device):
                self._counted[key] = self._count(config, model, batch, precision)
        return self._counted[key]

    def _count(
        self, config: Config, model: Sam3Image, batch: BatchedDatapoint, precision: torch.dtype
    ) -> int:
        """Run the step on fake tensors; its matchers match any queries."""
        objects = batch.find_targets[0].num_boxes.tolist()
        criterion: Any = instantiate(config.loss.criterion, _convert_="all")
        model.matcher = criterion.matcher = AnyMatcher(objects, 1)
        if criterion.o2m_matcher is not None:
            criterion.o2m_matcher = AnyMatcher(objects, criterion.o2m_matcher.topk)
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


@contextlib.contextmanager
def kernels_of(device: torch.device) -> Iterator[None]:
    """Let a step of the CPU make the tensors that it makes on a device.

    On CUDA attention never makes its scores whole, which a CPU does where there is dropout; and
    autocast computes more in float32.

    The function of attention is replaced, and no mode entered, because checkpointed modules call it
    again in the backward pass, where modes for functions are not active.
    """
    if device.type != "cuda":
        yield
        return
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention_on_cuda
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            for name in IN_FLOAT32:
                library.impl(name, _in_float32(name), "AutocastCPU")
            yield
    finally:
        F.scaled_dot_product_attention = attention


def _in_float32(name: str) -> Callable[..., Any]:
    """Return an operation that casts its inputs, as CUDA's autocast calls it."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(value: Any) -> Any:
        is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if is_half else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*map(cast, args), **{n: cast(value) for n, value in kwargs.items()})

    return call


def _attention_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Stand in for `scaled_dot_product_attention`: q, k, v are (B, heads, tokens, width)."""
    if torch.is_autocast_enabled("cpu"):  # casts its inputs, which are then kept beside the first
        precision = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(precision) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(precision)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Makes the tensors of flash and memory-efficient attention, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Keep the inputs, the outputs, and of each query the logarithm of its sum."""
        outputs = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, outputs, sums)
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Make the inputs' gradients, those of the queries added up in float32 first."""
        query, key, value, bias, _outputs, _sums = ctx.saved_tensors
        added = torch.empty_like(query, dtype=torch.float32)  # noqa: F841  # alive to the end
        bias_gradient = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        inputs = (torch.empty_like(tensor) for tensor in (query, key, value))
        return (*inputs, bias_gradient)


def _any_match(objects: Sequence[int]) -> Callable[[Any, Any], Matches]:
    """Return a matcher that matches each object of the teacher with the first query."""

    def match(student: dict[str, Tensor], _teacher: dict[str, Tensor]) -> Matches:
        matches = sum(min(student["pred_logits"].shape[1], n) for n in objects)
        return Matches(*torch.zeros(4, matches, dtype=torch.long).unbind())

    return match


class AnyMatcher(nn.Module):
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
