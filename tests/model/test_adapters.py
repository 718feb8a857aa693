"""LoRA: counts, what is adapted, files that PEFT reads, merging; the base is proved."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.config.compose import load_config, load_model_config
from app.config.schema import LoraConfig
from app.errors import UserError
from app.files import hash_file
from app.inference.predictor import Predictor
from app.model import adapters, weights
from app.model.adapters import apply_lora, find_targets, load_lora, merge_lora, save_lora
from app.model.build import build_model, count_parameters
from tests.helpers import TINY, Command
from tests.model.outputs import raw_outputs

CONFIG = load_config(TINY).model
EVERYWHERE = ("method.lora.parts.text=true", "method.lora.targets=[dot_prod_scoring.hs_proj]")


def _lora(name: str = "lora", *overrides: str) -> LoraConfig:
    lora = load_config([f"method={name}", *overrides]).method.lora
    assert lora is not None
    return lora


def _differ(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    keys = ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks", "semantic_seg")
    return max(float((ours[key] - theirs[key]).abs().max()) for key in keys)


def _learn(model) -> None:
    """Give the adapter something to say: its second matrices start at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    header = weights.Header(model=CONFIG, prompts=["circle"])
    return weights.save(build_model(CONFIG), tmp_path / "base", header)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A folder with an adapter of all parts, text and scoring included."""
    model, header = weights.load(base)
    apply_lora(model, _lora("lora-full", *EVERYWHERE), weights.base_reference(base))
    _learn(model)
    weights.save(model, tmp_path / "adapter", header)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("name", "millions", "percent"),
    [("lora-minimal", 0.5, 0.06), ("lora", 4.0, 0.47), ("lora-full", 15.0, 1.8)],
)
def test_trainable_parameters_of_the_full_model(name, millions, percent) -> None:
    model = build_model(load_model_config("sam3"), device="meta")
    whole = count_parameters(model)["total"]
    apply_lora(model, _lora(name))
    trained = count_parameters(model, trainable=True)
    assert trained["total"] == pytest.approx(millions * 1e6, rel=0.05)
    assert 100 * trained["total"] / whole == pytest.approx(percent, rel=0.05)
    assert trained["text"] == 0
    assert (trained["vision"] == 0) is (name == "lora-minimal")
    assert 2e6 < 4 * trained["total"] < 60e6  # bytes of its file


def test_parts_attention_and_mlp_are_switches() -> None:
    model = build_model(CONFIG, device="meta")

    def kinds(*overrides: str) -> set[str]:
        return {name.split(".")[-1] for name in find_targets(model, _lora("lora", *overrides))}

    off = [f"method.lora.parts.{part}=false" for part in ("vision", "encoder", "decoder")]
    assert kinds(*off[1:]) == {"qkv", "proj"}
    assert kinds(*off[1:], "method.lora.mlp=true") == {"qkv", "proj", "fc1", "fc2"}
    assert kinds(*off, "method.lora.parts.text=true") == {"attn"}
    assert kinds(*off[:2]) == {"self_attn", "ca_text", "cross_attn"}
    assert kinds(*off, "method.lora.parts.encoder=true") == {"self_attn", "cross_attn_image"}
    assert kinds(*off[:2], "method.lora.attention=false", "method.lora.mlp=true") == {
        "linear1",
        "linear2",
    }
    assert kinds(*off, "method.lora.targets=[dot_prod_scoring.*_proj]") == {
        "prompt_proj",
        "hs_proj",
    }
    with pytest.raises(UserError, match="nothing is adapted"):
        kinds(*off)


def test_patterns_that_match_nothing_are_named_with_near_names() -> None:
    model = build_model(CONFIG, device="meta")
    patterns = ["*.attn.qvk", "dot_prod_scoring.hsproj", "transformer.decoder.layers.*.ca_txt"]
    with pytest.raises(UserError) as caught:
        find_targets(model, _lora("lora", f"method.lora.targets={patterns}"))
    first, second, third = caught.value.problems
    assert "'*.attn.qvk' matches no" in first
    assert "'*.attn.qkv'" in first
    assert "'dot_prod_scoring.hs_proj'" in second
    assert "'transformer.decoder.layers.*.ca_text'" in third


def test_output_projections_of_packed_attention_are_no_targets() -> None:
    """Torch reads their weights and never calls them: an adapter there would do nothing."""
    model = build_model(CONFIG, device="meta")
    with pytest.raises(UserError, match="matches no linear layer"):
        find_targets(model, _lora("lora", "method.lora.targets=['*.out_proj']"))


def test_an_adapter_starts_as_nothing_and_then_matters(base: Path) -> None:
    plain, _ = weights.load(base)
    before = raw_outputs(plain)
    apply_lora(plain, _lora("lora-full", *EVERYWHERE))
    assert _differ(before, raw_outputs(plain)) < 1e-5  # torch takes another kernel
    _learn(plain)
    assert _differ(before, raw_outputs(plain)) > 0.01


def test_every_adapted_matrix_matters(base: Path) -> None:
    """Each alone changes what the model says: none is beside the way that the data takes."""
    model, _ = weights.load(base)
    apply_lora(model, _lora("lora-full", *EVERYWHERE))
    before = raw_outputs(model)
    layers = [name for name, _ in model.named_parameters() if "lora_B" in name]
    for name in layers:
        matrix = model.get_parameter(name)
        matrix.data.fill_(0.05)
        model.get_parameter(name.replace("lora_B", "lora_A")).data.normal_()
        assert _differ(before, raw_outputs(model)) > 0, name
        matrix.data.zero_()


def test_saved_and_loaded_to_the_bit(adapter: Path, base: Path) -> None:
    model, _ = weights.load(base)
    apply_lora(model, _lora("lora-full", *EVERYWHERE), weights.base_reference(base))
    weights.load_into(model, adapter, merge=False)
    loaded, header = weights.load(adapter)
    assert _differ(raw_outputs(loaded), raw_outputs(model)) == 0
    weights.save(model, adapter, header)
    again, _ = weights.load(adapter)
    assert _differ(raw_outputs(loaded), raw_outputs(again)) == 0
    assert header.prompts == ["circle"]
    assert header.model == CONFIG
    assert {path.name for path in adapter.iterdir()} == {adapters.FILE, adapters.CONFIG}


def test_peft_itself_loads_the_folder(adapter: Path, base: Path) -> None:
    plain, _ = weights.load(base)
    theirs = peft.PeftModel.from_pretrained(plain, str(adapter)).base_model.model
    ours, _ = weights.load(adapter)
    assert _differ(raw_outputs(ours), raw_outputs(theirs)) == 0


def test_merged_it_predicts_alike(adapter: Path, base: Path, command: Command, tmp_path) -> None:
    done = command("merge", adapter, "--output-dir", tmp_path / "merged")
    assert done.code == 0, done.err
    merged, header = weights.load(tmp_path / "merged")
    unmerged, _ = weights.load(adapter)
    assert _differ(raw_outputs(merged), raw_outputs(unmerged)) < 1e-5
    assert header.prompts == ["circle"]
    assert merged.state_dict().keys() == build_model(CONFIG).state_dict().keys()
    assert (tmp_path / "merged" / weights.FILE).stat().st_size < 1.01 * base.stat().st_size
    again = command("merge", adapter, "--output-dir", tmp_path / "merged")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert command("merge", base, "--output-dir", tmp_path / "b").code == 2


def test_merging_leaves_a_plain_model_that_trains(base: Path) -> None:
    model, _ = weights.load(base)
    apply_lora(model, _lora())
    merge_lora(model)
    assert not adapters.has_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    apply_lora(model, _lora())


def test_predictions_of_an_adapter(adapter: Path) -> None:
    found = Predictor.load(adapter).predict(Image.new("RGB", (40, 30)), ["circle"], threshold=0)
    assert len(found) > 0
    assert weights.describe(adapter).model.name == "nano"


def test_a_base_that_is_another_is_refused(adapter: Path, base: Path, monkeypatch) -> None:
    model = build_model(CONFIG)
    weights.save(model, base.parent, weights.Header(model=CONFIG))
    with pytest.raises(UserError, match=r"is another. Set SAM3_BASE=FILE"):
        weights.load(adapter)


def test_a_base_that_was_moved_is_found_by_name(adapter: Path, base: Path, monkeypatch) -> None:
    moved = base.rename(base.parent / "moved.safetensors")
    with pytest.raises(UserError, match=r"needs the weights it was trained on, .*SAM3_BASE=FILE"):
        weights.load(adapter)
    monkeypatch.setenv("SAM3_BASE", str(moved))
    weights.load(adapter)


def test_a_base_beside_its_adapter(adapter: Path, base: Path) -> None:
    """A relative reference is one from the adapter's folder: both can be moved together."""
    content = json.loads((adapter / adapters.CONFIG).read_text())
    content["base_model_name_or_path"] = "../base/model.safetensors"
    (adapter / adapters.CONFIG).write_text(json.dumps(content))
    assert weights.find_base(adapter).samefile(base)


def test_an_adapter_of_the_hubs_weights(base: Path, monkeypatch) -> None:
    """Named by the hub, so that it is found on another machine."""
    monkeypatch.setattr(weights, "cached_sam3", lambda: base)
    assert weights.base_reference(base).reference == "facebook/sam3/sam3.pt"


def test_another_adapters_state_is_refused(adapter: Path, base: Path) -> None:
    model, _ = weights.load(base)
    apply_lora(model, _lora(), adapters.Base("elsewhere", "0" * 64))
    with pytest.raises(UserError, match="belongs to weights of sha256:"):
        load_lora(model, adapter)
    model, _ = weights.load(base)
    apply_lora(model, _lora(), weights.base_reference(base))
    with pytest.raises(UserError, match="does not fit the model"):
        load_lora(model, adapter)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"peft_type": "LORA", "rank": 3}, "not the settings of a LoRA"),
        ({"r": 1, "lora_alpha": 1, "target_modules": ["x"]}, "does not say which weights"),
        ([1], "peft_type must be LORA"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_settings_that_are_none(adapter: Path, content, said: str) -> None:
    if isinstance(content, dict):
        content = {"peft_type": "LORA"} | content
    text = content if isinstance(content, str) else json.dumps(content)
    (adapter / adapters.CONFIG).write_text(text)
    with pytest.raises(UserError, match=said):
        weights.load(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": "([a-z0-9_.]+)+\\.NOPE!"}, "target_modules: .* valid list"),
        ({"target_modules": [3]}, r"target_modules\.0: .* valid string"),
        ({"target_modules": ["qkv"]}, "does not fit the model, or is not what"),
        ({"target_modules": ["x"] * 20_000}, "target_modules: .* at most 10000"),
        ({"r": 2_000_000_000}, "r: .* less than or equal to 4096"),
        ({"r": 7}, "does not fit the model, or is not what"),
        ({"rank_pattern": {"(a+)+": 3}}, "rank_pattern: must be {}"),
        ({"exclude_modules": "(a+)+!"}, "exclude_modules: must be None"),
        ({"megatron_core": "this", "megatron_config": {}}, "megatron_core: must be"),
        ({"auto_mapping": {"parent_library": "this"}}, "auto_mapping: must be None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: must be True"),
        ({"modules_to_save": ["backbone"]}, "modules_to_save: must be None"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path: .* at most 4096"),
        ({"base_model_name_or_path": "y/" * 900}, "there is no"),
        ({"base_model_name_or_path": "adapter_model.safetensors"}, "weights that stand alone"),
        ({"base_model_name_or_path": "/proc/cpuinfo"}, "weights that stand alone"),
        ({"revision": 3}, "revision: .* valid string"),
    ],
)
def test_settings_that_would_act_or_not_end_are_refused(
    adapter: Path, change: dict, said: str
) -> None:
    settings = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=said):
        weights.load(adapter)


def test_an_adapter_of_itself_is_refused(adapter: Path) -> None:
    """Also where its header is left out, for which the base's would be read."""
    settings = json.loads((adapter / adapters.CONFIG).read_text())
    save_file(load_file(adapter / adapters.FILE), adapter / adapters.FILE)
    settings |= {"base_model_name_or_path": adapters.FILE}
    settings |= {"revision": f"sha256:{hash_file(adapter / adapters.FILE)}"}
    (adapter / adapters.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no file of weights that stand alone"):
        weights.load(adapter)


def test_an_adapters_header_has_the_sizes_of_its_base(adapter: Path) -> None:
    header = weights.read_header(adapter)
    assert header is not None
    larger = header.model.model_copy(update={"num_queries": 90_000})
    metadata = weights.to_metadata(header.model_copy(update={"model": larger}))
    save_file(load_file(adapter / adapters.FILE), adapter / adapters.FILE, metadata=metadata)
    with pytest.raises(UserError, match="its header says num_queries 90000, and its base"):
        weights.load(adapter)


def test_a_broken_file_is_refused(adapter: Path) -> None:
    (adapter / adapters.FILE).write_bytes(b"\x08\x00")
    with pytest.raises(UserError, match="cut short"):
        weights.load(adapter)


def test_dropout_is_in_training_alone(base: Path, tmp_path: Path) -> None:
    model, header = weights.load(base)
    apply_lora(model, _lora("lora-full", "method.lora.dropout=0.5"), weights.base_reference(base))
    _learn(model)
    layer = model.get_submodule("backbone.vision_backbone.trunk.blocks.0.attn.qkv")
    values = torch.randn(3, CONFIG.vision.embed_dim)
    assert not torch.equal(layer.train()(values), layer(values))
    assert torch.equal(layer.eval()(values), layer(values))
    weights.save(model, tmp_path / "adapter", header)
    loaded, _ = weights.load(tmp_path / "adapter")
    assert _differ(raw_outputs(model), raw_outputs(loaded)) == 0


def test_the_base_is_bit_equal_after_use(base: Path) -> None:
    """peft's own layer for packed attention lets it drift at each call."""
    model, _ = weights.load(base)
    apply_lora(model, _lora("lora-full", *EVERYWHERE))
    _learn(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    raw_outputs(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_save_lora_leaves_the_metadata_asked_for(base: Path, tmp_path: Path) -> None:
    model, _ = weights.load(base)
    apply_lora(model, _lora())
    file = save_lora(model, tmp_path / "a", {"note": "mine"})
    with weights.safe_open(file, "pt") as content:
        assert content.metadata()["note"] == "mine"
        keys = list(content.keys())
    assert all(key.startswith("base_model.model.") and "lora_" in key for key in keys)
