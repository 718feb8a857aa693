"""Any checkpoint is told for what it is, by names, shapes and headers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.compose import load_config, load_model_config
from app.config.schema import LoraConfig
from app.errors import UserError
from app.files import write_json
from app.model import adapters, published, weights
from app.model.bundled import NANO
from app.model.inspection import inspect
from app.model.transformers.config import to_config
from app.model.transformers.state import to_transformers
from tests.deploy.tiny import write_folder
from tests.helpers import Command
from tests.model.published import sam31_beside, video_model


@pytest.fixture(scope="module")
def nano() -> dict[str, Tensor]:
    return load_file(NANO / "model.safetensors")


def _full(file: Path, state: Mapping[str, Tensor]) -> Path:
    """Full-size names and shapes, each tensor one number that is seen as many."""
    seen = {
        key: torch.zeros(1, dtype=value.dtype).expand(value.shape) for key, value in state.items()
    }
    torch.save(seen, file)
    return file


def test_metas_sam_3_and_31(tmp_path: Path) -> None:
    whole = video_model(on_meta=True).state_dict()
    report = inspect(_full(tmp_path / "sam3.pt", whole))
    assert report.kind == "SAM 3 in Meta's layout, with its tracker"
    assert (report.facts["size"], report.facts["tensors"]) == ("sam3", "1465")
    assert report.facts["types"] == "float32 1433, complex64 32"
    assert any("build_sam3_video_model" in loader for loader in report.loads)
    assert report.notes[0].startswith("331 tensors of the tracker and its necks are set aside")
    assert len(report.notes) == 1
    image = {
        key: value
        for key, value in whole.items()
        if published.image_name(key) and ".convs.3." not in key
    }
    beside = {key: torch.empty(s, device="meta") for key, s in sam31_beside().items()}
    report = inspect(_full(tmp_path / "sam3.1_multiplex.pt", image | beside))
    assert report.kind == "SAM 3.1 in Meta's layout, with its tracker"
    assert report.facts["size"] == "sam3"
    assert not any("build_sam3_video_model" in loader for loader in report.loads)
    assert report.notes[0].startswith("493 tensors")
    assert any("interactive_sam_" in note for note in report.notes)
    # a tracker of which a tensor is called otherwise is one that the strict builder refuses
    renamed = {key.replace("no_mem_embed", "no_memory"): value for key, value in whole.items()}
    report = inspect(_full(tmp_path / "sam3.pt", renamed))
    assert report.facts["size"] == "sam3"
    assert not any("build_sam3_video_model" in loader for loader in report.loads)
    assert report.notes[1:] == [
        "1 missing for SAM 3's video model: tracker.no_mem_embed",
        "1 unexpected for SAM 3's video model: tracker.no_memory",
    ]


def test_numbers_are_not_read(tmp_path: Path) -> None:
    """Of a file of the full size, which is a header before a hole of 3.4 GB."""
    types = {torch.float32: ("F32", 4), torch.complex64: ("C64", 8)}
    table, end = {}, 0
    for key, value in video_model(on_meta=True).state_dict().items():
        name, size = types[value.dtype]
        start, end = end, end + value.numel() * size
        table[key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    file = tmp_path / "sam3.safetensors"
    with file.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(8 + len(header) + end)
    before = _resident()
    report = inspect(file)
    assert _resident() - before < 500e6
    assert (
        report.kind
        == "SAM 3 in Meta's layout, with its tracker, in safetensors as ComfyUI keeps it"
    )
    assert report.facts["file"] == f"{file}, {file.stat().st_size / 1e6:,.0f} MB"
    assert (report.facts["size"], report.loads[0]) == ("sam3", "ComfyUI")
    with file.open("r+b") as written:
        written.truncate(file.stat().st_size - 1)
    with pytest.raises(UserError, match="not a safetensors file, or cut short"):
        inspect(file)


def _resident() -> int:
    """Return the bytes of this process in memory, mapped pages of files too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_trainers_checkpoint_and_what_it_lacks(nano: dict[str, Tensor], tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"model": nano, "optimizer": optimizer, "epoch": 3}, tmp_path / "checkpoint.pt")
    report = inspect(tmp_path / "checkpoint.pt")
    assert report.kind == "a trainer's full state, its model under bare names"
    assert report.facts["size"] == "nano"
    assert report.notes[0] == "beside the model: epoch, optimizer"
    assert "--format sam3" in report.notes[1]
    lost = {key: value for key, value in nano.items() if key != "dot_prod_scoring.hs_proj.bias"}
    renamed = lost | {"dot_prod_scoring.offset": torch.zeros(3)}
    torch.save({"model": renamed, "optimizer": {}}, tmp_path / "checkpoint.pt")
    report = inspect(tmp_path / "checkpoint.pt")
    assert "none of the known" in report.facts["size"]
    assert "1 missing for size 'nano': dot_prod_scoring.hs_proj.bias" in report.notes
    assert "1 unexpected for size 'nano': dot_prod_scoring.offset" in report.notes


def test_ours_transformers_and_other_copies(nano: dict[str, Tensor], tmp_path: Path) -> None:
    report = inspect(NANO)
    assert report.kind == "weights of ours"
    assert report.loads == ["sam3-finetuning (--checkpoint)"]
    assert report.facts["resolution"] == "128 px"
    save_file(to_transformers(nano), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", to_config(load_model_config("nano")))
    report = inspect(tmp_path)
    assert report.kind == "transformers' Sam3Model"
    assert (report.facts["size"], report.loads[0]) == ("nano", "transformers' Sam3Model")
    tracker = {"tracker_neck.fpn_layers.0.proj1.bias": torch.zeros(3)}
    video = {f"detector_model.{key}": value for key, value in to_transformers(nano).items()}
    save_file(video | tracker, tmp_path / "model.safetensors")
    report = inspect(tmp_path)
    assert report.kind == "transformers' Sam3VideoModel"
    assert "Sam3VideoModel" not in report.loads
    assert any(" missing for SAM 3's video model: tracker_model." in note for note in report.notes)
    save_file({f"detector.{k}": v for k, v in nano.items()}, tmp_path / "copy.safetensors")
    report = inspect(tmp_path / "copy.safetensors")
    assert report.kind.startswith("the image part of SAM 3 in Meta's layout, without a tracker")
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    report = inspect(tmp_path / "other.safetensors")
    assert report.kind == "no SAM 3 that is known here"
    assert "loaded by: nothing that is known here" in report.lines()


def test_onnx_folders(tmp_path: Path) -> None:
    report = inspect(write_folder(tmp_path / "onnx"))
    assert report.kind == "ONNX graphs, exported from here"
    assert report.facts["classes"] == "red, green"
    assert report.facts["precisions"] == "fp32"
    assert report.notes == []
    (tmp_path / "onnx" / "text.npz").unlink()
    with (tmp_path / "onnx" / "ground.onnx").open("ab") as file:
        file.write(b"more")
    notes = sorted(inspect(tmp_path / "onnx").notes)
    assert f"{tmp_path / 'onnx' / 'ground.onnx'}: has " in notes[0]
    assert notes[1] == f"{tmp_path / 'onnx' / 'text.npz'}: is not there"
    write_json(tmp_path / "onnx" / "manifest.json", {"graphs": 3, "classes": 5})
    with pytest.raises(UserError, match=r"manifest\.json: is of no export that is known here"):
        inspect(tmp_path / "onnx")


def test_a_run_and_an_adapter(nano: dict[str, Tensor], tmp_path: Path) -> None:
    """A run's folder stands for its best weights; an adapter wants what it adapts."""
    lora = load_config(["method=lora"]).method.lora
    assert isinstance(lora, LoraConfig)
    save_file(nano, tmp_path / "base.safetensors")
    model, header = weights.load(NANO)
    base = dataclasses.replace(
        weights.base_reference(tmp_path / "base.safetensors"), reference="../../base.safetensors"
    )
    adapters.apply_lora(model, lora, base)
    weights.save(model, tmp_path / "weights" / "best", header)
    report = inspect(tmp_path)
    assert report.kind.startswith("a LoRA")
    assert report.facts["adapts"].startswith("../../base.safetensors, SHA-256 ")
    assert (report.facts["size"], len(report.notes)) == ("nano", 1)
    (tmp_path / "base.safetensors").unlink()
    assert inspect(tmp_path).notes[0] == "what it adapts is not there: set SAM3_BASE=FILE to it"


def test_cut_and_hostile_files_are_one_message(tmp_path: Path, command: Command) -> None:
    shutil.copy(NANO / "model.safetensors", tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("r+b") as file:
        file.truncate(5000)
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"model": print}))
    torch.save({"model": print}, tmp_path / "called.pt")
    for name in ("cut.safetensors", "hostile.pt", "called.pt", "missing.pt"):
        with pytest.raises(UserError) as raised:
            inspect(tmp_path / name)
        assert len(raised.value.problems) == 1
        assert name in raised.value.problems[0]
    done = command("inspect", tmp_path / "cut.safetensors")
    assert (done.code, done.out) == (2, "")
    done = command("inspect", NANO)
    assert done.code == 0
    assert done.out.startswith("what: weights of ours\nfile: ")
