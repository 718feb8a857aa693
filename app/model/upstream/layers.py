"""The matching and the losses of all layers of the decoder at once.

Upstream matches and compares the queries of one layer after those of another, and those for one
object apart from those for many (sam3_image.py, `_compute_matching`; sam3_loss.py,
`compute_loss`): 2,600 small operations forward at full size, and a wait for the device at each
match. A layer's answers are few numbers, so all are compared here by the operations of one. Values
and names are upstream's; sums are added up in another order. What is not known here goes upstream's
way: other matchers, other losses, videos.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sam3.model import box_ops
from sam3.train import matcher as upstream_matcher
from sam3.train.loss import loss_fns, mask_sampling
from sam3.train.loss.loss_fns import CORE_LOSS_KEY, Boxes, Det2TrkAssoc, IABCEMdetr, Masks
from sam3.train.matcher import BinaryHungarianMatcherV2
from torch import Tensor

Matches = tuple[Tensor, Tensor, Tensor | None]  # prompts, queries, objects; None: all, in order
_FOUND = "matches_for_many"  # of a model's outputs: settings of a matcher, and its matches
Losses = dict[str, Tensor]  # by upstream's name, one for each set: (S,)


def update_out(
    out: dict[str, Any],
    out_name: str,
    out_value: Any,
    auxiliary: bool = True,
    update_aux: bool = True,
) -> None:
    """Do as upstream's `_update_out`, whose gradient fills and adds up one tensor a layer."""
    if not (auxiliary and update_aux):
        out[out_name] = out_value[-1] if auxiliary else out_value
        return
    *earlier, out[out_name] = out_value.unbind()
    auxiliaries = out.setdefault("aux_outputs", [{} for _ in earlier])
    for layer, value in zip(auxiliaries, earlier, strict=True):
        layer[out_name] = value


def compute_matching(model: Any, out: dict[str, Any], targets: Mapping[str, Any]) -> None:
    """Match each layer's queries with the objects, for `Sam3Image`; sets "indices" of each.

    The losses match the earlier layers' queries for many objects in the same way: these are matched
    at once with the others, and what is found is left for them in `_FOUND`.
    """
    layers = [out, *out.get("aux_outputs", [])]
    many = [_for_many(layer) for layer in layers[1:] if "pred_logits_o2m" in layer]
    matches = _match(model.matcher, [*layers, *many], targets)
    for layer, found in zip([*layers, *many], matches, strict=True):
        layer["indices"] = found
    if many:
        out[_FOUND] = _settings(model.matcher), [each["indices"] for each in many]


def _for_many(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removesuffix("_o2m"): layer[key] for key in layer if key.endswith("_o2m")}


def _settings(matcher: Any) -> tuple[Any, ...]:
    """Return what decides a matcher's matches."""
    numbers = {k: v for k, v in vars(matcher).items() if isinstance(v, (int, float))}
    return type(matcher), numbers


def _match(
    matcher: Any, layers: Sequence[Mapping[str, Tensor]], targets: Mapping[str, Any], **valid: Any
) -> list[Matches]:
    """Return the matches of each layer; those of upstream's usual matcher all at once.

    Args:
        valid: what upstream passes of valid queries and objects; each may be None.
    """
    filtered = any(value is not None for value in valid.values())
    usual = type(matcher) is BinaryHungarianMatcherV2 and not (matcher.focal and matcher.stable)
    if not usual or filtered or not layers:
        return [matcher(layer, targets, **valid) for layer in layers]
    return _assign(matcher, layers, targets)


@torch.no_grad()
def _assign(
    matcher: Any, layers: Sequence[Mapping[str, Tensor]], targets: Mapping[str, Any]
) -> list[Matches]:
    """Return the matches of least cost of each layer, in the order of upstream's.

    Costs go to the CPU in one copy, and matches come back in one.
    """
    logits = torch.stack([layer["pred_logits"] for layer in layers])  # (L, B, Q, 1)
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])  # (L, B, Q, 4) cxcywh
    costs = _costs(matcher, logits, boxes, targets["boxes_padded"])  # (L, B, Q, most objects)
    told = torch.cat([costs.flatten(), targets["num_boxes"].float()]).cpu().numpy()
    prompts, queries = costs.shape[1:3]
    numbers = told[len(told) - prompts :].astype(np.int64)  # objects of each prompt
    of_layers = told[: len(told) - prompts].reshape(costs.shape)
    firsts = np.cumsum(numbers) - numbers
    by_query = (numbers > queries).any()  # upstream's order where an object may have no match
    found = []
    for of_layer in of_layers:
        for prompt, of_prompt in enumerate(of_layer):
            chosen = of_prompt[:, : numbers[prompt]]
            rows, objects = upstream_matcher.linear_sum_assignment(chosen)
            order = np.arange(len(rows)) if by_query else np.argsort(objects)
            places = np.full(len(rows), prompt), rows[order], firsts[prompt] + objects[order]
            found.append(np.stack(places))
    matches = torch.from_numpy(np.concatenate(found, axis=1)).to(boxes.device, non_blocking=True)
    each = matches.view(3, len(layers), matches.shape[1] // len(layers))
    return [(layer[0], layer[1], layer[2]) for layer in each.unbind(1)]


def _costs(matcher: Any, logits: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
    """Return what each match costs (L, B, Q, T) (matcher.py, `BinaryHungarianMatcherV2`).

    Args:
        logits: (L, B, Q, 1).
        boxes: (L, B, Q, 4) cxcywh, 0..1.
        objects: (B, T, 4), likewise, padded.
    """
    probability = logits.sigmoid()
    if matcher.focal:
        alpha, gamma = matcher.alpha, matcher.gamma
        positive = -alpha * (1 - probability) ** gamma * F.logsigmoid(logits)
        of_class = positive + (1 - alpha) * probability**gamma * F.logsigmoid(-logits)
    else:
        of_class = -probability
    distance = torch.cdist(boxes, objects.expand(len(boxes), -1, -1, -1), p=1)
    overlap = box_ops.generalized_box_iou(
        box_ops.box_cxcywh_to_xyxy(boxes), box_ops.box_cxcywh_to_xyxy(objects)
    )
    costs: Tensor = matcher.cost_bbox * distance + matcher.cost_class * of_class
    return costs - matcher.cost_giou * overlap


@dataclass(frozen=True)
class _Set:
    """Answers of one layer, for one object a query or for many, and their matches.

    Attributes:
        suffix: of the names of its losses.
        is_auxiliary: of an earlier layer.
        to_many: whether an object may match several queries.
    """

    outputs: Mapping[str, Any]
    matches: Matches
    suffix: str
    is_auxiliary: bool
    to_many: bool


def compute_loss(
    wrapper: Any, nested_out: Mapping[str, Any], targets: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return each loss of each set, and CORE_LOSS_KEY, their weighted sum: of `Sam3LossWrapper`."""
    num_boxes = wrapper._get_num_boxes(targets)
    sets = _sets(wrapper, nested_out, targets)
    together = _stack(sets, targets, num_boxes) if _can_stack(sets) else None
    losses: dict[str, Tensor] = {}
    core: Any = 0.0
    for part in wrapper.loss_fns_find:
        if together is not None and _is_known(part):
            compared: Sequence[_Set] = sets
            found = _boxes(together) if type(part) is Boxes else _scores(part, together)
        elif _compares_points(part, sets, targets):
            compared = [s for s in sets if not s.is_auxiliary and "pred_masks" in s.outputs]
            found = _masks(part, compared, targets, num_boxes)
        else:
            core = core + _one_by_one(wrapper, part, sets, targets, num_boxes, losses)
            continue
        factors = _factors(compared, wrapper.o2m_weight)
        core = core + (part.reduce_loss(found) * factors).sum()
        for name, values in found.items():
            each = (values * factors).unbind()
            losses |= {f"{name}{s.suffix}": v for s, v in zip(compared, each, strict=True)}
    return losses | {CORE_LOSS_KEY: core}


def _sets(wrapper: Any, nested_out: Mapping[str, Any], targets: Mapping[str, Any]) -> list[_Set]:
    """Return the answers for one object a query, layer by layer, then those for many."""
    layers = [(nested_out, "", False)]
    earlier = nested_out.get("aux_outputs", [])
    layers += [(layer, f"_aux_{index}", True) for index, layer in enumerate(earlier)]
    if "first_stage" in nested_out:
        layers.append((nested_out["first_stage"], "_fs", True))
    sets = [
        _Set(layer, layer["indices"], suffix, is_auxiliary, False)
        for layer, suffix, is_auxiliary in layers
    ]

    layers = [layer for layer in layers if "pred_logits_o2m" in layer[0]]
    many = [_for_many(layer) for layer, _, _ in layers]
    valid = {
        "out_is_valid": nested_out.get("o2m_out_is_valid"),
        "target_is_valid_padded": nested_out.get("o2m_target_is_valid_padded"),
    }
    greedy = len(many) if wrapper.use_o2m_matcher_on_o2m_aux else 1  # the last layer comes first
    matches = _match(wrapper.o2m_matcher, many[:greedy], targets, **valid)
    settings, found = nested_out.get(_FOUND, (None, []))
    filtered = any(value is not None for value in valid.values())
    if filtered or len(found) != len(many[greedy:]) or settings != _settings(wrapper.matcher):
        found = _match(wrapper.matcher, many[greedy:], targets, **valid)
    matches += found
    return sets + [
        _Set(outputs, found, f"{suffix}_o2m", is_auxiliary, True)
        for outputs, found, (_, suffix, is_auxiliary) in zip(many, matches, layers, strict=True)
    ]


def _one_by_one(
    wrapper: Any,
    part: Any,
    sets: Sequence[_Set],
    targets: Mapping[str, Any],
    num_boxes: Any,
    losses: dict[str, Tensor],
) -> Any:
    """Add one part's losses of each set to `losses`, by upstream; return their weighted sum."""
    core: Any = 0.0
    for answers in sets:
        # As upstream: masks for many objects may be left out, associations have none.
        no_masks = isinstance(part, Masks) and "pred_masks" not in answers.outputs
        if answers.to_many and (no_masks or isinstance(part, Det2TrkAssoc)):
            continue
        found = part(
            outputs=answers.outputs,
            targets=targets,
            indices=answers.matches,
            num_boxes=num_boxes,
            is_aux=answers.is_auxiliary,
        )
        if answers.to_many:
            found = {name: value * wrapper.o2m_weight for name, value in found.items()}
        core = core + found.pop(CORE_LOSS_KEY)
        losses |= {f"{name}{answers.suffix}": value for name, value in found.items()}
    return core


@dataclass(frozen=True)
class _Together:
    """The answers of S sets for B prompts by Q queries each, and what they are compared with.

    Attributes:
        logits: (S, B, Q).
        rows: of each of the M matches in (S * B * Q), set by set; long.
        matches: number of each set's.
        boxes, boxes_xyxy: that were matched, (M, 4), 0..1, cxcywh and xyxy.
        objects, objects_xyxy: boxes of the objects that they were matched with, likewise.
        num_boxes: what the losses of boxes are divided by.
    """

    sets: Sequence[_Set]
    targets: Mapping[str, Any]
    logits: Tensor
    rows: Tensor
    matches: list[int]
    boxes: Tensor
    boxes_xyxy: Tensor
    objects: Tensor
    objects_xyxy: Tensor
    num_boxes: Any


def _sums(values: Tensor, matches: Sequence[int]) -> Tensor:
    """Return the sums (S,) of each set's of the values (M,)."""
    if values.is_cuda:  # at once
        lengths = torch.tensor(matches).to(values.device, non_blocking=True)
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
    return torch.stack([part.sum() for part in values.split(list(matches))])


def _factors(sets: Sequence[_Set], to_many: float) -> Tensor:
    """Return the factor (S,) of each set: 1, or that of sets for many objects, which come last."""
    count = sum(not each.to_many for each in sets)
    ones = torch.ones(count, device=sets[0].outputs["pred_logits"].device)
    return F.pad(ones, (0, len(sets) - count), value=to_many)


def _can_stack(sets: Sequence[_Set]) -> bool:
    shapes = {each.outputs["pred_logits"].shape for each in sets}
    return len(shapes) == 1 and not any(s.outputs.get("is_video_grounding_batch") for s in sets)


def _stack(sets: Sequence[_Set], targets: Mapping[str, Any], num_boxes: Any) -> _Together:
    def stacked(name: str) -> Tensor:
        return torch.stack([each.outputs[name] for each in sets])

    logits = stacked("pred_logits").squeeze(-1)
    prompts, queries = logits.shape[1:]
    device = logits.device
    every = torch.arange(len(targets["boxes"]), device=device)
    found = [(*s.matches[:2], every if s.matches[2] is None else s.matches[2]) for s in sets]
    of_prompts, of_queries, of_objects = (torch.cat(each) for each in zip(*found, strict=True))
    matches = [len(each) for each, _, _ in found]
    firsts = np.repeat(np.arange(len(sets)) * prompts * queries, matches)  # rows of earlier sets
    rows = torch.from_numpy(firsts).to(device, non_blocking=True)
    rows = rows + of_prompts * queries + of_queries
    return _Together(
        sets,
        targets,
        logits,
        rows,
        matches,
        stacked("pred_boxes").flatten(0, 2).index_select(0, rows),
        stacked("pred_boxes_xyxy").flatten(0, 2).index_select(0, rows),
        targets["boxes"].index_select(0, of_objects),
        targets["boxes_xyxy"].index_select(0, of_objects),
        num_boxes,
    )


def _is_known(part: Any) -> bool:
    """Return whether a part of upstream's losses is computed here, with its settings."""
    if type(part) is Boxes:
        return bool(part.compute_aux)
    if type(part) is not IABCEMdetr:
        return False
    of_videos = part.use_separate_loss_for_det_and_trk or part.use_presence_semgseg
    return part.compute_aux and not of_videos


def _boxes(together: _Together) -> Losses:
    """Return the L1 and GIoU losses of matched boxes (loss_fns.py, `Boxes.get_loss`)."""
    matches, count = together.matches, together.num_boxes
    distance = F.l1_loss(together.boxes, together.objects, reduction="none").sum(-1)
    overlap = box_ops.fast_diag_generalized_box_iou(together.boxes_xyxy, together.objects_xyxy)
    return {
        "loss_bbox": _sums(distance, matches) / count,
        "loss_giou": _sums(1 - overlap, matches) / count,
    }


def _scores(part: Any, together: _Together) -> Losses:
    """Return the losses of scores and of presence (loss_fns.py, `IABCEMdetr.get_loss`).

    A matched query's target is between its score and the IoU of its box: the score shall tell how
    good the box is. All others' is 0, weighted by their score (`gamma`).
    """
    logits, rows = together.logits, together.rows
    probability = logits.sigmoid()
    is_matched = torch.zeros(logits.shape, device=logits.device)
    is_matched.view(-1)[rows] = 1
    with torch.no_grad():
        iou = box_ops.fast_diag_box_iou(together.boxes_xyxy, together.objects_xyxy)
        score = probability.view(-1)[rows]
        quality = (score**part.alpha * iou ** (1 - part.alpha)).clamp(0.01)
        target = is_matched.clone()
        target.view(-1)[rows] = quality
    if part.pos_focal:
        positive = loss_fns.sigmoid_focal_loss(
            logits, target, num_boxes=1, alpha=0.5, gamma=part.gamma, reduce=False
        )
    else:
        positive = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    positive = positive * is_matched * part.pos_weight
    is_padded = part.pad_n_queries is not None and logits.shape[2] < part.pad_n_queries
    if is_padded:
        positive = positive * part.pad_scale_pos
    negative = F.binary_cross_entropy_with_logits(logits, is_matched, reduction="none")
    loss = positive + negative * (1 - is_matched) * probability**part.gamma  # (S, B, Q)

    presence = accuracy = torch.zeros(len(together.sets), device=logits.device)
    if part.use_presence:
        is_present = _is_present(together.targets)  # (B, 1)
        loss = loss * is_present
        presence, accuracy = _presence(part, together.sets, is_present)
    if part.weak_loss:  # nothing is known of queries without a match where not all is labelled
        is_exhaustive = together.targets["is_exhaustive"].view(-1, 1)
        counts = (is_exhaustive | (is_matched >= 0.5)).float()
        mean = (loss * counts).sum((1, 2)) / (counts.sum((1, 2)) + 1e-6)
    elif is_padded:
        mean = loss.sum((1, 2)) / (part.pad_n_queries * logits.shape[1])
    else:
        mean = loss.mean((1, 2))
    predicted = (probability > 0.5).float()
    hits = (predicted * is_matched).sum((1, 2))
    f1 = 2 * hits / (predicted + is_matched).sum((1, 2)).clamp(min=1)
    return {
        "loss_ce": mean,
        "ce_f1": f1,
        "presence_loss": presence,
        "presence_dec_acc": accuracy,
    }


def _is_present(targets: Mapping[str, Any]) -> Tensor:
    """Return 1 for prompts of which an object is visible, else 0: (B, 1)."""
    width, height = targets["boxes_padded"][..., 2:].unbind(-1)  # (B, most objects)
    is_visible = (targets["object_ids_padded"] >= 0) & (width > 0) & (height > 0)
    return is_visible.any(-1, keepdim=True).float()


def _presence(part: Any, sets: Sequence[_Set], is_present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the presence loss and accuracy (S,): 0 where a set, for many objects, has none."""
    name = "presence_logit_dec"
    having = [s.outputs[name].view_as(is_present) for s in sets if name in s.outputs]
    if not having:
        zeros = torch.zeros(len(sets), device=is_present.device)
        return zeros, zeros
    logits = torch.stack(having)  # (sets for one object, B, 1)
    target = is_present.expand_as(logits)
    loss = loss_fns.sigmoid_focal_loss(
        logits,
        target,
        num_boxes=1,
        alpha=part.presence_alpha,
        gamma=part.presence_gamma,
        reduce=False,
    )
    is_right = ((logits.sigmoid() > 0.5) == target.bool()).float()
    rest = (0, len(sets) - len(having))  # those for many objects come last
    return F.pad(loss.mean((1, 2)), rest), F.pad(is_right.mean((1, 2)), rest)


def _compares_points(part: Any, sets: Sequence[_Set], targets: Mapping[str, Any]) -> bool:
    """Return whether a part compares masks of the last layer, at points, and there are some."""
    known = type(part) is Masks and not part.compute_aux and part.num_sample_points is not None
    of_video = any(s.outputs.get("is_video_grounding_batch") for s in sets)
    return known and not of_video and targets["masks"] is not None


def _masks(part: Any, sets: Sequence[_Set], targets: Mapping[str, Any], num_boxes: Any) -> Losses:
    """Return the focal and dice losses of masks at points (loss_fns.py, `Masks._sampled_loss`).

    Most points are those of many drawn at random at which a mask is least certain (PointRend,
    arXiv:1912.08193). Each set draws its own, so that they are those that upstream would draw.
    """
    every = torch.arange(len(targets["boxes"]), device=targets["boxes"].device)
    found = [every if s.matches[2] is None else s.matches[2] for s in sets]
    objects = torch.cat(found)
    logits = torch.cat([s.outputs["pred_masks"][s.matches[0], s.matches[1]] for s in sets])
    has_mask = targets["is_valid_mask"].index_select(0, objects).tolist()  # all that is waited for
    if not any(has_mask):
        zeros = torch.stack([s.outputs["pred_masks"].sum() * 0 for s in sets])
        return {"loss_mask": zeros, "loss_dice": zeros}
    if not all(has_mask):
        kept = torch.from_numpy(np.flatnonzero(has_mask)).to(objects.device, non_blocking=True)
        objects, logits = objects.index_select(0, kept), logits.index_select(0, kept)
    ends = np.cumsum([0, *map(len, found)])
    counts = [sum(has_mask[start:end]) for start, end in itertools.pairwise(ends)]
    masks = targets["masks"].index_select(0, objects).to(logits)  # (M, H, W)

    points, least_certain = (
        part.num_sample_points,
        int(part.importance_sample_ratio * part.num_sample_points),
    )
    drawn = [
        [
            torch.rand(count, number, 2, device=logits.device)
            for number in (int(points * part.oversample_ratio), points - least_certain)
        ]
        for count in counts
    ]
    candidates, others = (torch.cat(each) for each in zip(*drawn, strict=True))
    with torch.no_grad():
        certainty = _at(logits, candidates).abs()
        chosen = certainty.neg().topk(least_certain, dim=1).indices
        chosen = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        coordinates = torch.cat([chosen, others], dim=1)  # (M, points, 2), 0..1
        target = _at(masks, coordinates)
    answer = _at(logits, coordinates)
    focal = loss_fns.sigmoid_focal_loss(
        answer, target, num_boxes, alpha=part.focal_alpha, gamma=part.focal_gamma, reduce=False
    )
    dice = loss_fns.dice_loss(answer, target, num_boxes, reduce=False)
    return {
        "loss_mask": _sums(focal.mean(1), counts) / num_boxes,
        "loss_dice": _sums(dice, counts) / num_boxes,
    }


def _at(masks: Tensor, points: Tensor) -> Tensor:
    """Return the values (M, points) of masks (M, H, W) at points (M, points, 2), 0..1."""
    return mask_sampling.point_sample(masks[:, None], points, align_corners=False).squeeze(1)
