"""`compact`: what matters is measured, and stays; each step says what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from app.compression.compaction import unlabelled
from app.compression.cut import DART, LAYERS
from app.compression.goal import parse_blocks
from app.compression.importance import Measure, Width, choose_layers, choose_queries, most, only
from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.errors import UserError
from app.inference.inputs import find_images
from app.model import weights
from app.model.build import build_model
from tests.helpers import TINY, Command


@pytest.fixture
def config() -> Config:
    return load_config([*TINY, "transforms=none"])


@pytest.fixture
def model(config: Config) -> Any:
    torch.manual_seed(0)
    return build_model(config.model, matcher=instantiate(config.loss.matcher))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of weights of nano's shapes, as if trained on the shapes."""
    size = load_config(TINY).model
    header = weights.Header(model=size, prompts=["circle", "rectangle", "triangle"])
    torch.manual_seed(0)
    return weights.save(build_model(size), tmp_path_factory.mktemp("nano"), header).parent


def _measure(
    config: Config, model: Any, shapes: Path, *, labelled: bool, cache: Path | None = None
) -> Measure:
    splits = load_splits(shapes)
    images = splits.train
    if not labelled:
        paths = find_images(str(images.images[0].path.parent))
        images = unlabelled(paths, splits.train.class_names)
    return Measure(config, model, images, torch.float32, cache)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_layer_that_does_nothing_is_not_missed(
    config: Config, model: Any, shapes: Path, labelled: bool
) -> None:
    trunk: Any = model.backbone.vision_backbone.trunk
    with torch.no_grad():
        for part in (trunk.blocks[0].attn.proj, trunk.blocks[0].mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
    measure = _measure(config, model, shapes, labelled=labelled)
    whole = measure.mean_loss(model)
    with only(model, "blocks", (1, 2, 3)):
        assert measure.mean_loss(model) == pytest.approx(whole, rel=1e-5, abs=1e-6)
    with only(model, "blocks", (0, 1, 3)):
        assert measure.mean_loss(model) != pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert len(trunk.blocks) == 4
    assert trunk.full_attn_ids == [1, 3]
    if not labelled:
        assert whole < 1e-3  # it answers as it did
        assert choose_layers(model, config.model, "blocks", 3, measure) == (1, 2, 3)


@pytest.mark.parametrize("name", ["text_layers", "encoder_layers", "decoder_layers"])
def test_layers_of_each_kind(config: Config, model: Any, shapes: Path, name: str) -> None:
    """Chosen by the loss itself: the least, of all that could go; the trunk looks once."""
    measure = _measure(config, model, shapes, labelled=True)
    count = len(model.get_submodule(LAYERS[name]))
    losses = {}
    for index in range(count):
        with only(model, name, [i for i in range(count) if i != index]):
            losses[index] = measure.mean_loss(model)
    looked: list[int] = []
    trunk = model.backbone.vision_backbone.trunk
    trunk.blocks[0].register_forward_hook(lambda *_: looked.append(1))
    kept = choose_layers(model, config.model, name, count - 1, measure)
    assert {*range(count)} - {*kept} == {min(losses, key=losses.__getitem__)}
    assert len(looked) == len(measure.batches)
    assert "forward" not in vars(trunk)


def test_what_was_measured_is_not_measured_again(
    config: Config, model: Any, shapes: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.json"
    measure = _measure(config, model, shapes, labelled=True, cache=cache)
    kept = choose_layers(model, config.model, "decoder_layers", 1, measure)
    known = json.loads(cache.read_text(encoding="utf-8"))
    assert len(known) == 3 + 2
    again = _measure(config, model, shapes, labelled=True, cache=cache)
    again.losses = None  # type: ignore[assignment, method-assign]  # it cannot measure
    assert choose_layers(model, config.model, "decoder_layers", 1, again) == kept


def test_taylor_is_what_the_loss_loses_by_a_unit(config: Config, model: Any, shapes: Path) -> None:
    """Against a slow plain version: each unit's part by finite differences of its gate."""
    measure = _measure(config, model, shapes, labelled=True)
    measure.batches = measure.batches[:1]
    importance = Width(model, measure, "taylor").hidden[2]
    act = model.backbone.vision_backbone.trunk.blocks[2].mlp.act
    for unit in importance.topk(3).indices.tolist():
        losses = []
        for change in (0.05, -0.05):
            gate = torch.ones(512).index_fill(0, torch.tensor([unit]), 1 + change)
            hook = act.register_forward_hook(lambda _m, _i, out, gate=gate: out * gate)
            losses.append(measure.mean_loss(model))
            hook.remove()
        slope = (losses[0] - losses[1]) / 0.1
        assert float(importance[unit]) == pytest.approx(slope**2, rel=0.1)


@pytest.mark.parametrize("by", ["taylor", "activation"])
def test_units_and_heads_that_say_nothing_go(
    config: Config, model: Any, shapes: Path, by: Any
) -> None:
    block: Any = model.backbone.vision_backbone.trunk.blocks[1]
    with torch.no_grad():
        block.mlp.fc2.weight[:, 100:] = 0
        block.attn.proj.weight[:, 32:64] = 0
    width = Width(model, _measure(config, model, shapes, labelled=by == "taylor"), by)
    assert most(width.hidden[1], 100).tolist() == list(range(100))
    assert most(width.heads[1], 3).tolist() == [0, 2, 3]
    assert all(p.requires_grad for p in model.parameters())
    assert not block.mlp.act._forward_hooks


def test_queries_that_find_most_stay(config: Config, model: Any, shapes: Path) -> None:
    measure = _measure(config, model, shapes, labelled=False)
    kept = choose_queries(model, 4, measure)
    assert len(kept) == 4
    assert list(kept) == sorted(kept)


def test_blocks_by_hand() -> None:
    assert parse_blocks("5, 10,17-19", 32) == (5, 10, 17, 18, 19)
    assert parse_blocks("dart", 32) == DART
    for text, said in (("5,x", "give numbers"), ("30-33", "not 32, 33"), ("-2", "give numbers")):
        with pytest.raises(UserError, match=said):
            parse_blocks(text, 32)


def test_weights_are_cut_down_step_by_step(
    shapes: Path, nano: Path, tmp_path: Path, command: Command
) -> None:
    start, folder = nano, tmp_path / "small"
    words = ("compact", start, "--output-dir", folder, "--dataset-dir", shapes)
    done = command(
        *words,
        *("--blocks", "2", "--decoder-layers", "2", "--queries", "8", "--mlp", "0.5"),
        *("--heads", "2", "--vocabulary", "classes", "evaluation.off_prompts=0"),
    )
    assert done.code == 0, done.err
    header = weights.read_header(folder)
    assert header is not None
    vision = header.model.vision
    assert (vision.depth, vision.global_blocks, header.model.vision.mlp_units, vision.heads) == (
        2,
        [0, 1],
        256,
        2,
    )
    assert (header.model.decoder_layers, header.model.num_queries) == (2, 8)
    assert header.model.name == "nano-cut"
    assert header.prompts == load_splits(shapes).train.class_names
    report = json.loads((folder / "compact.json").read_text(encoding="utf-8"))
    steps = report["steps"]
    assert [step["step"] for step in steps] == [
        *("whole", "blocks", "decoder_layers", "queries", "width (taylor)", "vocabulary"),
    ]
    totals = [step["parameters"]["total"] for step in steps]
    assert totals == sorted(totals, reverse=True)
    assert steps[1]["removed"] == "0, 2"
    assert all("segm/AP" in step["figures"] for step in steps)
    assert steps[-1]["flops"] < steps[0]["flops"]
    assert "box AP" in done.out
    model, _ = weights.load(folder)
    assert totals[-1] == sum(p.numel() for p in model.parameters())

    done = command(*words, "--blocks", "2")
    assert done.code == 2
    assert "--overwrite" in done.err
    done = command(
        *("evaluate", "--checkpoint", folder, "--dataset-dir", shapes, "--output-dir"),
        tmp_path / "eval",
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Nothing to remove"),
        (("--blocks", "3"), "give --dataset-dir DIR (with labels) or --images"),
        (("--blocks", "9"), "--blocks 9: these weights have 4"),
        (("--blocks", "1", "--images", "."), "at least 2 stay"),
        (("--remove-blocks", "1"), "blocks 1: have global attention and must stay"),
        (("--remove-blocks", "0", "--blocks", "2"), "give one of them"),
        (("--mlp", "0", "--heads", "7"), "--mlp 0: is the share"),
        (("--to", "small"), "has other widths than these weights"),
        (("--width", "magic", "--mlp", "0.5"), "give one of taylor, activation, svd"),
        (("--width", "svd", "--heads", "2", "--images", "."), "heads cannot be projected"),
    ],
)
def test_goals_that_cannot_be(
    words: tuple[str, ...],
    said: str,
    shapes: Path,
    nano: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    images = load_splits(shapes).train.images[0].path
    words = tuple(str(images) if word == "." else word for word in words)
    start = nano
    done = command("compact", start, "--output-dir", tmp_path / "out", *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out" / weights.FILE).exists()


def test_a_projection_is_made_and_loaded(nano: Path, tmp_path: Path, command: Command) -> None:
    start = nano
    words = ("--output-dir", tmp_path / "svd", "--mlp", "0.25", "--width", "svd")
    done = command("compact", start, *words)
    assert done.code == 0, done.err
    model, header = weights.load(tmp_path / "svd")
    assert header.model.vision.mlp_units == 128
    assert model.backbone.vision_backbone.trunk.blocks[0].mlp.fc1.weight.shape == (128, 128)
