"""Checkpoints of every layout, strictly; ours to the bit."""

from __future__ import annotations

import json
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.config.compose import load_config
from app.errors import UserError
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model
from tests.helpers import TINY
from tests.model.outputs import raw_outputs

CONFIG = load_config(TINY).model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return build_model(CONFIG).eval()


@pytest.fixture
def saved(model, tmp_path: Path) -> Path:
    header = weights.Header(model=CONFIG, prompts=["circle"], data_hash="abc")
    weights.save(model, tmp_path / "best", header)
    return tmp_path / "best"


def _state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_what_is_reloaded_answers_to_the_bit(model, saved: Path) -> None:
    loaded, header = weights.load(saved)
    assert header.model == CONFIG
    assert (header.prompts, header.data_hash) == (["circle"], "abc")
    ours, theirs = raw_outputs(model), raw_outputs(loaded.eval())
    for key in ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks", "semantic_seg"):
        assert torch.equal(ours[key], theirs[key]), key


def test_the_header_is_json_in_the_file(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["sam3-finetuning"])
        assert not [key for key in file.keys() if key.endswith("freqs_cis")]  # noqa: SIM118
    assert header["pin"].startswith("84cc43b")
    assert header["model"]["name"] == "nano"


@pytest.mark.parametrize("layout", ["sam3.pt", "trainer", "bare", "safetensors"])
def test_other_layouts_load(model, tmp_path: Path, layout: str) -> None:
    state = _state(model)
    file = tmp_path / "checkpoint.pt"
    if layout == "sam3.pt":  # facebook/sam3: the detector beside the tracker and its neck
        state = {f"detector.{k}": v for k, v in state.items()}
        state["tracker.maskmem_tpos_enc"] = torch.zeros(3)
        state["detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.bias"] = torch.zeros(3)
        torch.save(state, file)
    elif layout == "trainer":
        torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}, "steps": {}}, file)
    elif layout == "bare":
        torch.save(state, file)
    else:
        file = tmp_path / "elsewhere.safetensors"
        save_file({k: v for k, v in state.items() if not k.endswith("freqs_cis")}, file)
    loaded = build_model(CONFIG)
    weights.load_into(loaded, file, merge=False)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_the_size_of_a_bare_checkpoint_is_found(tmp_path: Path) -> None:
    torch.save(build_model(load_config().model).state_dict(), tmp_path / "checkpoint.pt")
    assert weights.describe(tmp_path).model.name == "nano"
    with pytest.raises(UserError, match="fit none of the sizes"):
        weights.describe(tmp_path, size="small")


def test_another_resolution_recomputes_rope(saved: Path) -> None:
    loaded, header = weights.load(saved, resolution=128)
    assert header.model.resolution == 128
    trunk = loaded.backbone.vision_backbone.trunk
    assert trunk.blocks[3].attn.freqs_cis.shape[0] == 16 * 16


def test_trained_without_masks_it_has_no_mask_head(model, tmp_path: Path) -> None:
    state = {k: v for k, v in _state(model).items() if not k.startswith("segmentation_head.")}
    torch.save({"model": state}, tmp_path / "checkpoint.pt")
    loaded, header = weights.load(tmp_path)
    assert loaded.segmentation_head is None
    assert not header.model.segmentation
    found = Predictor(loaded, header.model).predict(Image.new("RGB", (40, 30)), ["x"], threshold=0)
    assert found.masks is None
    assert len(found) > 0


def _missing(state):
    del state["dot_prod_scoring.hs_proj.weight"]


def _unknown(state):
    state["extra.weight"] = torch.zeros(1)


def _shape(state):
    state["dot_prod_scoring.hs_proj.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_missing, "dot_prod_scoring.hs_proj.weight: not in the file"),
        (_unknown, "extra.weight: not in the model"),
        (_shape, r"dot_prod_scoring.hs_proj.weight: shape \(2, 2\) in the file, \(64, 64\)"),
    ],
)
def test_a_key_that_does_not_fit_is_named(model, tmp_path: Path, change, said: str) -> None:
    state = _state(model)
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    before = _state(model)
    with pytest.raises(UserError, match=said):
        weights.load_into(model, tmp_path, merge=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_another_size_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="size 'nano', not 'sam3'"):
        weights.load(saved, size="sam3")


class _Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.pt", b"", "not a checkpoint"),
        ("x.pt", b"PK\x03\x04 cut", "not a checkpoint"),
        ("x.pt", pickle.dumps({"model": _Evil()}), "not a checkpoint"),
        ("x.safetensors", b"\x08\x00\x00", "not a safetensors"),
        ("x.safetensors", b"\xff" * 64, "not a safetensors"),
    ],
)
def test_a_broken_or_hostile_file_is_refused(tmp_path, capsys, name, content, said) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        weights.load(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_a_key_that_is_hashed_for_ever_is_refused(tmp_path: Path) -> None:
    """Each tuple holds the one before twice: few bytes, and 2^60 values to go through."""
    key: object = ()
    for _ in range(60):
        key = (key, key)
    torch.save({"model": [key, key]}, tmp_path / "x.pt")  # as a key, it could not be saved either
    with pytest.raises(UserError, match="its index is no list of tensors"):
        weights.load(tmp_path / "x.pt")


def test_a_zip_that_unpacks_to_more_than_it_holds_is_refused(model, tmp_path: Path) -> None:
    torch.save(_state(model), tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    with pytest.raises(UserError, match="its zip is packed"):
        weights.load(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"vision": {"depth": 200_000, "global_blocks": [199_999]}},
            "vision.depth: .* equal to 256",
        ),
        (
            {"vision": {"depth": 256, "global_blocks": [255]}},
            "says 256 .*trunk.blocks, and the file",
        ),
        ({"vision": {"embed_dim": 16_384}}, r"says \[16384, 3, 8, 8\] of .*patch_embed"),
        ({"vision": {"mlp_ratio": 63}}, "of .*mlp.fc1.weight, and the file"),
        ({"vision": {"window_size": 500}}, "of .*pos_embed, and the file"),
        ({"text": {"depth": 256}}, "says 256 .*resblocks, and the file"),
        ({"feedforward": 100_000}, "of .*linear1.weight, and the file"),
        ({"encoder_layers": 200}, "says 200 transformer.encoder.layers, and the file"),
        ({"geometry_layers": 200}, "says 200 geometry_encoder.encode, and the file"),
        ({"num_queries": 100_000}, "of .*query_embed.weight, and the file"),
        ({"resolution": 8_000_000}, "model.resolution 8000000 is above 4096"),
        ({"vocabulary": ["a"]}, "of .*mask, and the file"),
    ],
)
def test_sizes_in_a_header_are_those_of_the_tensors(saved: Path, change: dict, said: str) -> None:
    """They are compared before a model is built by them."""
    file = saved / "model.safetensors"
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["sam3-finetuning"])
    for key, value in change.items():
        header["model"][key] = header["model"][key] | value if isinstance(value, dict) else value
    save_file(load_file(file), file, metadata={"sam3-finetuning": json.dumps(header)})
    began = time.process_time()
    with pytest.raises(UserError, match=said):
        weights.load(saved)
    assert time.process_time() - began < 3


def test_prompts_in_a_header_are_counted(command, saved: Path, tmp_path: Path) -> None:
    file = saved / "model.safetensors"
    header = weights.read_header(saved)
    assert header is not None
    many = header.model_copy(update={"prompts": ["circle"] * 1_000_000})
    save_file(load_file(file), file, metadata=weights.to_metadata(many))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    words = ("--input", tmp_path / "a.png", "--output-dir", tmp_path / "out")
    done = command("infer", "--checkpoint", saved, *words)
    assert done.code == 2
    assert "prompts: List should have at most 50000 items" in done.err
    assert len(done.out) + len(done.err) < 10_000


def test_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="'epoch' is no tensor"):
        weights.load(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        weights.load(tmp_path / "y.pt")


def test_a_broken_header_is_refused(model, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"sam3-finetuning": "{"})
    with pytest.raises(UserError, match="header is broken"):
        weights.load(tmp_path / "x.safetensors")


def test_a_missing_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no model.safetensors.*notes.txt"):
        weights.find_file(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        weights.find_file(tmp_path / "nowhere")


def test_a_save_that_fails_leaves_the_old_weights(model, saved: Path, monkeypatch) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save(model, saved, weights.Header(model=CONFIG))
    assert [p.name for p in saved.iterdir()] == ["model.safetensors"]
    assert (saved / "model.safetensors").read_bytes() == before
