"""What is trained and what is not: no gradient, no state, no change in what is frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from app.config.compose import load_config, to_yaml
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset
from app.errors import UserError
from app.model import adapters, weights
from app.model.build import build_model, components, count_parameters
from app.training import method
from app.training.batches import query_dataset
from app.training.step import build_accelerator
from tests.helpers import TINY, Command, Result
from tests.training.updates import Updates, make_updates


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from."""
    model = load_config(TINY).model
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("base")
    return weights.save(build_model(model), folder, weights.Header(model=model))


def _updates(shapes: Path, start: Path | None, *overrides: str) -> Updates:
    config = load_config([*TINY, "training.batch_size=4", *overrides])
    transforms = [instantiate(node) for node in config.transforms.train]
    data = QueryDataset(load_splits(shapes).train, transforms, seed=0)
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    if start is not None:
        weights.load_into(model, start, merge=False)
    base = weights.base_reference(start) if start is not None else None
    method.prepare(model, config.method, pretrained=start is not None, base=base)
    return make_updates(config, model, data, build_accelerator(torch.device("cpu")), lr_scale=1.0)


def _trained(updates: Updates) -> set[str]:
    counts = count_parameters(updates.step.model, trainable=True)
    return {name for name in components(updates.step.model) if counts[name]}


@pytest.mark.parametrize("name", ["full", "head", "lora-minimal", "lora", "lora-full"])
@pytest.mark.parametrize("loss", ["full", "boxes"])
def test_what_takes_part_in_a_step(shapes: Path, base: Path, name: str, loss: str) -> None:
    """DDP is told to look for what does not where there is some, and only there."""
    updates = _updates(shapes, base, f"method={name}", f"loss={loss}")
    updates.step.batch_losses(next(iter(updates.batches.loader)), 0)["loss"].backward()
    named = updates.step.model.named_parameters()
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    assert bool(unused) == method.leaves_unused(updates.step.config.method)


EVERY = {"vision", "text", "detector", "geometry", "masks", "scoring"}


@pytest.mark.parametrize(
    ("overrides", "trained", "from_weights"),
    [
        (["method=full"], EVERY - {"text"}, True),
        (["method=full"], EVERY, False),
        (["method=full", "method.freeze=[]"], EVERY, True),
        (
            ["method=full", "method.freeze=[detector,geometry]"],
            EVERY - {"detector", "geometry"},
            True,
        ),
        (["method=head"], {"detector", "masks", "scoring"}, True),
        (["method=head"], {"detector", "masks", "scoring"}, False),
        (["method=lora-minimal"], {"detector"}, True),
        (["method=lora", "method.lora.dropout=0.1"], {"vision", "detector"}, True),
        (["method=lora", "training.precision=bf16"], {"vision", "detector"}, True),
        (["method=lora", "method.lora.parts.text=true"], {"vision", "text", "detector"}, True),
    ],
)
def test_what_is_frozen_stays(shapes: Path, base: Path, overrides, trained, from_weights) -> None:
    """After a step: no gradient, no state of the optimizer, and the same bits."""
    updates = _updates(shapes, base if from_weights else None, *overrides)
    assert _trained(updates) == trained
    before = {name: p.clone() for name, p in updates.step.model.named_parameters()}
    gradients: set[str] = set()
    updates.step.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            n for n, p in updates.step.model.named_parameters() if p.grad is not None
        )
    )
    assert len(list(updates.epoch(0))) == 1
    after = dict(updates.step.model.named_parameters())
    frozen = {name for name, p in after.items() if not p.requires_grad}
    assert not gradients & frozen
    assert gradients
    with_state = {id(p) for p in updates.step.optimizer.optimizer.state}
    assert not {name for name in frozen if id(after[name]) in with_state}
    assert sum(len(g["params"]) for g in updates.step.optimizer.param_groups) == len(after) - len(
        frozen
    )
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    for part, module in components(updates.step.model).items():
        inside = {id(p) for p in module.parameters()}
        assert any(id(after[name]) in inside for name in changed) is (part in trained), part


@pytest.mark.parametrize("name", ["lora-minimal", "lora", "lora-full"])
def test_what_an_adapter_adds_is_scaled_by_two(shapes: Path, base: Path, name: str) -> None:
    """By default: alpha over rank, in each layer, as it multiplies in a forward pass."""
    model = _updates(shapes, base, f"method={name}").step.model
    plain = build_model(load_config(TINY).model)
    weights.load_into(plain, base, merge=False)
    torch.manual_seed(0)
    compared = 0
    for place, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.base_layer, torch.nn.Linear):
            continue
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        up.data.normal_(std=0.05)
        values = torch.randn(3, down.shape[1])
        added = layer.eval()(values) - plain.get_submodule(place)(values)
        assert torch.allclose(added, 2 * values @ down.T @ up.T, rtol=1e-4, atol=1e-5), place
        compared += 1
    scales = {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)}
    assert scales == {2.0}
    assert compared > 0 or name == "lora-minimal"  # its layers are all of packed attention


def test_by_default_negatives_are_on_and_text_is_frozen(shapes: Path, base: Path) -> None:
    """What a run trains on when nothing is said: each image is asked for what it lacks."""
    config = load_config()
    assert (config.method.name, config.method.freeze) == ("full", None)
    assert config.dataset.negatives == 1
    updates = _updates(shapes, base)
    assert _trained(updates) == EVERY - {"text"}
    splits = load_splits(shapes)
    data = query_dataset(load_config(TINY), splits.train)
    asked = [data[(epoch, index)].find_queries for epoch in range(5) for index in range(4)]
    for queries in asked:
        assert {bool(query.object_ids_output) for query in queries} == {True, False}
    absent = {q.query_text for queries in asked for q in queries if not q.object_ids_output}
    assert absent & set(splits.train.class_names)
    assert absent - set(splits.train.class_names)  # common nouns


def test_adapters_and_activation_checkpointing(shapes: Path, base: Path) -> None:
    """What is recomputed in the backward pass is recomputed with the adapter."""
    gradients = []
    for checkpointing in ("true", "false"):
        words = (
            "method=lora-full",
            "method.lora.parts.text=true",
            f"model.activation_checkpointing={checkpointing}",
        )
        updates = _updates(shapes, base, *words)
        method.set_training(updates.step.model)
        updates.step.batch_losses(next(iter(updates.batches.loader)), 0)["loss"].backward()
        gradients.append(
            {n: p.grad for n, p in updates.step.model.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())


def test_frozen_components_are_in_evaluation_mode(shapes: Path, base: Path) -> None:
    """So that none of their outputs is dropped."""
    updates = _updates(shapes, base, "method=head", "model.dropout=0.3")
    next(updates.epoch(0))
    modes = {name: part.training for name, part in components(updates.step.model).items()}
    assert {name for name, training in modes.items() if training} == _trained(updates)
    assert not any(
        module.training for module in updates.step.model.backbone.vision_backbone.modules()
    )
    assert updates.step.model.training


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=lra"], "Did you mean 'lora'"),
        (["method.freeze=[visoin]"], "method.freeze.0"),
        (["method=lora", "method.freeze=[vision]"], "LoRA freezes all of the model"),
        (["method=lora", "method.lora.rank=0"], "method.lora.rank"),
        (["method=lora", "method.lora.rnk=3"], "Did you mean 'method.lora.rank'"),
    ],
)
def test_settings_that_are_refused(overrides, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(overrides)
    assert said in str(caught.value)


def test_the_resolved_yaml_of_a_method(tmp_path: Path) -> None:
    """It holds keys that only its own method has; another method on the command line wins."""
    config = load_config(["method=lora", "method.lora.rank=3"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config([], tmp_path / "c.yaml") == config
    assert load_config(["method=head"], tmp_path / "c.yaml").method.name == "head"
    (tmp_path / "d.yaml").write_text("method: lora-minimal\n")
    assert load_config([], tmp_path / "d.yaml").method.name == "lora-minimal"


@pytest.fixture
def train(command: Command, shapes: Path, base: Path, tmp_path: Path):
    def run(*words: object, folder: str = "out", start: object = base) -> Result:
        words = ("--checkpoint", start, *words)
        first = ("train", "--dataset-dir", shapes)
        fast = ("evaluation.pictures=0", *TINY)
        return command(*first, "--output-dir", tmp_path / folder, *words, *fast)

    return run


def test_a_run_with_lora(train, command, shapes, base: Path, tmp_path: Path) -> None:
    done = train("--method", "lora", "--epochs", 1, "--batch-size", 2)
    assert done.code == 0, done.err
    assert "method lora: 0.12 M of 5.37 M parameters trained" in done.out
    assert "text: 3.30 M frozen" in done.out
    assert "lr_scale 1" in done.out
    for folder in ("weights/best", "weights/last", "checkpoints/update-00000002"):
        names = {path.name for path in (tmp_path / "out" / folder).iterdir()}
        assert names - {"state.pt", "run.json", "README.md"} == {adapters.FILE, adapters.CONFIG}
    kept = sum(p.stat().st_size for p in (tmp_path / "out/checkpoints").rglob("*.*") if p.is_file())
    assert kept < base.stat().st_size / 10
    found = command(
        *("infer", "--checkpoint", tmp_path / "out/weights/best", "--prompt", "circle"),
        *("--input", shapes / "valid" / "images", "--output-dir", tmp_path / "found"),
    )
    assert found.code == 0, found.err

    scored = train("--eval-only", folder="eval", start=tmp_path / "out/weights/best")
    assert scored.code == 0, scored.err
    figures = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    trained = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures == {name: trained[name] for name in figures}

    onwards = train("--epochs", 1, folder="full", start=tmp_path / "out/weights/best")
    assert onwards.code == 0, onwards.err
    assert (tmp_path / "full" / "weights" / "best" / weights.FILE).is_file()
    refused = train("--method", "lora", folder="twice", start=tmp_path / "out/weights/best")
    assert refused.code == 2
    assert "python -m app merge" in refused.err


def test_a_stopped_lora_run_resumes_to_the_same_weights(train, tiny_run, tmp_path: Path) -> None:
    words = ("--method", "lora-minimal", "--batch-size", 2, "--epochs", 3)
    words = (*words, "method.lora.parts.vision=true")
    words = (*words, "--checkpoint", tiny_run / "weights" / "best")
    assert train(*words).code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "weights")
    for path in (tmp_path / "cut/checkpoints/update-00000006").iterdir():
        path.unlink()
    done = train(*words, "--resume", folder="cut")
    assert done.code == 0, done.err
    assert "after epoch 2" in done.out
    ours, theirs = (
        load_file(tmp_path / f / "weights/last" / adapters.FILE) for f in ("out", "cut")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_flags_of_freezing(train, base: Path, tmp_path: Path) -> None:
    done = train("--freeze", "vision,text", "--epochs", 1)
    assert done.code == 0, done.err
    assert "vision: 1.07 M frozen" in done.out
    ours, before = load_file(tmp_path / "out/weights/last/model.safetensors"), load_file(base)
    changed = {key for key in ours if not torch.equal(ours[key], before[key])}
    assert changed
    assert not any(key.startswith("backbone.") for key in changed)
    every = train("--freeze", "none", "--epochs", 1, folder="every")
    assert every.code == 0, every.err
    assert "text: 3.30 M of 3.30 M trained" in every.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lora", "--checkpoint", "none"], "adapts trained weights, and these are"),
        (["--method", "lora", "method.lora.targets=['*.qvk']"], "Near: '*.qkv'"),
        (["--freeze", "vision,text,detector,geometry,masks,scoring"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(train, tmp_path: Path, words, said: str) -> None:
    done = train(*words)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()
