"""Meta's published files, told apart and read at their full names and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.config.compose import load_model_config
from app.errors import UserError
from app.model import published, weights
from app.model.build import build_model
from tests.model.published import sam31_beside

NECKS = ("interactive_convs.", "propagation_convs.")


def test_the_list_of_sam_31_is_whole() -> None:
    """As many tensors as the inventory of Meta's file counts, and its sizes in numbers."""
    shapes = sam31_beside()
    tracker = [key for key in shapes if key.startswith("tracker.")]
    assert (len(shapes), len(tracker)) == (493, 457)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    for neck in NECKS:
        assert sum(sizes[key] for key in shapes if neck in key) == 6_949_632
    heads = [key for key in tracker if "sam_mask_decoder." in key]
    assert (len(heads), sum(sizes[key] for key in heads)) == (256, 8_309_097)
    memory = [key for key in tracker if ".maskmem_backbone." in key]
    assert (len(memory), sum(sizes[key] for key in memory)) == (38, 3_931_120)


def test_sam_31_is_read_at_its_full_names_and_shapes(tmp_path: Path) -> None:
    """1623 tensors, each one number that is seen as many."""
    model = build_model(load_model_config("sam3"), device="meta").state_dict()
    shapes = {
        f"detector.{key}": (value.shape, value.dtype)
        for key, value in model.items()
        if not key.startswith(published.DROPPED)
    }
    shapes |= {key: (torch.Size(shape), torch.float32) for key, shape in sam31_beside().items()}
    assert len(shapes) == 1623
    state = {
        key: torch.zeros(1, dtype=dtype).expand(shape) for key, (shape, dtype) in shapes.items()
    }
    torch.save(state, tmp_path / "sam3.1_multiplex.pt")
    assert weights.describe(tmp_path / "sam3.1_multiplex.pt").model.name == "sam3"
    origin = weights.origin(tmp_path / "sam3.1_multiplex.pt")
    assert origin is not None
    assert origin.layout == "3.1"
    part = published.image_part(state)
    assert part.keys() == {key for key in model if not key.endswith(published.COMPUTED)}
    assert all(part[key].shape == model[key].shape for key in part)
    # renamed tables are computed too; another missing tensor is asked for
    table = "detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"
    renamed = {f"{table}_real" if key == table else key: value for key, value in state.items()}
    assert published.image_part(renamed).keys() == part.keys()
    del state["detector.backbone.vision_backbone.convs.2.conv_1x1.bias"]
    torch.save(state, tmp_path / "sam3.1_multiplex.pt")
    with pytest.raises(UserError, match=r"convs\.2\.conv_1x1\.bias: not in the file"):
        weights.describe(tmp_path / "sam3.1_multiplex.pt", size="sam3")


def test_releases_are_told_apart() -> None:
    neck = "detector.backbone.vision_backbone"
    assert published.release(["tracker.a", f"{neck}.sam2_convs.0.conv_1x1.bias"]) == "3.0"
    assert published.release(["tracker.model.a", f"{neck}.propagation_convs.0.bias"]) == "3.1"
    assert published.release(["detector.transformer.x"]) is None
    assert published.release([]) is None
