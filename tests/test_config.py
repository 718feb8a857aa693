"""Composition, overrides, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import hydra
import hydra.utils
import pytest
import yaml
from omegaconf import DictConfig

from app.config import compose
from app.config.compose import CONFIGS, load_config, load_model_config, model_names, to_yaml
from app.config.schema import Config
from app.config.shapes import COLOR_NAMES, KINDS, ShapesConfig
from app.config.targets import PARTS
from app.datasets.build import load_splits
from app.datasets.synthetic.drawing import COLORS, INSIDE
from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError


def test_every_size_and_group_composes() -> None:
    assert model_names() == ["nano", "sam3", "small", "small-text"]
    for name in model_names():
        assert load_model_config(name).name == name
    assert load_config(["loss=boxes"]).loss.criterion["loss_fn_semantic_seg"] is None


def test_bytes_are_not_normalized_by_upstreams_transform() -> None:
    """ToSquare made numbers once; lists of that time are told what to change."""
    square = "{_target_: app.datasets.queries.ToSquare, resolution: 64}"
    normalize = (
        "{_target_: sam3.train.transforms.basic_for_api.NormalizeAPI,"
        " mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"
    )
    with pytest.raises(UserError, match=r"name app\.datasets\.queries\.ShareBoxes in its place"):
        load_config([f"transforms.train=[{square}, {normalize}]"])


def test_a_size_is_read_from_its_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: load_config([f"model={name}"]).model for name in model_names()}
    monkeypatch.setattr(compose, "compose", None)  # Hydra's: a call would fail
    compose._composed.cache_clear()
    assert {name: load_model_config(name) for name in model_names()} == whole
    assert load_model_config("sam3", ["model.resolution=672"]).resolution == 672
    with pytest.raises(UserError, match=r"Did you mean 'model\.resolution'"):
        load_model_config("sam3", ["model.resolutio=672"])
    with pytest.raises(UserError, match="Did you mean 'nano'"):
        load_model_config("nan")


def test_choices_of_a_file_and_of_the_command_line_are_composed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[list[str]] = []

    def counted(name: str, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return hydra.compose(name, overrides)

    monkeypatch.setattr(compose, "compose", counted)
    compose._composed.cache_clear()
    (tmp_path / "c.yaml").write_text(
        "model: small\ntransforms: none\nloss: boxes\nmethod: {name: lora, freeze: null}\n"
    )
    for _ in range(2):
        config = load_config(["loss=full", "seed=3"], tmp_path / "c.yaml")
    assert (config.model.name, config.method.name) == ("small", "lora")
    assert config.loss.criterion["loss_fn_semantic_seg"] is not None
    assert len(composed) == 1


def test_a_size_given_whole_takes_the_place_of_the_files(tmp_path: Path) -> None:
    """But for single keys that a file sets."""
    (tmp_path / "c.yaml").write_text("model: {dropout: 0.2}\n")
    given = load_model_config("small", ["model.resolution=336"])
    config = load_config(["model.num_queries=7"], tmp_path / "c.yaml", given)
    assert config.model == given.model_copy(update={"dropout": 0.2, "num_queries": 7})


def test_the_resolved_yaml_makes_the_same_config(tmp_path: Path) -> None:
    config = load_config(["training.epochs=7", "optim.lr=1e-4", "model.resolution=96"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([], tmp_path / "config.yaml") == config


def test_order_file_then_override(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {epochs: 4, batch_size: 3}\nmodel: small\n")
    config = load_config(["training.epochs=5"], tmp_path / "c.yaml")
    assert (config.training.epochs, config.training.batch_size) == (5, 3)
    assert config.model.name == "small"


def test_values_keep_their_kind() -> None:
    config = load_config(
        ["optim.lr=1e-4", "dataset.dir=1e3", "dataset.limit=null", "training.num_workers=0"]
    )
    assert config.optim.lr == 1e-4
    assert config.dataset.dir == "1e3"
    assert load_config(["dataset.dir=[a]: b"]).dataset.dir == "[a]: b"
    assert load_config(["dataset.dir=null"]).dataset.dir is None
    assert config.training.num_workers == 0


def test_shapes_are_drawn_as_the_command_line_says(tmp_path: Path) -> None:
    shapes = load_config(
        [
            *("dataset.shapes.kinds=[circle,star]", "dataset.shapes.colors=[red, blue]"),
            *("dataset.shapes.label_by=both", "dataset.shapes.exclude=[red circle]"),
            *("dataset.shapes.train=2", "dataset.shapes.valid=1", "dataset.shapes.width=64"),
        ]
    ).dataset.shapes
    make_shapes(tmp_path / "s", seed=0, **shapes.model_dump())
    names = load_splits(tmp_path / "s").train.class_names
    assert names == ["blue circle", "red star", "blue star"]


def test_the_default_shapes_are_those_of_the_schema() -> None:
    assert load_config().dataset.shapes == ShapesConfig()
    assert set(COLORS) == set(COLOR_NAMES)
    assert set(INSIDE) == set(KINDS)


def test_limit_may_be_said_alone() -> None:
    assert load_config(["limit=7"]).dataset.limit == 7


def test_a_part_takes_what_its_signature_reads() -> None:
    config = load_config(["optim.optimizer.eps=1e-6", "optim.optimizer.betas=[0.9, 0.95]"])
    assert config.optim.optimizer["eps"] == 1e-6
    assert config.optim.optimizer["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epoch=3", "Did you mean 'training.epochs'"),
        ("epochs=3", "Did you mean 'training.epochs'"),
        ("optim.learning_rate=1", "nothing reads the key 'optim.learning_rate'"),
        ("optim.optimizer.fusd=true", "reads no 'fusd'. Did you mean 'fused'"),
        ("model=nan", "Did you mean 'nano'"),
        ("loss=box", "Did you mean 'boxes'"),
        ("training.epochs", "an override is KEY=VALUE"),
        ("training.epochs=0", "greater than or equal to 1"),
        ("training.epochs=many", "valid integer"),
        ("training.precision=fp8", "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("model.name=${nowhere}", "model.name: '${…}' is for configs/ alone"),
        ("optim.optimizer._target_=os.system", "not allowed"),
        ("optim.optimizer._target_=torch.optim.Adamw", "Did you mean 'torch.optim.Adam"),
        ("output_dir=${oc.env:HF_TOKEN}", "output_dir: '${…}' is for configs/ alone"),
        ("dataset.near_misses=['${ oc.env:HF_TOKEN}']", "near_misses: '${…}' is for configs/"),
        ("dataset.near_misses=['${oc.${seed}:HF_TOKEN}']", "near_misses: '${…}' is for configs/"),
        ("optim.optimizer._target_=app.files.write_text", "'app.files.write_text' is not allowed"),
        ("optim.optimizer._target_=torch.optim.optimizer.warnings.warn", "not allowed here"),
        ("optim.optimizer._args_=[{_target_: os.getcwd}]", "_args_[0]._target_: 'os.getcwd' is"),
        ("optim.optimizer.eps={_target_: app.files.Path}", "optimizer.eps._target_: 'app.files."),
        ("loss.matcher._target_=torch.optim.AdamW", "losses, matchers can be named"),
        ("optim.options.lr=[{module_cls_names: [this.x]}]", "module_cls_names: 'this.x' is not"),
        ("optim.lr=.inf", "finite number"),
        (f"seed={'9' * 6000}", "a number of 6000 characters"),
        ("training.epochs=[", "training.epochs=["),
        ("dataset.shapes.kinds=[circl]", "'circl': there are circle"),
        ("dataset.shapes.kinds=[]", "kinds is empty"),
        ("dataset.shapes.background=plaid", "Did you mean 'plain'"),
        ("dataset.shapes.label_by=both", "needs colors"),
        ("dataset.shapes.min_shapes=6", "min_shapes is 6: must be 1 to 3"),
    ],
)
def test_what_no_one_reads_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([override])
    assert said in str(caught.value)


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["training.epochs=0", "optim.lr=-1", "seed=x"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainin: {epochs: 3}", "Did you mean 'training.epochs'"),
        ("training: {epochs: 3", "broken YAML"),
        ("- a", "a mapping of keys"),
        ("a: !!python/object/apply:os.system ['true']", "broken YAML"),
        ("training: {epochs: -2}", "greater than or equal to 1"),
    ],
)
def test_a_file_is_checked_like_the_command_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([], tmp_path / "c.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000, "deep"),
        (f"seed: {'9' * 6000}", "a number of 6000 characters"),
        ("output_dir: 2024-13-45\nseed: !!timestamp 2024-13-45", "stands for no plain value"),
        ("seed: &a [*a]", "stands within itself"),
        ('output_dir: "a\\0b"', "the character NUL"),
        (f"loss: {{name: {'x' * 5000}}}", "nothing reads 'loss.name'"),
        ("null: 3", "nothing reads 'None'"),
        ("model: [1]", "c.yaml"),
        ("x" * (1 << 21), "has more than the 1048576 bytes"),
    ],
)
def test_what_would_stop_the_program_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([], tmp_path / "c.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["loss.criterion.x", "dataset.near_misses"])
def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(
    tmp_path: Path, key: str
) -> None:
    levels = [f"&l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    bomb = f"[&l0 [{', '.join('x' * 9)}], {', '.join(levels)}]"
    for part in reversed(key.split(".")):
        bomb = f"{{{part}: {bomb}}}"
    (tmp_path / "c.yaml").write_text(bomb)
    began = time.process_time()
    with pytest.raises(UserError, match="more than 50000 values"):
        load_config([], tmp_path / "c.yaml")
    assert time.process_time() - began < 5


def test_a_date_is_the_text_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: 2024-13-45\n")
    assert load_config([], tmp_path / "c.yaml").output_dir == "2024-13-45"


def test_a_secret_is_not_read_through_the_size_that_weights_carry(monkeypatch) -> None:
    """Their header comes from outside as any file does."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    given = load_model_config("nano").model_copy(update={"vocabulary": ["${oc.env:HF_TOKEN}"]})
    with pytest.raises(UserError, match=r"model\.vocabulary: '\$\{…\}' is for configs/ alone"):
        load_config([], None, given)


def test_parts_of_our_own_are_all_there() -> None:
    """A name that upstream does not have would refuse what it stands for."""
    for parts in PARTS.values():
        for part in parts:
            assert callable(hydra.utils.get_object(part)), part


def test_the_command_line_chooses_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("transforms: strong\noptim: {lr: 1.0e-5}\n")
    assert load_config([], tmp_path / "c.yaml").transforms.augment.rotate == 15
    chosen = load_config(["transforms=none", "optim.lr=1e-6"], tmp_path / "c.yaml")
    assert chosen.transforms.augment.rotate == 0
    assert chosen.optim.lr == 1e-6


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config([], tmp_path / "none.yaml")


def test_every_key_of_our_schema_is_read_by_the_code() -> None:
    """A field that only the schema knows would be a flag that does nothing."""
    sources = [p.read_text() for p in (CONFIGS.parent / "app").rglob("*.py")]
    sources += [p.read_text() for p in CONFIGS.rglob("*.yaml")]
    code = "\n".join(s for s in sources if "class Config(_Strict)" not in s)

    def fields(schema, prefix=""):
        for name, field in schema.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Config.__base__):
                yield from fields(inner, f"{prefix}{name}.")
            else:
                yield name, f"{prefix}{name}"

    # `dataset.shapes` goes to make_shapes whole, by keyword; `mlp_units` is made of mlp_ratio.
    code = code.replace(".mlp_units", ".mlp_units .mlp_ratio")
    unread = [
        path
        for name, path in fields(Config)
        if f".{name}" not in code and not path.startswith("dataset.shapes.")
    ]
    assert not unread


def test_yaml_files_explain_every_key() -> None:
    """One YAML a concern, every key of our own schema with a comment or a telling name."""
    content = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    lines = (CONFIGS / "train.yaml").read_text().splitlines()
    assert set(content) >= {"output_dir", "checkpoint", "seed", "dataset", "training"}
    bare = [line for line in lines if ": " in line and "#" not in line and not line.endswith(":")]
    assert [line.strip().split(":")[0] for line in bare] == [
        "- model",
        "- loss",
        "- optim",
        "epochs",
    ]
