"""The importance of a model's parts, measured on a few images with or without labels.

With labels, by the loss of fine-tuning; without, by the distance of the outputs from those of the
whole model.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from sam3.model.utils.misc import copy_data_to_device
from torch import Tensor, nn

from app.compression.cut import LAYERS, protected_blocks
from app.compression.distillation import (
    Distiller,
    Features,
    Teacher,
    forward_features,
    last_outputs,
)
from app.compression.flags import WidthBy
from app.config.schema import Config, ModelConfig
from app.console import progress
from app.datasets.coco import Dataset
from app.datasets.queries import PromptChoice, QueryDataset, collate
from app.errors import UserError
from app.files import read_json, write_json
from app.inference.predictor import query_scores
from app.model.device import autocast
from app.training.losses import LabelLosses

log = logging.getLogger("app")


class Measure:
    """Measures the loss of smaller models on a few images.

    Args:
        config: losses, transforms and size, without dropout and stochastic depth.
        model: the whole model, from which the models to measure are cut.
        images: images with annotations, or without any: the outputs of the whole model are then
            the targets.
        precision: float32, or the half to multiply in.
        cache: file of the losses that were measured before, for the same weights, images and
            settings: see `cache_file`.

    Attributes:
        labelled: whether the images have annotations.
        batches: one for each image.
    """

    def __init__(
        self,
        config: Config,
        model: Sam3Image,
        images: Dataset,
        precision: torch.dtype,
        cache: Path | None = None,
    ) -> None:
        self.config, self.precision, self.cache = config, precision, cache
        self.device = next(model.parameters()).device
        self.criterion: Any = instantiate(config.loss.criterion, _convert_="all")
        self.labelled = bool(images.annotations)
        self.batches = [self._batch(images, index) for index in range(len(images.images))]
        self._measured: dict[str, float] = {}
        if cache is not None and cache.is_file():
            self._measured = read_json(cache)
        self._teachers: list[_Recorded] = []
        if not self.labelled:
            with self.autocast(), torch.no_grad():
                self._teachers = [_Recorded(model.eval(), batch) for batch in self.batches]

    def _batch(self, images: Dataset, index: int) -> BatchedDatapoint:
        transforms = [instantiate(node) for node in self.config.transforms.train]
        choice = PromptChoice(most=self.config.dataset.max_prompts)
        data = QueryDataset(images, transforms, seed=self.config.seed, choice=choice)
        return copy_data_to_device(collate([data[index]]), self.device)

    def autocast(self) -> torch.autocast:
        """Return the context to run models in."""
        return autocast(self.device, self.precision)

    def losses(self, model: Sam3Image) -> Iterator[Tensor]:
        """Yield the loss of each image, a scalar with the graph."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            for index, batch in enumerate(self.batches):
                torch.manual_seed(index)  # for the points at which masks are compared
                if self.labelled:
                    model.train()
                    yield LabelLosses(self.criterion, self.precision)(model, batch)["loss"]
                else:
                    model.eval()
                    with self.autocast():
                        yield self._teachers[index].distance(model, batch, self.config)

    def mean_loss(self, model: Sam3Image, key: str = "") -> float:
        """Return the mean loss of the images.

        Args:
            key: of the model in the cache; "" uses no cache.
        """
        if key and key in self._measured:
            return self._measured[key]
        with torch.no_grad():
            loss = float(torch.stack([*self.losses(model)]).mean())
        if key:
            self._measured[key] = loss
            if self.cache is not None:
                write_json(self.cache, self._measured)
        return loss


class _Recorded(Teacher):
    """The whole model as the teacher of one batch: its outputs, computed once."""

    def __init__(self, model: Sam3Image, batch: BatchedDatapoint) -> None:
        outputs, self._features = forward_features(model, batch, (), "answers")
        needed = ("pred_logits", "pred_boxes", "presence_logit_dec", "pred_masks", "semantic_seg")
        last = last_outputs(outputs)
        self._outputs = {key: last[key] for key in needed if key in last}

    def forward_features(self, *_: Any, **__: Any) -> tuple[dict[str, Tensor], Features]:
        """Return the recorded outputs and features."""
        return self._outputs, self._features

    def distance(self, model: Sam3Image, batch: BatchedDatapoint, config: Config) -> Tensor:
        """Return the distance of a model's outputs and features, weighted as in distillation."""
        outputs, features = forward_features(model, batch, (), "answers")
        parts = Distiller(self, config.distill).losses(batch, (), "answers", outputs, features)
        return torch.stack([*parts.values()]).sum()


def cache_file(folder: Path, weights_file: Path, images: Dataset, config: Config) -> Path:
    """Return the cache of losses of these weights on these images with these settings."""
    with weights_file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update(images.content_hash().encode())
    digest.update(config.model_dump_json().encode())
    return folder / f"{digest.hexdigest()[:32]}.json"


def choose_layers(
    model: Sam3Image, size: ModelConfig, name: str, count: int, measure: Measure
) -> tuple[int, ...]:
    """Return the `count` layers that stay.

    Greedy: again and again the layer goes without which the loss is least.

    Args:
        name: one of `LAYERS`.

    Raises:
        UserError: more layers must stay than `count`.
    """
    layers = model.get_submodule(LAYERS[name])
    assert isinstance(layers, nn.ModuleList)
    protected = protected_blocks(size) if name == "blocks" else set[int]()
    if count < max(len(protected), 1):
        raise UserError(
            f"--{name.replace('_', '-')} {count}: at least {max(len(protected), 1)} stay"
            + (
                f", those of global attention and the first: {sorted(protected)}"
                if protected
                else ""
            )
        )
    kept = list(range(len(layers)))
    trials = sum(n - len(protected) for n in range(count + 1, len(layers) + 1))
    trunk_once = contextlib.nullcontext() if name == "blocks" else _with_cached_trunk(model)
    with trunk_once, progress(f"{name}: trial", trials) as advance:
        done = 0
        while len(kept) > count:
            losses = {}
            for index in sorted({*kept} - protected):
                rest = [i for i in kept if i != index]
                with only(model, name, rest):
                    losses[index] = measure.mean_loss(model, f"{name} {rest}")
                done += 1
                advance(done, f"without {index}: {losses[index]:.4g}")
            goes = min(losses, key=lambda index: (losses[index], index))
            kept.remove(goes)
            log.info("  %s %d goes: loss %.4g", name, goes, losses[goes])
    return tuple(kept)


class _CachedTrunk(nn.Module):
    """A trunk that computes the features of each batch once.

    Args:
        trunk: whose weights do not change meanwhile.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self._features: dict[int, list[Tensor]] = {}  # by address: a `Measure` holds its batches

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the features of pixels (B, 3, R, R): [(B, d, g, g)]."""
        if pixels.data_ptr() not in self._features:
            self._features[pixels.data_ptr()] = self.trunk(pixels)
        return self._features[pixels.data_ptr()]


@contextlib.contextmanager
def _with_cached_trunk(model: Sam3Image) -> Iterator[None]:
    """Let the trunk compute each batch once, because the layers that are tried are behind it."""
    neck: Any = model.backbone.vision_backbone
    trunk = neck.trunk
    neck.trunk = _CachedTrunk(trunk)
    try:
        yield
    finally:
        neck.trunk = trunk


@contextlib.contextmanager
def only(model: Sam3Image, name: str, kept: Sequence[int]) -> Iterator[None]:
    """Leave only these layers of one of `LAYERS` in the model, within the block."""
    path, _, attribute = LAYERS[name].rpartition(".")
    parent: Any = model.get_submodule(path)
    before = dict(vars(parent))
    layers = getattr(parent, attribute)
    setattr(parent, attribute, nn.ModuleList([layers[index] for index in kept]))
    if name == "blocks":
        parent.full_attn_ids = [p for p, i in enumerate(kept) if i in parent.full_attn_ids]
    elif hasattr(parent, "num_layers"):
        parent.num_layers = len(kept)
    try:
        yield
    finally:
        setattr(parent, attribute, layers)
        for key in ("full_attn_ids", "num_layers"):
            if key in before:
                setattr(parent, key, before[key])


def choose_queries(model: Sam3Image, count: int, measure: Measure) -> tuple[int, ...]:
    """Return the `count` queries with the highest scores, summed over all images and prompts."""
    model.eval()
    with torch.no_grad(), measure.autocast():
        scores = [
            query_scores(last_outputs(model(batch))).double().sum(dim=0)  # (Q,)
            for batch in measure.batches
        ]
    total = torch.stack(scores).sum(dim=0)
    return tuple(sorted(total.topk(count).indices.tolist()))


class Width:
    """The importance of each block's MLP units and attention heads.

    Attributes:
        hidden: for each block (H,) float64, the importance of its H units.
        heads: for each block (heads,) float64.
    """

    def __init__(self, model: Sam3Image, measure: Measure, by: WidthBy) -> None:
        """Measure all blocks.

        Args:
            by: "taylor": the squared gradient of the loss by a gate on each unit, its part in the
                loss to the first order ("Importance Estimation for Neural Network Pruning", arXiv
                1906.10771); "activation": the norm of a unit's outputs times that of the weights
                that read them.
        """
        trunk: Any = model.backbone.vision_backbone.trunk
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._gates: list[tuple[Tensor, Tensor]] = []
        self._norms: list[tuple[Tensor, Tensor]] = []
        hooks = []
        for block in trunk.blocks:
            gates = tuple(
                torch.ones(size, device=measure.device, requires_grad=by == "taylor")
                for size in (block.mlp.fc1.out_features, block.attn.num_heads)
            )
            norms = tuple(torch.zeros_like(gate, dtype=torch.float64) for gate in gates)
            self._gates.append(gates)  # type: ignore[arg-type]
            self._norms.append(norms)  # type: ignore[arg-type]
            act = _gate(gates[0], norms[0], 1)
            hooks.append(block.mlp.act.register_forward_hook(lambda _m, _i, o, act=act: act(o)))
            head = _gate(gates[1], norms[1], block.attn.head_dim)
            hooks.append(
                block.attn.proj.register_forward_pre_hook(lambda _m, i, head=head: (head(i[0]),))
            )
        model.requires_grad_(False)
        try:
            self.hidden, self.heads = (
                self._taylor(model, measure) if by == "taylor" else self._activation(model, measure)
            )
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _taylor(self, model: Sam3Image, measure: Measure) -> tuple[list[Tensor], list[Tensor]]:
        """Return the squared gradients of all gates, summed over the images."""
        gates = list(itertools.chain.from_iterable(self._gates))
        totals = [torch.zeros_like(gate, dtype=torch.float64) for gate in gates]
        for loss in measure.losses(model):
            for total, gradient in zip(totals, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.double().square()
        return totals[0::2], totals[1::2]

    def _activation(self, model: Sam3Image, measure: Measure) -> tuple[list[Tensor], list[Tensor]]:
        """Return the norms of outputs, times those of the weights that read them."""
        with torch.no_grad():
            for _ in measure.losses(model):
                pass  # the hooks add up squares
        hidden, heads = [], []
        trunk: Any = model.backbone.vision_backbone.trunk
        for block, (units, head_norms) in zip(trunk.blocks, self._norms, strict=True):
            weight = block.mlp.fc2.weight.double().square().sum(dim=0)  # (H,)
            hidden.append((units * weight).sqrt())
            proj = block.attn.proj.weight.double().square().sum(dim=0)
            heads.append((head_norms * proj.unflatten(0, (-1, block.attn.head_dim)).mean(1)).sqrt())
        return hidden, heads


def _gate(gate: Tensor, norm: Tensor, repeat: int) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies by the gate, or adds up squares where it has no gradient.

    Args:
        gate: (n,), one for each unit or head.
        norm: (n,) float64, to which the squares are added.
        repeat: values of a head, which are neighbors.
    """

    def apply(values: Tensor) -> Tensor:
        if not gate.requires_grad:
            squares = values.detach().double().square().flatten(0, -2).sum(dim=0)
            norm.add_(squares.unflatten(0, (-1, repeat)).sum(dim=1))
            return values
        return values * gate.repeat_interleave(repeat).to(values.dtype)

    return apply


def most(importance: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest values, ascending."""
    return importance.topk(count).indices.sort().values
