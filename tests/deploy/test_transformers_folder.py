"""transformers' own model answers as ours does, on photographs, by its own processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam3Model, Sam3Processor

from app.config.compose import load_config, load_model_config
from app.config.schema import LoraConfig
from app.datasets.images import open_image
from app.deploy.transformers_folder import (
    PADDING,
    TOLERANCES,
    differences,
    export,
    our_outputs,
    their_outputs,
)
from app.errors import UserError
from app.inference.predictor import Predictor
from app.model import adapters, weights
from app.model.build import build_model
from app.model.bundled import NANO
from tests.helpers import TINY, Command, same_tensors
from tests.model.outputs import raw_outputs

CONFIG = load_config(TINY).model
FILES = [
    "README.md",
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def _save(folder: Path, **header: Any) -> Path:
    """Weights of a tiny model, random throughout: no bias and no norm is what it began as."""
    torch.manual_seed(5)
    model = build_model(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return weights.save(model, folder, weights.Header(model=CONFIG, **header)).parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return _save(folder / "weights", prompts=["red circle"], data_hash="abc", threshold=0.25)


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    return export(tiny, tiny.parent / "exported")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(NANO, tmp_path_factory.mktemp("nano") / "exported")


def test_photographs_are_answered_as_by_our_predictor(nano: Path, potholes: Path) -> None:
    """An implementation that no one here wrote agrees, from the file of an image to its boxes."""
    model = Sam3Model.from_pretrained(nano).eval()
    processor = Sam3Processor.from_pretrained(nano)
    predictor = Predictor.load(NANO, device="cpu", precision="fp32")
    files = sorted((potholes / "test").glob("*.jpg"))
    assert files
    compared = 0
    for file in files:
        image = open_image(file)
        for prompt in ("pothole", "gray blob"):
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            inputs["input_boxes"] = torch.zeros(1, 1, 4)
            inputs["input_boxes_labels"] = torch.full((1, 1), PADDING)
            with torch.inference_mode():
                outputs = model(**inputs)
            sizes = inputs["original_sizes"].tolist()
            theirs = processor.post_process_object_detection(outputs, 0.0, sizes)[0]
            order = theirs["scores"].argsort(descending=True, stable=True).numpy()
            ours = predictor.predict(image, [prompt], threshold=0)
            side = np.array([image.width, image.height] * 2, dtype=np.float32)
            boxes = np.clip(theirs["boxes"].numpy()[order] / side, 0, 1)
            assert np.abs(theirs["scores"].numpy()[order] - ours.scores).max() < 1e-5
            assert np.abs(boxes - ours.boxes_xyxy / side).max() < 1e-5
            logits = our_outputs(predictor.model, predictor.config, image, prompt)["mask logits"]
            assert (outputs.pred_masks[0] - logits).abs().max() < 1e-3
            compared += len(ours)
    assert compared == 2 * len(files) * predictor.config.num_queries


def test_without_the_padding_box_it_is_another_model(nano: Path) -> None:
    """Why the card's snippet has it: transformers leaves out a token that ours always has."""
    model = Sam3Model.from_pretrained(nano).eval()
    processor = Sam3Processor.from_pretrained(nano)
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    inputs = processor(images=image, text="circle", return_tensors="pt")
    with torch.inference_mode():
        bare = model(**inputs)
    padded = their_outputs(nano, image, "circle")
    assert (bare.pred_masks[0] - padded["mask logits"]).abs().max() > 0.01


def test_the_folder_is_whole_and_read_back_to_the_bit(tiny: Path, exported: Path) -> None:
    assert sorted(file.name for file in exported.iterdir()) == FILES
    assert not list(exported.parent.glob(".*"))
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1  # as open() makes them
    before, source = weights.load(tiny)
    after, header = weights.load(exported)
    assert header == source
    assert (header.prompts, header.threshold, header.data_hash) == (["red circle"], 0.25, "abc")
    ours, theirs = raw_outputs(before.eval()), raw_outputs(after.eval())
    for key in ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks"):
        assert torch.equal(ours[key], theirs[key]), key


def test_nothing_is_missing_and_nothing_left_over_for_transformers(exported: Path) -> None:
    loaded: Any = Sam3Model.from_pretrained(exported, output_loading_info=True)
    assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_transformers_saves_again_is_read_without_our_header(
    tiny: Path, exported: Path, tmp_path: Path
) -> None:
    Sam3Model.from_pretrained(exported).save_pretrained(tmp_path)
    model, header = weights.load(tmp_path)
    nano = load_model_config("nano").model_copy(update={"resolution": CONFIG.resolution})
    assert (header.model, header.prompts) == (nano, [])
    ours, theirs = raw_outputs(weights.load(tiny)[0].eval()), raw_outputs(model.eval())
    assert torch.equal(ours["pred_masks"], theirs["pred_masks"])


def test_a_folder_of_several_files_is_read(exported: Path, tmp_path: Path) -> None:
    Sam3Model.from_pretrained(exported).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole, several = weights.load(exported)[0], weights.load(tmp_path)[0]
    assert same_tensors(whole.state_dict(), several.state_dict())
    base = weights.base_reference(weights.find_file(tmp_path))
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match=r"index.json: names .*-00002-of-.* which is not there"):
        weights.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="which is no file of its folder"):
        weights.load(tmp_path)
    assert len(base.sha256) == 64


def test_windows_that_do_not_tile_the_image_agree_too(tmp_path: Path) -> None:
    size = CONFIG.model_copy(update={"resolution": 88})  # 11 patches, in windows of 8
    torch.manual_seed(5)
    folder = tmp_path / "weights"
    weights.save(build_model(size).eval(), folder, weights.Header(model=size))
    export(folder, tmp_path / "out")
    processor = Sam3Processor.from_pretrained(tmp_path / "out")
    assert processor(images=Image.new("RGB", (40, 30)))["pixel_values"][0].shape == (3, 88, 88)


def test_an_adapter_leaves_merged(tiny: Path, tmp_path: Path) -> None:
    lora = load_config(["method=lora"]).method.lora
    assert isinstance(lora, LoraConfig)
    model, header = weights.load(tiny)
    adapters.apply_lora(model, lora, weights.base_reference(weights.find_file(tiny)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    weights.save(model, tmp_path / "adapter", header)
    folder = export(tmp_path / "adapter", tmp_path / "out")
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    adapted = our_outputs(weights.load(tmp_path / "adapter")[0], CONFIG, image, "red circle")
    theirs = their_outputs(folder, image, "red circle")
    assert all(v <= TOLERANCES[k] for k, v in differences(adapted, theirs).items())
    base = our_outputs(weights.load(tiny)[0], CONFIG, image, "red circle")
    assert differences(adapted, base)["mask logits"] > 0.01


def test_the_snippet_of_the_card_runs(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = (exported / "README.md").read_text()
    assert "The prompts it was trained with: “red circle”." in card
    assert "SAM License" in card
    snippet = re.findall(r"```python\n(.+?)```", card, re.DOTALL)[0]
    assert "threshold=0.25" in snippet
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "image.jpg")
    code = snippet.replace("THIS_FOLDER", str(exported)).replace("threshold=0.25", "threshold=0")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert f"torch.Size([{CONFIG.num_queries}, 70, 90])" in capsys.readouterr().out


def test_prompts_that_transformers_reads_otherwise_are_named(tmp_path: Path) -> None:
    long = " ".join(["tall"] * 40)
    folder = _save(tmp_path / "weights", prompts=["R&amp;D sign", long, "stop sign"])
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "- “R&amp;amp;D sign”: ask for “r&amp;d sign”\n" in card
    assert f"- “{long}”: longer than 32 tokens, cut it\n" in card
    assert "- “stop sign”" not in card
    assert "text='stop sign'" in card


def test_weights_that_do_not_answer_alike_leave_nothing(exported: Path, tmp_path: Path) -> None:
    """Not a number is never within a tolerance."""
    torch.manual_seed(5)
    model = build_model(CONFIG)
    with torch.no_grad():
        model.segmentation_head.instance_seg_head.bias.fill_(float("nan"))
    weights.save(model, tmp_path / "weights", weights.Header(model=CONFIG))
    with pytest.raises(UserError, match=r"answers otherwise .* mask logits differ by nan"):
        export(tmp_path / "weights", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    before = (exported / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="answers otherwise"):
        export(tmp_path / "weights", exported, overwrite=True)
    assert (exported / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in exported.iterdir()) == FILES


def test_only_an_earlier_export_is_replaced(tiny: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds an exported model. Replace it with --overwrite"):
        export(tiny, exported)
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something other than an exported model"):
            export(tiny, tmp_path, overwrite=overwrite)
        with pytest.raises(UserError, match=r"holds the weights .* name another folder"):
            export(tiny, tiny, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="holds the weights"):
        export(exported, exported, overwrite=True)


def test_an_export_is_replaced_where_asked(tiny: Path, tmp_path: Path) -> None:
    folder = export(tiny, tmp_path / "out")
    (folder / "left.txt").write_text("over")
    export(tiny, folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_what_transformers_cannot_be_told_is_refused_before_any_work(tmp_path: Path) -> None:
    size = CONFIG.model_copy(update={"segmentation": False})
    weights.save(build_model(size), tmp_path / "weights", weights.Header(model=size))
    with pytest.raises(UserError, match="no mask head"):
        export(tmp_path / "weights", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_way_back_through_the_command_line(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "image.jpg")
    words = ["infer", "--checkpoint", exported, "--input", tmp_path / "image.jpg"]
    done = command(*words, "--output-dir", tmp_path / "found")
    assert done.code == 0, done.err
    assert (tmp_path / "found").is_dir()
