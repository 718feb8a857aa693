"""A student learns to see and to answer what a teacher does, on images with or without labels.

First what the trunk makes of an image, and the neck, which needs no prompt; then boxes, presence,
masks and how well words and pixels agree, beside the losses of fine-tuning where there are labels.
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
from app.training.teacher import teacher_file, teacher_size

PARTS = ("distill_trunk", "distill_levels", "distill_text", "distill_outputs")
TAUGHT = 0.1  # least score of a teacher's detection whose mask is taught
SUREST_FIRST = 100.0  # what a teacher's score is worth when queries are fewer than its own
MOST_CELLS = 32  # a side: maps of other widths than the teacher's are compared on so many
# Of the parts of what is answered, and of their costs when students' boxes are matched.
BOX, GIOU, SCORES, PRESENCE, MASKS, SEMANTIC = 5.0, 2.0, 2.0, 2.0, 5.0, 5.0
Losses = dict[str, Tensor]
Stage = Literal["trunk", "features", "answers"]  # each teaches what the one before does, and more


class Matches(NamedTuple):
    """Which of the student's queries is to say what one of the teacher's does.

    Attributes:
        prompts, queries, theirs: indices of prompt, student's query and teacher's, (M,) int64.
        taught: of these matches, the ones whose mask is taught, (T,) int64.
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
    """A frozen model whose answers are taken for right.

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
            batch = copy.copy(batch)
            batch.img_batch = F.interpolate(
                batch.img_batch, size=(side, side), mode="bicubic", antialias=True
            )
        outputs, features = forward_features(self.model, batch, words, stage)
        return (None if outputs is None else last_outputs(outputs)), features


def note(config: Config) -> str | None:
    """What of a teacher's lessons a run leaves out."""
    taught, epochs = config.distill, config.training.epochs
    first = taught.trunk_epochs + taught.feature_epochs
    if taught.teacher is None or first < epochs:
        return None
    return (
        f"distill: {taught.trunk_epochs} trunk_epochs and {taught.feature_epochs} feature_epochs "
        f"are all of the {epochs} epochs: what is seen is taught, what is answered is not"
    )


def load_teacher(
    config: Config, student: Sam3Image, device: torch.device, precision: torch.dtype
) -> Teacher | None:
    """The run's teacher; None where it has none.

    Its encoders are kept in the precision that they are used in: half the memory in bfloat16. The
    student's text encoder serves both where it is the same and stays so.
    """
    file, size = teacher_file(config), teacher_size(config)
    if file is None or size is None:
        return None
    model, _ = weights.load(file, resolution=size.resolution, mapped=True)
    if says_the_same(student, model):
        _share_text(model, student)
    _use_precision(model, precision)
    students = {id(parameter) for parameter in student.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in students:
            tensor.data = tensor.data.clone()  # out of the file, whatever becomes of that
    return Teacher(model.to(device), size)


def teacher_on_meta(config: Config, student: Sam3Image, precision: torch.dtype) -> Teacher | None:
    """The same without contents, and as if its text encoder were the student's: to count."""
    size = teacher_size(config)
    if size is None:
        return None
    model = build_model(size, device="meta")
    alike = size.text == config.model.text and size.vocabulary == config.model.vocabulary
    if alike or config.model.vocabulary is not None:
        _share_text(model, student)
    _use_precision(model, precision)
    return Teacher(model, size)


def own_bytes(teacher: Teacher, student: Sam3Image) -> int:
    """Of a teacher's weights, but for those that are the student's."""
    shared = {id(parameter) for parameter in student.parameters()}
    return sum(p.nbytes for p in teacher.model.parameters() if id(p) not in shared)


def _share_text(model: Sam3Image, student: Sam3Image) -> None:
    """One text encoder for both, where it learns nothing."""
    text = student.backbone.language_backbone
    if not any(parameter.requires_grad for parameter in text.parameters()):
        model.backbone.language_backbone = text


def _use_precision(model: Sam3Image, precision: torch.dtype) -> None:
    """Matrices of the trunk and neck, which autocast would convert at each step."""
    for parameter in model.backbone.vision_backbone.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(precision)


def says_the_same(student: Sam3Image, teacher: Sam3Image) -> bool:
    """Whether the student's text encoder, or what is stored in its place, is the teacher's."""
    mine, yours = student.backbone.language_backbone, teacher.backbone.language_backbone
    if isinstance(mine, StoredText) and not isinstance(yours, StoredText):
        said = store(teacher, mine.prompts, mine.mask.shape[1])
        return said.memory.shape == mine.memory.shape and torch.allclose(
            said.memory, mine.memory.to(said.memory), rtol=1e-4, atol=1e-4
        )
    state, theirs = mine.state_dict(), yours.state_dict()
    return state.keys() == theirs.keys() and all(
        value.shape == theirs[key].shape and torch.equal(value.cpu(), theirs[key].cpu())
        for key, value in state.items()
    )


def last_outputs(outputs: Any) -> dict[str, Any]:
    """Of upstream's outputs, those of the only stage."""
    (stage,) = outputs
    return stage[-1] if isinstance(stage, list) else stage


class Distiller:
    """Teaches a student what the teacher makes of each batch.

    Args:
        words: to read beside those of a batch; none where the text encoder does not learn.
        match: teacher's detections → student's queries; `match_queries`, but for tests of memory.
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
        """Return the module to train: its call takes (batch, words, stage), see there."""
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
    """How far features (B, d, h, w) or (d, N) are from the teacher's: 0 equal, 1 telling nothing.

    Mean squared error over the teacher's variance. Where their widths differ, the same of how alike
    each two cells are, which needs no learned projection ("Similarity-Preserving Knowledge
    Distillation", arXiv 1907.09682).
    """
    student, teacher = student.float(), teacher.float()
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        teacher = F.interpolate(teacher, size=student.shape[2:], mode="bilinear", antialias=True)
    axis = 1 if student.ndim == 4 else 0
    if student.shape[axis] != teacher.shape[axis]:
        student, teacher = _similarities(student), _similarities(teacher)
    return (student - teacher).square().mean() / teacher.var().clamp(min=1e-6)


def _similarities(features: Tensor) -> Tensor:
    """Cosines between cells: (B, d, h, w) → (B, c, c); (d, N) → (N, N)."""
    if features.ndim == 4 and features.shape[-1] > MOST_CELLS:
        features = F.adaptive_avg_pool2d(features, MOST_CELLS)
    cells = F.normalize(features.flatten(2) if features.ndim == 4 else features, dim=-2)
    return cells.transpose(-1, -2) @ cells


@torch.no_grad()
def match_queries(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Matches:
    """One of the student's queries for each of the teacher's, at the least cost.

    Where the student has fewer, the teacher's surest ones are matched.
    """
    mine, yours = student["pred_boxes"].float(), teacher["pred_boxes"].float()  # (P, Q, 4) cxcywh
    overlap = generalized_box_iou(box_cxcywh_to_xyxy(mine), box_cxcywh_to_xyxy(yours))
    chance = [o["pred_logits"].float().sigmoid().squeeze(-1) for o in (student, teacher)]  # (P, Q)
    unlike = (chance[0][:, :, None] - chance[1][:, None]).abs()
    scores = query_scores(teacher)
    cost = BOX * torch.cdist(mine, yours, p=1) - GIOU * overlap + SCORES * unlike
    costs = (cost - SUREST_FIRST * scores[:, None]).cpu().numpy()
    found = [
        (prompt, query, their)
        for prompt, matrix in enumerate(costs)
        for query, their in zip(*linear_sum_assignment(matrix), strict=True)
    ]
    indices = torch.tensor(found, dtype=torch.long, device=mine.device).reshape(-1, 3)
    prompts, queries, theirs = indices.unbind(1)
    return Matches(prompts, queries, theirs, (scores[prompts, theirs] > TAUGHT).nonzero()[:, 0])


def answer_losses(
    student: dict[str, Tensor], teacher: dict[str, Tensor], matches: Matches
) -> Losses:
    """How far P prompts' answers are from the teacher's, part by part, each weighted.

    A box and a mask count as much as the teacher is sure of them. A query without a match is to
    score 0.
    """
    prompts, queries, theirs, taught = matches
    sure = query_scores(teacher)[prompts, theirs]  # (M,)
    total = sure.sum().clamp(min=1)
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
    found = {
        "boxes": BOX * (sure * (mine - yours).abs().sum(-1)).sum() / total,
        "giou": GIOU * (sure * (1 - overlap)).sum() / total,
        "scores": SCORES * _cross_entropy(logits, target).sum() / total,
        "presence": PRESENCE * _cross_entropy(next(presence), next(presence).sigmoid()).mean(),
    }
    if "pred_masks" in student and "pred_masks" in teacher:
        found["masks"] = MASKS * _mask_loss(
            student["pred_masks"][prompts[taught], queries[taught]],
            teacher["pred_masks"][prompts[taught], theirs[taught]],
            sure[taught],
        )
        everywhere = sure.new_ones(len(logits))
        found["semantic"] = SEMANTIC * _mask_loss(
            student["semantic_seg"][:, 0], teacher["semantic_seg"][:, 0], everywhere
        )
    return found


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Beyond that of an answer equal to the target: 0 where they agree."""
    least = F.binary_cross_entropy(target, target, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") - least


def _mask_loss(student: Tensor, teacher: Tensor, sure: Tensor) -> Tensor:
    """Cross-entropy and dice of M masks' logits (M, h, w), weighted by `sure` (M,)."""
    student, teacher = student.float(), teacher.float()
    if student.shape[-2:] != teacher.shape[-2:]:
        size = student.shape[-2:]
        teacher = F.interpolate(teacher[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
    target, chance = teacher.sigmoid(), student.sigmoid()
    told = _cross_entropy(student, target).mean(dim=(1, 2))
    both = (target * chance).sum(dim=(1, 2))
    each = (target.square() + chance.square()).sum(dim=(1, 2))
    dice = 1 - (2 * both + 1) / (each + 1)
    return (sure * (told + dice)).sum() / sure.sum().clamp(min=1)
