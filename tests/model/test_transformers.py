"""Keys and `config.json` beside transformers' own; folders of its making are read strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Sam3Config, Sam3Model, Sam3VideoConfig, Sam3VideoModel

from app.config.compose import load_config, load_model_config
from app.config.schema import ModelConfig
from app.errors import UserError
from app.files import flatten
from app.model import weights
from app.model.build import build_model
from app.model.transformers.config import read_config, to_config
from app.model.transformers.state import from_transformers, to_transformers
from tests.helpers import TINY
from tests.model.outputs import raw_outputs

CONFIG = load_config(TINY).model
PUBLISHED = ["sam3", "small", "small-text", "nano"]
ZEROED = ("geometry_encoder.points_", "backbone.vision_backbone.trunk.pos_embed")


def _theirs(config: ModelConfig = CONFIG) -> Sam3Model:
    return Sam3Model(Sam3Config.from_dict(to_config(config)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights as `Sam3Model.save_pretrained` writes them, without a header of ours."""
    path = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(3)
    _theirs().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_those_of_sam3model(name: str) -> None:
    config = load_model_config(name)
    state = build_model(config, device="meta").state_dict()
    ours = to_transformers(
        {key: value for key, value in state.items() if not key.endswith(weights.COMPUTED)}
    )
    with torch.device("meta"):
        theirs = _theirs(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_published_size_is_what_transformers_takes_by_default() -> None:
    defaults = flatten(Sam3Config().to_dict())
    ours = flatten(to_config(load_model_config("sam3")))
    others = {key for key, value in ours.items() if value != defaults.get(key)}
    epsilon = "vision_config.backbone_config.layer_norm_eps"
    assert others == {"architectures", "dtype", epsilon}
    assert (ours[epsilon], defaults[epsilon]) == (1e-5, 1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_is_read_back_at_its_resolution(name: str, tmp_path: Path) -> None:
    size = load_model_config(name)
    size = size.model_copy(update={"resolution": size.resolution + 2 * size.vision.patch_size})
    Sam3Config.from_dict(to_config(size)).save_pretrained(tmp_path)
    assert read_config(tmp_path) == size


def test_the_published_folder_is_of_size_sam3(tmp_path: Path) -> None:
    Sam3VideoConfig().save_pretrained(tmp_path)
    assert read_config(tmp_path) == load_model_config("sam3")


def test_a_folder_of_transformers_loads_and_keeps_every_tensor(folder: Path) -> None:
    model, header = weights.load(folder)
    assert header == weights.Header(
        model=load_model_config("nano").model_copy(update={"resolution": CONFIG.resolution})
    )
    back = to_transformers(weights.to_state(model))
    stored = load_file(folder / "model.safetensors")
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], stored[key]) for key in stored)
    state = weights.to_state(model)
    assert not any(state[key].any() for key in state if key.startswith(ZEROED[0]))
    assert not state[ZEROED[1]][:, 0].any()


def test_what_comes_back_as_zeros_is_read_by_no_prompt() -> None:
    torch.manual_seed(5)
    model = build_model(CONFIG).eval()
    state = weights.to_state(model)
    back = from_transformers(to_transformers(state))
    assert {key for key in state if not torch.equal(state[key], back[key])} == {
        key for key in state if key.startswith(ZEROED)
    }
    before = raw_outputs(model)
    model.load_state_dict(back, strict=False)
    after = raw_outputs(model)
    for key in ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks"):
        assert torch.equal(before[key], after[key]), key


def test_the_detector_of_a_published_layout_is_taken(tmp_path: Path) -> None:
    """facebook/sam3: `detector_model.` beside a tracker; written by transformers itself."""
    detector = to_config(CONFIG)
    tracker = {
        "vision_config": detector["vision_config"],
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64,
    }
    torch.manual_seed(3)
    video = Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker))
    video.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        parts = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert parts == {"detector_model", "tracker_model", "tracker_neck"}
    model, header = weights.load(tmp_path)
    assert (header.model.name, header.model.resolution) == ("nano", CONFIG.resolution)
    theirs = video.detector_model.state_dict()
    ours = to_transformers(weights.to_state(model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _without_value(state: dict[str, torch.Tensor]) -> None:
    del state["detr_encoder.layers.0.self_attn.v_proj.weight"]


def _unknown(state: dict[str, torch.Tensor]) -> None:
    state["detr_encoder.layers.0.extra"] = torch.zeros(1)


def _other_shapes(state: dict[str, torch.Tensor]) -> None:
    state["detr_encoder.layers.0.self_attn.v_proj.weight"] = torch.zeros(3)
    state["vision_encoder.backbone.embeddings.position_embeddings"] = torch.zeros(())
    state["text_encoder.text_projection.weight"] = torch.zeros(2)
    state["geometry_encoder.final_proj.weight"] = torch.zeros(5)


def _scalars(state: dict[str, torch.Tensor]) -> None:
    for letter in "qkv":
        state[f"detr_encoder.layers.0.self_attn.{letter}_proj.bias"] = torch.zeros(())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_scalars, r"encoder.layers.0.self_attn.in_proj_bias: not in the file"),
        (_without_value, r"encoder.layers.0.self_attn.in_proj_weight: not in the file"),
        (_without_value, r"detr_encoder.layers.0.self_attn.q_proj.weight: not in the model"),
        (_unknown, r"detr_encoder.layers.0.extra: not in the model"),
        (_other_shapes, r"trunk.pos_embed: shape \(\) in the file"),
        (_other_shapes, r"geometry_encoder.points_direct_project.weight: not in the file"),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors")
    with pytest.raises(UserError, match=said):
        weights.load(copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json: no such file"),
        ("{", "config.json: broken JSON at line 1"),
        ("[]", "config.json: model_type is None"),
        ('{"model_type": "clip"}', "model_type is 'clip'; weights of SAM 3 have 'sam3'"),
        ('{"model_type": "sam3_lite_text"}', "model_type is 'sam3_lite_text'"),
        ('{"model_type": "sam3_video", "detector_config": 3}', "with a detector_config"),
        (
            '{"model_type": "sam3", "detr_encoder_config": {"num_layers": 7}}',
            r"is of none of the sizes .*\n  detr_encoder_config.num_layers: 7, where 'sam3' has 6",
        ),
        (
            '{"model_type": "sam3", "vision_config": {"backbone_config": {"image_size": 1000}}}',
            "vision_config.backbone_config.image_size: 1000, where 'sam3' has 1008",
        ),
        (
            '{"model_type": "sam3", "vision_config": {"backbone_config": {"image_size": 0}}}',
            "image_size: resolution: Input should be greater than 0",
        ),
    ],
)
def test_a_config_that_is_none_of_ours_is_refused(
    copy: Path, content: str | None, said: str
) -> None:
    if content is None:
        (copy / "config.json").unlink()
    else:
        (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        weights.describe(copy)
    assert str(copy) in str(caught.value)


def test_another_size_than_expected_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="size 'nano', not 'sam3'"):
        weights.load(folder, size="sam3")


def test_all_that_transformers_cannot_be_told_is_said_at_once() -> None:
    changed = CONFIG.model_dump() | {"segmentation": False, "vocabulary": ["circle"]}
    changed["vision"] |= {"heads": 2}
    changed["text"] |= {"context_length": 16}
    with pytest.raises(UserError) as caught:
        to_config(ModelConfig.model_validate(changed))
    problems = caught.value.problems
    assert [problem.partition(":")[0] for problem in problems] == [
        "vocabulary",
        "vision.heads",
        "segmentation",
        "text.context_length",
    ]
    assert all("Export" in problem for problem in problems)
    assert "the weights that this vocabulary was made from" in problems[0]
