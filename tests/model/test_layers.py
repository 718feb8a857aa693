"""All layers at once are upstream's one after another: values, names and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sam3.model import sam3_image
from sam3.train.loss import loss_fns
from sam3.train.loss.sam3_loss import Sam3LossWrapper
from sam3.train.matcher import BinaryHungarianMatcherV2, BinaryOneToManyMatcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.datasets.queries import collate
from app.model.upstream import fixes, layers
from tests.training.updates import tiny_updates

LAYERS, QUERIES, SIDE = 4, 7, 12
SCORES = {"weight_dict": {"loss_ce": 20.0, "presence_loss": 20.0}, "pos_weight": 10.0}
SCORES |= {"gamma": 2, "weak_loss": False, "use_presence": True, "pad_n_queries": QUERIES}


@pytest.fixture(autouse=True)
def mended() -> None:
    fixes.apply_fixes()


def _unmended(name: str) -> ModuleType:
    """Return a copy of upstream's module that no fix has touched."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _targets(counts: list[int], *, random: torch.Generator) -> dict[str, Any]:
    """Return objects of prompts, some prompts exhaustive; the last object's box has no height."""
    total, most = sum(counts), max(counts)
    center = torch.rand(total, 2, generator=random) * 0.6 + 0.2
    boxes = torch.cat([center, torch.rand(total, 2, generator=random) * 0.3 + 0.05], dim=1)
    boxes[total - 1 :, 3] = 0
    padded, ids = torch.zeros(len(counts), most, 4), torch.full((len(counts), most), -1)
    for prompt, objects in enumerate(boxes.split(counts)):
        padded[prompt, : len(objects)] = objects
        ids[prompt, : len(objects)] = torch.arange(len(objects))
    return {
        "boxes": boxes,
        "boxes_xyxy": layers.box_ops.box_cxcywh_to_xyxy(boxes),
        "boxes_padded": padded,
        "object_ids_padded": ids,
        "num_boxes": torch.tensor(counts),
        "masks": torch.rand(total, SIDE, SIDE, generator=random) > 0.5,
        "is_valid_mask": torch.arange(total) != 1,
        "is_exhaustive": torch.arange(len(counts)) != 1,
        "semantic_masks": None,
    }


def _answers(prompts: int, *, many: bool, random: torch.Generator) -> dict[str, Tensor]:
    """Return leaves: answers of all layers by upstream's names, (layers, prompts, ...)."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(LAYERS, prompts, *shape, generator=random).requires_grad_()

    leaves = {"presence_logit_dec": leaf(1)}
    for suffix in ("", "_o2m") if many else ("",):
        leaves[f"pred_logits{suffix}"] = leaf(QUERIES, 1)
        leaves[f"pred_boxes{suffix}"] = leaf(QUERIES, 4)
        leaves[f"pred_masks{suffix}"] = leaf(QUERIES, SIDE, SIDE)
    return leaves


def _compare(
    wrapper: Any, leaves: dict[str, Tensor], targets: dict[str, Any], upstream: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return losses and gradients, by `layers` or by upstream's (update_out, match, compare)."""
    update_out, compute_matching, compute_loss = upstream
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        value = leaf.sigmoid() if "boxes" in name else leaf
        update_out(out, name, value, auxiliary="masks" not in name)
        if "masks" in name:
            out[name] = value[-1]
        if "boxes" in name:
            corners = layers.box_ops.box_cxcywh_to_xyxy(value)
            update_out(out, name.replace("boxes", "boxes_xyxy"), corners)
    compute_matching(SimpleNamespace(matcher=wrapper.matcher), out, targets)
    torch.manual_seed(0)  # for the points at which masks are compared
    losses = compute_loss(wrapper, out, targets)
    losses["core_loss"].backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return losses, gradients


CASES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "one object a query": {"many": False},
    "no object": {"counts": [0, 0]},
    "one prompt": {"counts": [3]},
    "more objects than queries": {"counts": [QUERIES + 2, 0, 3]},
    "greedy in every layer": {"wrapper": {"use_o2m_matcher_on_o2m_aux": True}},
    "weak labels": {"scores": {"weak_loss": True}},
    "focal for positives": {"scores": {"pos_focal": True}},
    "fewer queries than meant": {"scores": {"pad_n_queries": 9, "pad_scale_pos": 0.5}},
    "no presence": {"scores": {"use_presence": False}},
    "the last layer's scores alone": {"scores": {"compute_aux": False}},
    "masks of every layer's points": {"masks": {"num_sample_points": None}},
    "costs without focal loss": {"matcher": {"focal": False}},
    "boxes are not counted": {"wrapper": {"normalization": "none"}},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_upstreams(case: str) -> None:
    chosen = {"counts": [2, 0, 4, 1], "many": True} | CASES[case]
    matcher = BinaryHungarianMatcherV2(
        **{"focal": True, "cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}
        | chosen.get("matcher", {})
    )
    points = {"num_sample_points": 32, "oversample_ratio": 3, "importance_sample_ratio": 0.75}
    masks = {"weight_dict": {"loss_mask": 200.0, "loss_dice": 10.0}, **points}
    parts = [
        loss_fns.Boxes({"loss_bbox": 5.0, "loss_giou": 2.0}),
        loss_fns.IABCEMdetr(**SCORES | chosen.get("scores", {})),
        loss_fns.Masks(**masks | chosen.get("masks", {})),
    ]
    settings = {"o2m_weight": 2.0, "use_o2m_matcher_on_o2m_aux": False}
    wrapper = Sam3LossWrapper(
        parts,
        matcher=matcher,
        o2m_matcher=BinaryOneToManyMatcher(threshold=0.1, topk=3),
        **settings | chosen.get("wrapper", {}),
    )
    random = torch.Generator().manual_seed(4)
    targets = _targets(chosen["counts"], random=random)
    leaves = _answers(len(chosen["counts"]), many=chosen["many"], random=random)

    image, loss = _unmended("sam3.model.sam3_image"), _unmended("sam3.train.loss.sam3_loss")
    upstream = (
        image._update_out,
        image.Sam3Image._compute_matching,
        loss.Sam3LossWrapper.compute_loss,
    )
    expected, gradients = _compare(wrapper, leaves, targets, upstream)
    ours = (layers.update_out, layers.compute_matching, layers.compute_loss)
    found, found_gradients = _compare(wrapper, leaves, targets, ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient is None) is (found_gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())


class _Operations(TorchDispatchMode):
    """Counts what torch runs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def test_an_update_of_nano_is_upstreams(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update() -> tuple[dict[str, float], Tensor, int]:
        updates, data = tiny_updates(shapes)
        updates.step.set_training()
        torch.manual_seed(0)
        with _Operations() as operations:
            losses = updates.step.batch_losses(collate([data[0], data[1]]), 0)
            losses["loss"].backward()
        gradients = [p.grad for p in updates.step.module.parameters() if p.grad is not None]
        values = {name: value.item() for name, value in losses.items()}
        return values, torch.cat([each.flatten() for each in gradients]), operations.count

    found, gradient, operations = update()
    image, loss = _unmended("sam3.model.sam3_image"), _unmended("sam3.train.loss.sam3_loss")
    monkeypatch.setattr(sam3_image, "_update_out", image._update_out)
    original = image.Sam3Image._compute_matching
    monkeypatch.setattr(sam3_image.Sam3Image, "_compute_matching", original)
    monkeypatch.setattr(Sam3LossWrapper, "compute_loss", loss.Sam3LossWrapper.compute_loss)
    expected, upstreams, before = update()
    assert found == pytest.approx(expected, rel=1e-5)
    assert (gradient - upstreams).norm() < 1e-5 * upstreams.norm()
    assert operations < 0.85 * before
