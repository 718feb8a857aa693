"""Distillation: a student learns the features and the outputs of a teacher.

In the stages "trunk" and "features" it learns feature maps, which needs no prompt and no label; in
"answers" boxes, scores, presence and masks as well, beside the losses of labels where there are
any.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from sam3.model.box_ops import box_cxcywh_to_xyxy, generalized_box_iou
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from app.config.schema import Config, DistillConfig, ModelConfig
from app.inference.predictor import query_scores
from app.model import weights
from app.model.build import build_model
from app.model.stored_text import StoredText, store
from app.training.store import note_found
from app.training.teacher import teacher_file, teacher_size

PARTS = ("distill_trunk", "distill_levels", "distill_text", "distill_outputs")
TAUGHT = 0.1  # least score of a teacher's detection whose mask the student learns
SUREST_FIRST = 100.0  # weight of the teacher's score in the matching, where students lack queries
MOST_CELLS = 32  # cells along a side on which maps of unlike widths are compared at most
# Weights of the parts of the output loss, and of the matching cost.
BOX, GIOU, SCORES, PRESENCE, MASKS, SEMANTIC = 5.0, 2.0, 2.0, 2.0, 5.0, 5.0
Losses = dict[str, Tensor]
Stage = Literal["trunk", "features", "answers"]  # each teaches what the one before does, and more


class Matches(NamedTuple):
    """The student's query that learns from each of the teacher's queries.

    Attributes:
        prompts, queries, theirs: (M,) int64, indices of the prompt, the student's query and the
            teacher's query.
        taught: (T,) int64, indices of the matches whose mask is taught.
    """

    prompts: Tensor
    queries: Tensor
    theirs: Tensor
    taught: Tensor


class Features(NamedTuple):
    """The intermediate features of one batch.

    Attributes:
        trunk: (B, d, g, g), the output of the last block.
        levels: the feature maps of the neck that the detector reads, from fine to coarse, each
            (B, d, s, s); empty in the stage "trunk".
        text: (L, N, d), the features of N words; None without words.
        padding: (N, L) bool, True where a word has no token; None without words.
    """

    trunk: Tensor
    levels: list[Tensor]
    text: Tensor | None
    padding: Tensor | None


def forward_features(
    model: Sam3Image, batch: BatchedDatapoint, words: Sequence[str], stage: Stage
) -> tuple[Any, Features]:
    """Return the outputs of the model (None before the last stage) and its features.

    Args:
        batch: on the device of the model; images (B, 3, R, R).
        words: N words to encode beside the prompts of the batch; may be empty.
        stage: how far to compute: nothing is computed that the stage does not teach.
    """
    vision = model.backbone.vision_backbone
    levels = list(vision.convs)[:-1]  # nothing reads the last one
    outputs = None
    if stage == "answers":
        intermediates: list[Any] = []

        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            intermediates.append(output)

        hooks = [part.register_forward_hook(record) for part in (vision.trunk, *levels)]
        try:
            outputs = model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        trunk, *maps = intermediates
    else:
        trunk = vision.trunk(batch.img_batch)
        maps = [level(trunk[-1]) for level in levels] if stage == "features" else []
    text = padding = None
    if words:
        encoded = model.backbone.forward_text(list(words), device=batch.img_batch.device)
        text, padding = encoded["language_features"], encoded["language_mask"]
    return outputs, Features(trunk[-1], maps, text, padding)


class WithIntermediates(nn.Module):
    """A model whose call returns its features as well, as `forward_features` does.

    A module, because DDP synchronizes gradients only of what runs in the call of its own module.

    Args:
        model: the model to train; it is left as it is.
    """

    def __init__(self, model: Sam3Image) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: BatchedDatapoint, words: Sequence[str], stage: Stage
    ) -> tuple[Any, Features]:
        """Return the outputs and the features."""
        return forward_features(self.model, batch, words, stage)


class Teacher:
    """A frozen model whose features and outputs are the targets.

    Args:
        model: of any size, on its device.
        config: its size.
    """

    def __init__(self, model: Sam3Image, config: ModelConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config

    @torch.no_grad()
    def forward_features(
        self, batch: BatchedDatapoint, words: Sequence[str], stage: Stage
    ) -> tuple[dict[str, Tensor] | None, Features]:
        """Return its outputs for the prompts of the batch and its features."""
        side = self.config.resolution
        if batch.img_batch.shape[-1] != side:
            batch, pixels = copy.copy(batch), batch.img_batch
            batch.img_batch = F.interpolate(
                pixels, size=(side, side), mode="bicubic", antialias=True
            )
            note_found(batch.img_batch, getattr(pixels, "found", []))
        outputs, features = forward_features(self.model, batch, words, stage)
        return (None if outputs is None else last_outputs(outputs)), features


def note(config: Config) -> str | None:
    """Return a note where a run has no epoch for the stage "answers"."""
    distill, epochs = config.distill, config.training.epochs
    if distill.teacher is None or distill.trunk_epochs + distill.feature_epochs < epochs:
        return None
    least = distill.trunk_epochs + distill.feature_epochs
    return (
        f"--epochs {epochs} is too short for this teacher: the first "
        f"{distill.trunk_epochs} teach the trunk and the next {distill.feature_epochs} its "
        f"features, so that no answers are trained. Give --epochs above {least}, or "
        "distill.trunk_epochs=0 distill.feature_epochs=0"
    )


def load_teacher(
    config: Config, student: Sam3Image, device: torch.device, precision: torch.dtype
) -> Teacher | None:
    """Load the run's teacher; None where it has none.

    Its encoders are stored in the precision that they multiply in, because bfloat16 takes half the
    memory. The student's text encoder serves both where it is equal to the teacher's and frozen.
    """
    file, size = teacher_file(config), teacher_size(config)
    if file is None or size is None:
        return None
    model, _ = weights.load(file, resolution=size.resolution, mapped=True)
    if has_equal_text(student, model):
        _share_text(model, student)
    _use_precision(model, precision)
    shared = {id(parameter) for parameter in student.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in shared:
            tensor.data = tensor.data.clone()  # in memory, because the mapped file may change
    return Teacher(model.to(device), size)


def teacher_on_meta(config: Config, student: Sam3Image, precision: torch.dtype) -> Teacher | None:
    """Return the run's teacher on the meta device, to count its memory.

    The student's text encoder is taken to be equal where sizes and vocabularies are.
    """
    size = teacher_size(config)
    if size is None:
        return None
    model = build_model(size, device="meta")
    is_equal = size.text == config.model.text and size.vocabulary == config.model.vocabulary
    if is_equal or config.model.vocabulary is not None:
        _share_text(model, student)
    _use_precision(model, precision)
    return Teacher(model, size)


def own_bytes(teacher: Teacher, student: Sam3Image) -> int:
    """Return the bytes of a teacher's weights without those that it shares with the student."""
    shared = {id(parameter) for parameter in student.parameters()}
    return sum(p.nbytes for p in teacher.model.parameters() if id(p) not in shared)


def _share_text(model: Sam3Image, student: Sam3Image) -> None:
    """Give the teacher the student's text encoder, where that is frozen."""
    text = student.backbone.language_backbone
    if not any(parameter.requires_grad for parameter in text.parameters()):
        model.backbone.language_backbone = text


def _use_precision(model: Sam3Image, precision: torch.dtype) -> None:
    """Convert the matrices of trunk and neck, which autocast would convert at each step."""
    for parameter in model.backbone.vision_backbone.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(precision)


def has_equal_text(student: Sam3Image, teacher: Sam3Image) -> bool:
    """Return whether the student's text encoder, or its stored text, is equal to the teacher's."""
    mine, yours = student.backbone.language_backbone, teacher.backbone.language_backbone
    if isinstance(mine, StoredText) and not isinstance(yours, StoredText):
        stored = store(teacher, mine.prompts, mine.mask.shape[1])
        return stored.memory.shape == mine.memory.shape and torch.allclose(
            stored.memory, mine.memory.to(stored.memory), rtol=1e-4, atol=1e-4
        )
    state, theirs = mine.state_dict(), yours.state_dict()
    return state.keys() == theirs.keys() and all(
        value.shape == theirs[key].shape and torch.equal(value.cpu(), theirs[key].cpu())
        for key, value in state.items()
    )


def last_outputs(outputs: Any) -> dict[str, Any]:
    """Return upstream's outputs of an image model, which has one stage."""
    (stage,) = outputs
    return stage[-1] if isinstance(stage, list) else stage


class Distiller:
    """Teaches a student what the teacher makes of each batch.

    Args:
        teacher: of any size.
        config: stages, and weights of the losses.
        words: further words to encode in each step; empty where the text encoder does not learn.
        match: outputs of the student and of the teacher → matches; None: `match_queries`.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: DistillConfig,
        words: Sequence[str] = (),
        match: Callable[[Any, Any], Matches] | None = None,
    ) -> None:
        self.teacher, self.config = teacher, config
        self.words = words
        self.match = match or match_queries

    def prepare(self, model: Sam3Image) -> WithIntermediates:
        """Return the module to call in training, with (batch, words, stage)."""
        return WithIntermediates(model)

    def stage(self, epoch: int) -> Stage:
        """Return what an epoch teaches: the trunk; the neck as well; or the answers as well."""
        config = self.config
        if epoch < config.trunk_epochs:
            return "trunk"
        return "features" if epoch < config.trunk_epochs + config.feature_epochs else "answers"

    def draw_words(self, batch: BatchedDatapoint) -> list[str]:
        """Return the words of a step: those of the batch, and others drawn at random."""
        if not self.words:
            return []
        drawn = random.sample(self.words, min(self.config.words, len(self.words)))
        return list(dict.fromkeys([*batch.find_text_batch, *drawn]))

    def losses(
        self,
        batch: BatchedDatapoint,
        words: Sequence[str],
        stage: Stage,
        outputs: Any,
        features: Features,
    ) -> Losses:
        """Return the losses of a stage by their names in `PARTS`, each weighted, to be added up.

        Args:
            outputs, features: of the student, as the prepared model returned them.
        """
        teacher_outputs, target = self.teacher.forward_features(batch, words, stage)
        config = self.config
        losses = {"distill_trunk": config.trunk * distance(features.trunk, target.trunk)}
        if stage != "trunk":
            levels = zip(config.levels, features.levels, target.levels, strict=True)
            parts = [weight * distance(mine, yours) for weight, mine, yours in levels]
            losses["distill_levels"] = torch.stack(parts).sum()
        if features.text is not None and target.text is not None and target.padding is not None:
            used = ~target.padding.T  # (L, N)
            mine, yours = features.text[used].T, target.text[used].T
            losses["distill_text"] = config.text * distance(mine, yours)
        if outputs is not None and teacher_outputs is not None:
            student_outputs = last_outputs(outputs)
            matches = self.match(student_outputs, teacher_outputs)
            answers = answer_losses(student_outputs, teacher_outputs, matches)
            losses["distill_outputs"] = config.outputs * torch.stack([*answers.values()]).sum()
        return losses


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of features over the variance of the teacher's.

    0 where they are equal; 1 where the student predicts the mean. Where their widths differ, the
    cosines between cells are compared instead, which needs no learned projection
    ("Similarity-Preserving Knowledge Distillation", arXiv 1907.09682).

    Args:
        student, teacher: maps (B, d, h, w), or words (d, N).
    """
    student, teacher = student.float(), teacher.float()
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        teacher = F.interpolate(teacher, size=student.shape[2:], mode="bilinear", antialias=True)
    axis = 1 if student.ndim == 4 else 0
    if student.shape[axis] != teacher.shape[axis]:
        student, teacher = _similarities(student), _similarities(teacher)
    return (student - teacher).square().mean() / teacher.var().clamp(min=1e-6)


def _similarities(features: Tensor) -> Tensor:
    """Return cosines between cells: (B, c, c) for (B, d, h, w), (N, N) for (d, N)."""
    if features.ndim == 4 and features.shape[-1] > MOST_CELLS:
        features = F.adaptive_avg_pool2d(features, MOST_CELLS)
    cells = F.normalize(features.flatten(2) if features.ndim == 4 else features, dim=-2)
    return cells.transpose(-1, -2) @ cells


@torch.no_grad()
def match_queries(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Matches:
    """Match a query of the student with each of the teacher's, at the least total cost.

    Where the student has fewer queries, those of the teacher with the highest scores are matched.

    Args:
        student, teacher: `pred_boxes` (P, Q, 4) cxcywh 0..1, `pred_logits` (P, Q, 1) and
            `presence_logit_dec` (P, 1), of P prompts; Q may differ.
    """
    mine, yours = student["pred_boxes"].float(), teacher["pred_boxes"].float()  # (P, Q, 4) cxcywh
    overlap = generalized_box_iou(box_cxcywh_to_xyxy(mine), box_cxcywh_to_xyxy(yours))
    probabilities = [o["pred_logits"].float().sigmoid().squeeze(-1) for o in (student, teacher)]
    unlike = (probabilities[0][:, :, None] - probabilities[1][:, None]).abs()  # (P, Q, Q')
    scores = query_scores(teacher)
    cost = BOX * torch.cdist(mine, yours, p=1) - GIOU * overlap + SCORES * unlike
    costs = (cost - SUREST_FIRST * scores[:, None]).cpu().numpy()
    matched = [
        (prompt, query, their)
        for prompt, matrix in enumerate(costs)
        for query, their in zip(*linear_sum_assignment(matrix), strict=True)
    ]
    indices = torch.tensor(matched, dtype=torch.long, device=mine.device).reshape(-1, 3)
    prompts, queries, theirs = indices.unbind(1)
    return Matches(prompts, queries, theirs, (scores[prompts, theirs] > TAUGHT).nonzero()[:, 0])


def answer_losses(
    student: dict[str, Tensor], teacher: dict[str, Tensor], matches: Matches
) -> Losses:
    """Return the losses of P prompts' outputs, part by part, each weighted.

    A box and a mask count by the teacher's score of them. The target score of a query without a
    match is 0.
    """
    prompts, queries, theirs, taught = matches
    confidence = query_scores(teacher)[prompts, theirs]  # (M,)
    total = confidence.sum().clamp(min=1)
    mine, yours = (
        outputs["pred_boxes"].float()[prompts, places]
        for outputs, places in ((student, queries), (teacher, theirs))
    )
    overlap = generalized_box_iou(
        box_cxcywh_to_xyxy(mine)[:, None], box_cxcywh_to_xyxy(yours)[:, None]
    )[:, 0, 0]
    logits = student["pred_logits"].float().squeeze(-1)  # (P, Q)
    target = torch.zeros_like(logits)
    target[prompts, queries] = teacher["pred_logits"].float().sigmoid()[prompts, theirs, 0]
    presence = (outputs["presence_logit_dec"].float().flatten() for outputs in (student, teacher))
    losses = {
        "boxes": BOX * (confidence * (mine - yours).abs().sum(-1)).sum() / total,
        "giou": GIOU * (confidence * (1 - overlap)).sum() / total,
        "scores": SCORES * _cross_entropy(logits, target).sum() / total,
        "presence": PRESENCE * _cross_entropy(next(presence), next(presence).sigmoid()).mean(),
    }
    if "pred_masks" in student and "pred_masks" in teacher:
        losses["masks"] = MASKS * _mask_loss(
            student["pred_masks"][prompts[taught], queries[taught]],
            teacher["pred_masks"][prompts[taught], theirs[taught]],
            confidence[taught],
        )
        everywhere = confidence.new_ones(len(logits))
        losses["semantic"] = SEMANTIC * _mask_loss(
            student["semantic_seg"][:, 0], teacher["semantic_seg"][:, 0], everywhere
        )
    return losses


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy beyond the entropy of the target: 0 where they agree."""
    with torch.autocast(target.device.type, enabled=False):  # which refuses it on CUDA
        least = F.binary_cross_entropy(target, target, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") - least


def _mask_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return cross-entropy plus dice of M masks' logits (M, h, w), weighted by `weight` (M,)."""
    student, teacher = student.float(), teacher.float()
    if student.shape[-2:] != teacher.shape[-2:]:
        size = student.shape[-2:]
        teacher = F.interpolate(teacher[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
    target, mask = teacher.sigmoid(), student.sigmoid()
    entropy = _cross_entropy(student, target).mean(dim=(1, 2))
    both = (target * mask).sum(dim=(1, 2))
    each = (target.square() + mask.square()).sum(dim=(1, 2))
    dice = 1 - (2 * both + 1) / (each + 1)
    return (weight * (entropy + dice)).sum() / weight.sum().clamp(min=1)
