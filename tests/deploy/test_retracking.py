"""A tracker's neck that learns to see through a tuned trunk, of a small size and random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Sam3VideoModel

from app.datasets.synthetic.shapes import make_shapes
from app.deploy import transformers_folder, upstream_file
from app.deploy.base_file import NECK
from app.deploy.retracking import retrack
from app.errors import UserError
from app.model import weights
from app.model.build import build_model
from tests.model.published import SMALL, build_small, write_sam3


@pytest.fixture(scope="module", autouse=True)
def _small_builders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        build_small(patch)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images") / "set"
    make_shapes(folder, train=12, valid=1, fog=0, width=96, height=72, seed=5)
    return sorted((folder / "train").rglob("*.png"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sam3.pt`, and weights of it whose trunk was tuned."""
    folder = tmp_path_factory.mktemp("sam3")
    write_sam3(folder / "sam3.pt")
    model = build_model(SMALL)
    weights.load_into(model, folder / "sam3.pt", merge=False)
    origin = weights.origin(folder / "sam3.pt")
    header = weights.Header(model=SMALL, prompts=["circle"], threshold=0.25, base=origin)
    weights.save(model, folder / "same", header)
    torch.manual_seed(3)
    trunk = model.backbone.vision_backbone.trunk
    with torch.no_grad():
        for parameter in trunk.blocks.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std(unbiased=False))
    weights.save(model, folder / "tuned", header)
    return folder


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base / "tuned", tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.slow
def test_the_neck_learns_and_exports_take_it(
    command, base: Path, tuned: Path, images: list[Path], tmp_path: Path
) -> None:
    seen = upstream_file.export(tuned, tmp_path / "old")["tracker_features_cosine"]
    done = command(
        *("retrack", tuned, "--images", images[0].parent, "--updates", 80, "--device", "cpu"),
        *("--base", base / "sam3.pt"),
    )
    assert done.code == 0, done.err
    assert "the tracker's features have a cosine of" in done.out
    record = upstream_file.export(tuned, tmp_path / "new")
    assert record["build_sam3_video_model"]
    now = record["tracker_features_cosine"]
    assert now > seen + 0.5 * (1 - seen)  # half of what was lost, on other images
    neck = load_file(tuned / NECK)
    assert len(neck) == 22
    written = load_file(tmp_path / "new" / "sam3.safetensors")
    before = load_file(tmp_path / "old" / "sam3.safetensors")
    changed = {key for key in written if not torch.equal(written[key], before[key])}
    assert changed == {key for key in neck if not torch.equal(neck[key], before[key])}
    assert all(torch.equal(written[key], value) for key, value in neck.items())
    assert len(changed) > 10

    transformers_folder.export(tuned, tmp_path / "hf", video=True)
    theirs = Sam3VideoModel.from_pretrained(tmp_path / "hf").state_dict()
    values = [value for key, value in theirs.items() if key.startswith("tracker_neck.")]
    ours = neck["detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.weight"]
    assert any(value.shape == ours.shape and torch.equal(value, ours) for value in values)


def test_what_cannot_be_retracked(
    base: Path, tuned: Path, images: list[Path], tmp_path: Path
) -> None:
    file = base / "sam3.pt"
    with pytest.raises(UserError, match="the trunk is the base's"):
        retrack(base / "same", images[:3], base_file=file, device="cpu")
    with pytest.raises(UserError, match="two images or more"):
        retrack(tuned, images[:1], base_file=file, device="cpu")
    made = retrack(tuned, images[:3], base_file=file, updates=2, device="cpu")
    assert made.file == tuned / NECK
    with pytest.raises(UserError, match=f"holds {NECK} already"):
        retrack(tuned, images[:3], base_file=file, device="cpu")
    model, header = weights.load(tuned)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    weights.save(model, tuned, header)  # as a run does that goes on
    with pytest.raises(UserError, match="was taught for other weights"):
        upstream_file.export(tuned, tmp_path / "out", base_file=file)
