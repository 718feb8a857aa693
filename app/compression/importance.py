"""What of a model matters: measured on a few images, with their labels or without.

With labels, by the loss of fine-tuning; without, by how far the answers are from those that the
whole model gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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
from app.config.schema import Config, ModelConfig
from app.console import progress
from app.datasets.coco import Dataset
from app.datasets.queries import PromptChoice, QueryDataset, collate
from app.errors import UserError
from app.files import read_json, write_json
from app.inference.predictor import query_scores
from app.training.losses import LabelLosses

log = logging.getLogger("app")
WidthBy = Literal["taylor", "activation", "svd"]


class Measure:
    """How well a model does on a few images, the lower the better.

    Args:
        config: its losses, transforms and size; neither dropout nor stochastic depth.
        model: the whole model: what is measured is cut from it.
        images: with annotations; without any, the whole model's own answers are the truth.
        precision: to multiply in.
        cache: file that keeps what was measured, for the same weights, images and settings.
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
        self._known: dict[str, float] = {}
        if cache is not None and cache.is_file():
            self._known = read_json(cache)
        self._recorded: list[_Recorded] = []
        if not self.labelled:
            with self._autocast(), torch.no_grad():
                self._recorded = [_Recorded(model.eval(), batch) for batch in self.batches]

    def _batch(self, images: Dataset, index: int) -> BatchedDatapoint:
        transforms = [instantiate(node) for node in self.config.transforms.train]
        choice = PromptChoice(most=self.config.dataset.max_prompts)
        data = QueryDataset(images, transforms, seed=self.config.seed, choice=choice)
        return copy_data_to_device(collate([data[index]]), self.device)

    def _autocast(self) -> torch.autocast:
        bf16 = self.precision == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def losses(self, model: Sam3Image) -> Iterator[Tensor]:
        """Of each image, with the graph."""
        with torch.random.fork_rng(devices=[]):
            for index, batch in enumerate(self.batches):
                torch.manual_seed(index)  # of the points that masks are compared at
                if self.labelled:
                    model.train()
                    yield LabelLosses(self.criterion, self.precision)(model, batch)["loss"]
                else:
                    model.eval()
                    with self._autocast():
                        yield self._recorded[index].distance(model, batch, self.config)

    def mean_loss(self, model: Sam3Image, key: str = "") -> float:
        """Over the images; read from the cache where it holds this key."""
        if key and key in self._known:
            return self._known[key]
        with torch.no_grad():
            found = float(torch.stack([*self.losses(model)]).mean())
        if key:
            self._known[key] = found
            if self.cache is not None:
                write_json(self.cache, self._known)
        return found


class _Recorded(Teacher):
    """The whole model as a teacher of one batch, whose answers were written down."""

    def __init__(self, model: Sam3Image, batch: BatchedDatapoint) -> None:
        outputs, self._features = forward_features(model, batch, (), "answers")
        needed = ("pred_logits", "pred_boxes", "presence_logit_dec", "pred_masks", "semantic_seg")
        answers = last_outputs(outputs)
        self._answers = {key: answers[key] for key in needed if key in answers}

    def forward_features(self, *_: Any, **__: Any) -> tuple[dict[str, Tensor], Features]:
        """Return the recorded outputs and features."""
        return self._answers, self._features

    def distance(self, model: Sam3Image, batch: BatchedDatapoint, config: Config) -> Tensor:
        """How far the model's answers are, weighted as in distillation."""
        outputs, features = forward_features(model, batch, (), "answers")
        parts = Distiller(self, config.distill).losses(batch, (), "answers", outputs, features)
        return torch.stack([*parts.values()]).sum()


def cache_file(folder: Path, weights_file: Path, images: Dataset, config: Config) -> Path:
    """Where losses of these weights on these images, with these settings, are kept."""
    with weights_file.open("rb") as content:
        total = hashlib.file_digest(content, "sha256")
    total.update(images.content_hash().encode())
    total.update(config.model_dump_json().encode())
    return folder / f"{total.hexdigest()[:32]}.json"


def choose_layers(
    model: Sam3Image, size: ModelConfig, name: str, count: int, measure: Measure
) -> tuple[int, ...]:
    """Which `count` of the layers stay: the one without which the loss is least goes, and again.

    Args:
        name: one of `LAYERS`.

    Raises:
        UserError: more must stay than are asked for.
    """
    layers = len(_module_list(model, name))
    stay = protected_blocks(size) if name == "blocks" else set[int]()
    if count < max(len(stay), 1):
        raise UserError(
            f"--{name.replace('_', '-')} {count}: at least {max(len(stay), 1)} stay"
            + (f", those of global attention and the first: {sorted(stay)}" if stay else "")
        )
    kept = list(range(layers))
    trials = sum(n - len(stay) for n in range(count + 1, layers + 1))
    sees = contextlib.nullcontext() if name == "blocks" else _seen_once(model)
    with sees, progress(f"{name}: trial", trials) as advance:
        done = 0
        while len(kept) > count:
            losses = {}
            for index in sorted({*kept} - stay):
                rest = [i for i in kept if i != index]
                with only(model, name, rest):
                    losses[index] = measure.mean_loss(model, f"{name} {rest}")
                done += 1
                advance(done, f"without {index}: {losses[index]:.4g}")
            goes = min(losses, key=lambda index: (losses[index], index))
            kept.remove(goes)
            log.info("  %s %d goes: loss %.4g", name, goes, losses[goes])
    return tuple(kept)


@contextlib.contextmanager
def _seen_once(model: Sam3Image) -> Iterator[None]:
    """The trunk looks at each batch once: what is tried leaves it as it is."""
    trunk: Any = model.backbone.vision_backbone.trunk
    compute, known = trunk.forward, dict[int, list[Tensor]]()

    def forward(pixels: Tensor) -> list[Tensor]:
        if pixels.data_ptr() not in known:
            known[pixels.data_ptr()] = compute(pixels)
        return known[pixels.data_ptr()]

    trunk.forward = forward
    try:
        yield
    finally:
        del trunk.forward


@contextlib.contextmanager
def only(model: Sam3Image, name: str, kept: Sequence[int]) -> Iterator[None]:
    """Leave only these layers of one of `LAYERS` in the model, as they stand."""
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
    """The `count` queries that score highest, over all images and prompts."""
    total: Tensor | None = None
    model.eval()
    with torch.no_grad(), measure._autocast():
        for batch in measure.batches:
            scores = query_scores(last_outputs(model(batch))).double().sum(dim=0)  # (Q,)
            total = scores if total is None else total + scores
    assert total is not None
    return tuple(sorted(total.topk(count).indices.tolist()))


class Width:
    """How much each block's MLP units and attention heads matter.

    Attributes:
        hidden: of each block, (H,) float64.
        heads: of each block, (heads,) float64.
    """

    def __init__(self, model: Sam3Image, measure: Measure, by: WidthBy) -> None:
        """Measure.

        Args:
            by: "taylor": what a unit's part in the loss is, to the first order ("Importance
                Estimation for Neural Network Pruning", arXiv 1906.10771, its gates); else how large
                what it says is, times the weights that listen to it.
        """
        trunk: Any = model.backbone.vision_backbone.trunk
        asking = [p for p in model.parameters() if p.requires_grad]
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
            for parameter in asking:
                parameter.requires_grad_(True)

    def _taylor(self, model: Sam3Image, measure: Measure) -> tuple[list[Tensor], list[Tensor]]:
        flat = list(itertools.chain.from_iterable(self._gates))
        found = [torch.zeros_like(gate, dtype=torch.float64) for gate in flat]
        for loss in measure.losses(model):
            for total, gradient in zip(found, torch.autograd.grad(loss, flat), strict=True):
                total += gradient.double().square()
        return found[0::2], found[1::2]

    def _activation(self, model: Sam3Image, measure: Measure) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            for _ in measure.losses(model):
                pass
        hidden, heads = [], []
        trunk: Any = model.backbone.vision_backbone.trunk
        for block, (units, of_heads) in zip(trunk.blocks, self._norms, strict=True):
            weight = block.mlp.fc2.weight.double().square().sum(dim=0)  # (H,)
            hidden.append((units * weight).sqrt())
            proj = block.attn.proj.weight.double().square().sum(dim=0)
            heads.append((of_heads * proj.unflatten(0, (-1, block.attn.head_dim)).mean(1)).sqrt())
        return hidden, heads


def _gate(gate: Tensor, norm: Tensor, repeat: int) -> Callable[[Tensor], Tensor]:
    """Multiplies by the gate, and adds up the squares of what passes."""

    def apply(values: Tensor) -> Tensor:
        if not gate.requires_grad:
            squares = values.detach().double().square().flatten(0, -2).sum(dim=0)
            norm.add_(squares.unflatten(0, (-1, repeat)).sum(dim=1))
            return values
        return values * gate.repeat_interleave(repeat).to(values.dtype)

    return apply


def most(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, ascending."""
    return importance.topk(count).indices.sort().values


def _module_list(model: Sam3Image, name: str) -> nn.ModuleList:
    found = model.get_submodule(LAYERS[name])
    assert isinstance(found, nn.ModuleList)
    return found
