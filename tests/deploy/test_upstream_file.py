"""What is exported as `sam3.pt` is loaded by upstream's own code, and answers as ours does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sam3 import model_builder
from sam3.model.sam3_image_processor import Sam3Processor
from transformers import Sam3VideoModel

from app.config.compose import load_config, load_model_config
from app.config.schema import LoraConfig
from app.deploy import base_file, transformers_folder, upstream_file, upstream_proof
from app.deploy.upstream_file import export
from app.errors import UserError
from app.files import hash_file
from app.inference.predictor import Predictor, normalise
from app.model import adapters, published, weights
from app.model.build import build_model
from app.model.bundled import NANO
from app.model.upstream import fixes, pin
from tests.deploy.page import BLOCKS, COMMANDS, lines_of, run_documented
from tests.helpers import Command, finish, log_lines
from tests.model.published import (
    SMALL,
    build_small,
    sam31,
    sam31_beside,
    video_model,
    write_sam3,
)

TUNED = "backbone.vision_backbone.trunk.blocks.0.mlp.fc1.weight"
SIDE = SMALL.resolution

FULL = {
    name: getattr(model_builder, name)
    for name in (
        *("_create_vit_backbone", "_create_text_encoder", "TransformerEncoderFusion"),
        *("SequenceGeometryEncoder", "TransformerDecoder"),
    )
}


@pytest.fixture(scope="module", autouse=True)
def _small_builders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        build_small(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sam3.pt`, weights tuned from it, their trunk too, and what they are exported to."""
    folder = tmp_path_factory.mktemp("sam3")
    write_sam3(folder / "sam3.pt")
    model = build_model(SMALL)
    weights.load_into(model, folder / "sam3.pt", merge=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for name in (TUNED, "dot_prod_scoring.hs_proj.bias"):
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn_like(parameter) * 0.05)
    base = weights.origin(folder / "sam3.pt")
    header = weights.Header(model=SMALL, prompts=["red circle"], threshold=0.25, base=base)
    weights.save(model, folder / "tuned", header)
    weights.save(model, folder / "old", header.model_copy(update={"base": None}))
    run_documented("export last --format sam3", folder / "tuned", folder / "out")
    return folder


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.effect_noise((90, 60), 80).convert("RGB")


def test_the_tracker_is_the_bases_and_the_image_part_ours(folder: Path) -> None:
    written = torch.load(folder / "out" / "sam3.pt", weights_only=True)
    base = torch.load(folder / "sam3.pt", weights_only=True)
    ours = load_file(folder / "tuned" / "model.safetensors")
    assert list(written) == list(base)
    parts = {"tracker": 0, "neck": 0, "rope": 0, "image": 0}
    for key, value in written.items():
        name = key.removeprefix("detector.")
        kind = "tracker" if key.startswith("tracker.") else "image"
        kind = "neck" if ".sam2_convs." in key else "rope" if key.endswith("freqs_cis") else kind
        assert torch.equal(value, ours[name] if kind == "image" else base[key]), key
        parts[kind] += 1
    assert parts == {"tracker": 309, "neck": 22, "rope": SMALL.vision.depth, "image": len(ours)}
    changed = [key for key in base if not torch.equal(base[key], written[key])]
    assert changed == [f"detector.{TUNED}", "detector.dot_prod_scoring.hs_proj.bias"]
    other = load_file(folder / "out" / "sam3.safetensors")
    assert other.keys() == written.keys()
    assert all(torch.equal(other[key], value) for key, value in written.items())


def test_upstreams_strict_video_builder_loads_it(folder: Path) -> None:
    """As a user would call it: in memory, by its own `torch.load`."""
    file = folder / "out" / "sam3.pt"
    with fixes.leaving_autocast():
        model = model_builder.build_sam3_video_model(
            str(file), load_from_HF=False, bpe_path=str(pin.bpe_path()), device="cpu"
        )
    written = torch.load(file, weights_only=True)
    loaded = model.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], value) for key, value in written.items())
    assert not torch.is_autocast_enabled("cuda")  # which upstream's tracker enters and never leaves


def test_upstreams_image_builder_answers_as_the_predictor(folder: Path, image: Image.Image) -> None:
    model = model_builder.build_sam3_image_model(
        str(pin.bpe_path()), checkpoint_path=str(folder / "out" / "sam3.pt"), device="cpu"
    )
    processor = Sam3Processor(model, SIDE, device="cpu", confidence_threshold=0)
    theirs = processor.set_text_prompt("red circle", processor.set_image(image))
    ours = Predictor.load(folder / "tuned", device="cpu").predict(
        image, ["red circle"], threshold=0
    )
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert len(ours) == len(order) == SMALL.num_queries
    size = torch.tensor([image.width, image.height] * 2)
    boxes = torch.minimum(theirs["boxes"][order].clamp(min=0), size)
    assert np.allclose(ours.scores, theirs["scores"][order], atol=1e-6)
    assert np.allclose(ours.boxes_xyxy, boxes, atol=1e-4)


def test_what_was_proved_is_told(folder: Path, image: Image.Image) -> None:
    record = json.loads((folder / "out" / "export.json").read_text())
    assert (record["build_sam3_image_model"], record["build_sam3_video_model"]) == (True, True)
    assert record["base_proved"]
    assert record["base"]["layout"] == "3.0"
    assert max(record["answers_differ_by"].values()) < 1e-6
    assert set(record["answers_differ_by"]) == {"scores", "boxes", "masks"}
    card = (folder / "out" / "README.md").read_text()
    assert f"{record['base']['sha256']}" in card
    assert "license: other" in card
    assert "SAM License" in card
    assert "“red circle”" in card
    assert "confidence_threshold=0.25" in card
    assert f"cosine of {record['tracker_features_cosine']:.4f}" in card


def test_how_far_the_tracker_is_moved_is_what_upstreams_neck_gives(folder: Path) -> None:
    """By upstream's own forward pass of both video models, trunk and neck in one."""
    record = json.loads((folder / "out" / "export.json").read_text())
    seen = []
    for file in (folder / "sam3.pt", folder / "out" / "sam3.pt"):
        model = video_model()
        model.load_state_dict(torch.load(file, weights_only=True))
        backbone = model.detector.backbone.eval()
        levels = []
        for seed in range(upstream_file.GOLDEN):
            image = upstream_file.draw_test_image(seed).resize((SIDE, SIDE), Image.BILINEAR)
            pixels = normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            with torch.inference_mode():
                features = backbone.forward_image(pixels)["sam2_backbone_out"]["backbone_fpn"]
            levels += [level.flatten() for level in features]
        seen.append(levels)
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*seen, strict=True)]
    assert len(cosines) == 3 * upstream_file.GOLDEN
    assert record["tracker_features_cosine"] == pytest.approx(min(cosines), abs=2e-3)
    assert 0.5 < min(cosines) < 0.9999


def test_it_is_read_back_with_its_classes(folder: Path) -> None:
    model, header = weights.load(folder / "out" / "sam3.safetensors")
    assert (header.prompts, header.threshold) == (["red circle"], 0.25)
    ours = load_file(folder / "tuned" / "model.safetensors")
    assert all(torch.equal(value, ours[key]) for key, value in weights.to_state(model).items())


def test_an_adapter_leaves_merged_and_rounded(folder: Path, tmp_path: Path) -> None:
    """Its base was tuned itself: the published file is the one that those weights began as."""
    lora = load_config(["method=lora"]).method.lora
    assert isinstance(lora, LoraConfig)
    model, header = weights.load(folder / "tuned")
    adapters.apply_lora(model, lora, weights.base_reference(folder / "tuned" / weights.FILE))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    header = header.model_copy(update={"base": None})  # as adapters of before had it
    weights.save(model, tmp_path / "adapter", header)
    record = export(tmp_path / "adapter", tmp_path / "out", precision="fp16")
    adapters.merge_lora(model)
    written = load_file(tmp_path / "out" / "sam3.safetensors")
    for key, value in weights.to_state(model).items():
        assert torch.equal(written[f"detector.{key}"], value.half()), key
    assert written["tracker.no_mem_embed"].dtype == torch.float16
    table = "detector.backbone.vision_backbone.trunk.blocks.1.attn.freqs_cis"
    assert written[table].is_complex()
    assert record["base"]["sha256"] == hash_file(folder / "sam3.pt")
    assert record["build_sam3_video_model"]
    assert 0 < record["rounding_moved"]["scores"] < 0.05


def test_without_a_base_the_image_part_alone_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = log_lines(monkeypatch)
    record = export(NANO, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "sam3.pt", weights_only=True)
    assert {key.split(".")[0] for key in written} == {"detector"}
    assert {key for key in written if not key.endswith("freqs_cis")} == {
        f"detector.{key}" for key in load_file(NANO / "model.safetensors")
    }
    assert not record["build_sam3_image_model"]
    assert any("no builder of upstream's makes size 'nano'" in line for line in lines)
    assert any("the image part alone" in line and "--base" in line for line in lines)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card


def test_weights_of_metas_size_without_a_base_are_upstreams_image_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = log_lines(monkeypatch)
    record = export(folder / "old", tmp_path / "out")
    assert (record["build_sam3_image_model"], record["build_sam3_video_model"]) == (True, False)
    assert (record["base"], record["tracker_features_cosine"]) == (None, None)
    written = torch.load(tmp_path / "out" / "sam3.pt", weights_only=True)
    assert {key.split(".")[0] for key in written} == {"detector"}
    assert any("upstream's build_sam3_image_model loads it" in line for line in lines)
    assert any("which wants a tracker, does not load it" in line for line in lines)


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "sam3.pt", weights_only=True)
    state["tracker.no_mem_embed"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is another file than these weights began as"):
        export(folder / "tuned", tmp_path / "out", base_file=tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"is no file that Meta published: it has no tracker"):
        export(folder / "tuned", tmp_path / "out", base_file=NANO)
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_moved_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, header = weights.load(folder / "tuned")
    assert header.base is not None
    gone = header.base.model_copy(update={"reference": str(tmp_path / "gone.pt")})
    weights.save(model, tmp_path / "tuned", header.model_copy(update={"base": gone}))
    source = tmp_path / "tuned" / "model.safetensors"
    with pytest.raises(UserError, match=r"there is no .*gone.pt[\s\S]*name them: --base FILE"):
        base_file.find_base(source, None)
    named = base_file.find_base(source, folder / "sam3.pt")
    monkeypatch.setenv("SAM3_BASE", str(folder / "sam3.pt"))
    found = base_file.find_base(source, None)
    assert named is not None
    assert found is not None
    assert named.is_proved
    assert found.is_proved
    assert named.file == found.file == folder / "sam3.pt"


def test_a_base_that_nothing_proves_is_taken_at_the_users_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = log_lines(monkeypatch)
    found = base_file.find_base(folder / "old" / "model.safetensors", folder / "sam3.pt")
    assert found is not None
    assert not found.is_proved
    assert "taken at your word" in lines[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("renamed", r"is no base of these weights:\n  dot_prod_scoring.hs_proj.bias: not in the"),
        ("shape", r"no base of these weights:\n  dot_prod_scoring.hs_proj.bias: shape \(256,\)"),
        ("tracker", r"no base of these weights:\n  tracker.no_mem_embed: not in the base\n  track"),
        ("cut", "not a checkpoint that can be read safely"),
    ],
)
def test_a_base_that_does_not_fit_is_one_message(
    folder: Path, tmp_path: Path, change: str, told: str
) -> None:
    state = torch.load(folder / "sam3.pt", weights_only=True)
    key = "detector.dot_prod_scoring.hs_proj.bias"
    if change == "renamed":
        state["detector.dot_prod_scoring.hs_proj.offset"] = state.pop(key)
    elif change == "tracker":
        state["tracker.no_memory"] = state.pop("tracker.no_mem_embed")
    elif change == "shape":
        state[key] = state[key][:-1].clone()
    torch.save(state, tmp_path / "base.pt")
    if change == "cut":
        whole = (tmp_path / "base.pt").read_bytes()
        (tmp_path / "base.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=told):
        export(folder / "old", tmp_path / "out", base_file=tmp_path / "base.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["base.pt"]


def test_weights_that_are_cut_or_renamed_are_one_message(tmp_path: Path) -> None:
    """Of each layout, before anything is written."""
    nano, key = load_file(NANO / "model.safetensors"), "dot_prod_scoring.hs_proj.bias"
    renamed = {name.replace(key, "dot_prod_scoring.offset"): value for name, value in nano.items()}
    header = weights.read_header(NANO)
    assert header is not None

    def write(state: dict[str, torch.Tensor]) -> list[Path]:
        files = [tmp_path / name for name in ("ours.safetensors", "sam3.pt", "checkpoint.pt")]
        save_file(state, files[0], weights.to_metadata(header))
        torch.save({f"detector.{name}": value for name, value in state.items()}, files[1])
        torch.save({"model": state, "optimizer": {}, "epoch": 2}, files[2])
        return files

    for file in write(renamed):
        with pytest.raises(UserError) as raised:
            export(file, tmp_path / "out")
        lines = "\n".join(raised.value.problems)
        assert file.name in lines
        assert f"  {key}: not in the file\n  dot_prod_scoring.offset: not in the model" in lines
    for file in write(nano):
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
        with pytest.raises(UserError) as raised:
            export(file, tmp_path / "out")
        assert len(raised.value.problems) == 1
        assert file.name in raised.value.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_file_that_lost_a_bit_is_not_left(folder: Path) -> None:
    content = weights.read_tensors(folder / "out" / "sam3.pt")
    upstream_proof.check_tensors(folder / "out" / "sam3.safetensors", content)
    other = content | {"tracker.no_mem_embed": content["tracker.no_mem_embed"] + 1}
    with pytest.raises(UserError, match=r"tracker.no_mem_embed, of 1 tensors, is not in the file"):
        upstream_proof.check_tensors(folder / "out" / "sam3.pt", other)
    with pytest.raises(UserError, match="leaves 1 tensors as they were made, first"):
        key = "detector.dot_prod_scoring.hs_proj.bias"
        upstream_proof.load_image_model(
            folder / "out" / "sam3.pt", content | {key: content[key] + 1}
        )
    with pytest.raises(UserError, match=r"scores differ by nan"):
        upstream_proof.check_answers({"scores": float("nan"), "boxes": 0})


def test_flags_and_folders_that_do_not_go_together(
    folder: Path, tmp_path: Path, command: Command
) -> None:
    words = ["export", folder / "tuned", "--output", folder / "out"]
    done = command(*words, "--format", "sam3")
    assert done.code == 2
    assert "holds an exported model" in done.err
    for given, said in (
        (["sam3", "--precision", "int8"], "takes fp32, bf16 or fp16"),
        (["sam3", "--top", "3"], "--top: nothing reads it beside --format sam3"),
        (["hf", "--base", "x"], "--base: nothing reads it beside --format hf"),
        (["onnx", "--base", "x"], "--base: nothing reads it beside --format onnx"),
    ):
        words = ["export", folder / "tuned", "--output", tmp_path / "o", "--format", *given]
        done = command(*words)
        assert done.code == 2
        assert said in " ".join(done.err.split()), done.err


def test_sam_31_is_written_back_in_its_own_layout(folder: Path, tmp_path: Path) -> None:
    """Its tracker as it was, no fourth level, and the answers of the weights."""
    tuned, header = weights.load(folder / "tuned")
    beside = {
        key: (shape if len(shape) < 2 or "vision" not in key else _narrow(shape))
        for key, shape in sam31_beside().items()
    }
    base = sam31(tuned.state_dict(), beside)
    base["detector.dot_prod_scoring.hs_proj.bias"] = torch.zeros(256)  # tuned since
    torch.save(base, tmp_path / "sam3.1_multiplex.pt")
    origin = weights.origin(tmp_path / "sam3.1_multiplex.pt")
    weights.save(tuned, tmp_path / "tuned", header.model_copy(update={"base": origin}))
    record = export(tmp_path / "tuned", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "sam3.pt", weights_only=True)
    assert list(written) == list(base)
    changed = [key for key in base if not torch.equal(base[key], written[key])]
    assert changed == ["detector.dot_prod_scoring.hs_proj.bias"]
    assert (record["build_sam3_image_model"], record["build_sam3_video_model"]) == (True, False)
    assert record["tracker_features_cosine"] is None
    assert "Began as SAM 3.1" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match=r"is SAM 3\.1, and transformers' Sam3VideoModel has no"):
        transformers_folder.export(tmp_path / "tuned", tmp_path / "hf", video=True)


def _narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a neck's shape over a trunk of SMALL's width, where Meta's has 1024."""
    share = 1024 // SMALL.vision.embed_dim
    return tuple(n // share if n in (512, 1024) else n for n in shape)


def test_a_run_from_sam_31_says_what_it_began_as(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a published file through training to the header."""
    nano, _ = weights.load(NANO)
    beside = {
        "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.bias": (3,),
        "tracker.model.interactive_sam_mask_decoder.iou_token.weight": (1, 3),
    }
    torch.save(sam31(nano.state_dict(), beside), tmp_path / "sam3.1_multiplex.pt")
    expected = weights.origin(tmp_path / "sam3.1_multiplex.pt")
    assert expected is not None
    assert expected.layout == "3.1"
    flags = ("evaluation.pictures=0", "model.resolution=64", "training.cache_features=false")
    train = ("train", "--dataset-dir", shapes, "--method", "head", "--epochs", 1, *flags)
    finish(*train, "--checkpoint", expected.reference, "--output-dir", tmp_path / "run")
    best = tmp_path / "run" / "weights" / "best"
    header = weights.read_header(best)
    assert header is not None
    assert header.base == weights.origin(best) == expected
    assert "began as SAM 3.1, whose tracker and its necks" in capsys.readouterr().out


def test_at_full_size_names_and_shapes_are_upstreams(tmp_path: Path) -> None:
    """Without its memory: each tensor is one number, seen as many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, original in FULL.items():
            patch.setattr(model_builder, name, original)
        base = {
            key: torch.zeros(1, dtype=value.dtype).expand(value.shape)
            for key, value in video_model(on_meta=True).state_dict().items()
        }
        torch.save(base, tmp_path / "sam3.pt")
        size = load_model_config("sam3")
        state = {
            key: torch.ones(1, dtype=value.dtype).expand(value.shape)
            for key, value in build_model(size, device="meta").state_dict().items()
        }
        found = base_file.find_base(NANO / "model.safetensors", tmp_path / "sam3.pt")
        assert found is not None
        assert found.release == "3.0"
        base_file.check_fit(state, found)
        merged = {k: state.get(published.image_name(k) or "", v) for k, v in base.items()}
        assert sum(int(value.flatten()[0].real) for value in merged.values()) == 1102
        assert upstream_proof.is_built(merged)
        torch.save(merged, tmp_path / "out.pt")
        upstream_proof.load_video_model(tmp_path / "out.pt")
        del merged["tracker.no_mem_embed"]
        torch.save(merged, tmp_path / "out.pt")
        with pytest.raises(UserError, match=r"tracker\.no_mem_embed"):
            upstream_proof.load_video_model(tmp_path / "out.pt")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    """The same weights for transformers' `Sam3VideoModel`."""
    run_documented("export last --format hf --video", folder / "tuned", folder / "hf")
    return folder / "hf"


def test_transformers_video_model_loads_all_of_it(folder: Path, video: Path) -> None:
    loaded: Any = Sam3VideoModel.from_pretrained(video, output_loading_info=True)
    assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, header = weights.load(video)
    tuned, before = weights.load(folder / "tuned")
    assert header == before
    for key, value in weights.to_state(tuned).items():
        if "geometry_encoder.points_" not in key and not key.endswith("trunk.pos_embed"):
            assert torch.equal(ours.get_parameter(key), value), key
    card = (video / "README.md").read_text()
    assert "Sam3VideoModel.from_pretrained" in card


@torch.inference_mode()
def test_transformers_tracker_computes_what_upstreams_does(folder: Path, video: Path) -> None:
    """Each part on the same random numbers: names that were taken for each other would show."""
    upstream: Any = video_model()
    upstream.load_state_dict(torch.load(folder / "out" / "sam3.pt", weights_only=True))
    model: Any = Sam3VideoModel.from_pretrained(video).eval()
    tracker, theirs = upstream.eval().tracker, model.tracker_model
    torch.manual_seed(6)
    side = SIDE // SMALL.vision.patch_size
    width = SMALL.vision.embed_dim

    trunk = torch.randn(1, width, side, side)
    neck = upstream.detector.backbone.vision_backbone.sam2_convs
    for conv, level in zip(neck, model.tracker_neck(trunk)[0], strict=True):
        assert torch.allclose(conv(trunk), level, atol=1e-4)

    pixels, masks = torch.randn(1, 256, 16, 16), torch.randn(1, 1, 256, 256)
    backbone = tracker.maskmem_backbone
    backbone.mask_downsampler.interpol_size = None
    memory = backbone(pixels, masks, skip_mask_sigmoid=True)
    expected = memory["vision_features"]
    assert torch.allclose(theirs.memory_encoder(pixels, masks)[0], expected, atol=1e-4)

    points, labels = torch.rand(1, 3, 2) * SIDE, torch.tensor([[0, 1, -1]])
    prompts = tracker.sam_prompt_encoder
    theirs_encoder = theirs.prompt_encoder
    sparse = theirs_encoder._embed_points(points[None], labels[None], pad=False)[0]
    prompts.input_image_size = (SIDE, SIDE)
    assert torch.allclose(prompts._embed_points(points, labels, pad=False), sparse, atol=1e-4)
    low = torch.randn(1, 1, 4 * side, 4 * side)
    assert torch.allclose(prompts._embed_masks(low), theirs_encoder.mask_embed(low), atol=1e-4)

    image = torch.randn(1, 256, side, side)
    positions = torch.randn(1, 256, side, side)
    fine = [torch.randn(1, 32, 4 * side, 4 * side), torch.randn(1, 64, 2 * side, 2 * side)]
    decoder, dense = tracker.sam_mask_decoder, torch.randn(1, 256, side, side)
    found = decoder.predict_masks(image, positions, sparse, dense, False, fine)
    other = theirs.mask_decoder(
        image_embeddings=image,
        image_positional_embeddings=positions,
        sparse_prompt_embeddings=sparse[None],
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=fine,
    )
    assert torch.allclose(found[0][:, 1:], other[0][0], atol=1e-3)
    assert torch.allclose(found[1][:, 1:], other[1][0], atol=1e-4)
    assert torch.allclose(found[3], other[3][0], atol=1e-4)
    pointer = torch.randn(2, 256)
    expected = tracker.obj_ptr_proj(pointer)
    assert torch.allclose(expected, theirs.object_pointer_proj(pointer), atol=1e-5)
    assert torch.equal(tracker.no_obj_ptr, theirs.no_object_pointer)


def test_a_video_folder_needs_its_tracker(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing says which published file .* --base FILE"):
        transformers_folder.export(folder / "old", tmp_path / "out", video=True)
    assert not (tmp_path / "out").exists()


def test_the_lines_of_the_page_are_python_and_load_what_was_written(
    folder: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that need nothing else; `test_elsewhere.py` runs others. All are Python."""
    for block in BLOCKS:
        compile(block, "elsewhere.md", "exec")
    tools = ("_image_model", "_video_predictor", "transformers", "ultralytics", "samgeo")
    assert len(BLOCKS) == len((*tools, "ComfyUI", "Roboflow", "Triton"))
    ours = weights.load(folder / "tuned")[0].state_dict()
    names: dict[str, Any] = {}
    exec(lines_of("build_sam3_image_model", sam3=folder / "out"), names)
    exec(lines_of("load_file", sam3=folder / "out"), names)
    for found in (names["model"].state_dict(), names["image"]):
        assert torch.equal(found[TUNED], ours[TUNED])
        assert found.keys() >= ours.keys()
    exec(lines_of("Sam3VideoModel", hf=video), names)
    assert names["video"].detector_model.num_parameters() == names["model"].num_parameters()
    known = ("inspect last", "--format sam3 ", "--format hf --video ", "--format triton ")
    assert len(COMMANDS) == len(known)
    assert all(any(word in line for word in known) for line in COMMANDS)
    run_documented("inspect last", folder / "out", None)
    assert "SAM 3 in Meta's layout, with its tracker" in capsys.readouterr().out


def test_the_head_for_points_is_the_trackers(folder: Path) -> None:
    """As X-AnyLabeling, samgeo and Roboflow's package may ask of upstream's image builder."""
    with fixes.using_builders():
        model = model_builder.build_sam3_image_model(
            str(pin.bpe_path()),
            device="cpu",
            checkpoint_path=str(folder / "out" / "sam3.pt"),
            load_from_HF=False,
            enable_inst_interactivity=True,
        )
    written = torch.load(folder / "out" / "sam3.pt", weights_only=True)
    head, names = "inst_interactive_predictor.model.", list(model.state_dict())
    assert sum(name.startswith(head) for name in names) == 309
    for name, value in model.state_dict().items():
        key = f"tracker.{name.removeprefix(head)}" if name.startswith(head) else f"detector.{name}"
        assert torch.equal(value, written[key]), key


def test_the_tracker_of_transformers_own_folder_is_taken(
    folder: Path, video: Path, tmp_path: Path
) -> None:
    """As weights that were tuned from such a folder want it."""
    model: Any = Sam3VideoModel.from_pretrained(video)
    model.save_pretrained(tmp_path)
    found = base_file.find_base(folder / "old" / "model.safetensors", tmp_path)
    assert found is not None
    assert (found.origin.layout, found.is_proved) == ("transformers", False)
    base_file.check_fit(weights.load(folder / "tuned")[0].state_dict(), found)
    taken = transformers_folder._tracker(found)
    assert taken.keys() == {key for key in model.state_dict() if key.startswith("tracker_")}
    with pytest.raises(UserError, match=r"whose tracker has other names[\s\S]*--base sam3\.pt"):
        export(folder / "old", tmp_path / "out", base_file=tmp_path)
