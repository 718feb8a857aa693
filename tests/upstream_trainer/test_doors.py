"""A YAML of upstream's may come from anyone: it refers to its own keys, and names known parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from app.errors import UserError
from app.training.prepare import Request
from app.upstream_trainer.adapt import prepare
from app.upstream_trainer.interpolation import check_interpolations, register_resolvers
from app.upstream_trainer.schema import read_upstream
from tests.upstream_trainer import yamls

Change = Callable[[dict[str, Any]], object]


def _prepare(tmp_path: Path, change: Change, **flags: str) -> Any:
    content = yamls.roboflow("train")
    change(content)
    file = yamls.write(tmp_path / "theirs.yaml", content)
    given = {"checkpoint": "none", "output_dir": str(tmp_path / "out")} | flags
    return prepare(Request([], size="nano", file=file), given)


def _set(dotted: str, value: object) -> Change:
    def change(content: dict[str, Any]) -> None:
        *parents, last = dotted.split(".")
        node: Any = content
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.loss.all._target_", "app.files.write_text", "'app.files.write_text' is not"),
        ("trainer.loss.all.matcher", {"_target_": "os.system"}, "'os.system' is not allowed here"),
        ("trainer.loss.all._args_", [{"_target_": "os.getcwd"}], "_args_[0]._target_: 'os.getcwd'"),
        ("trainer.optim.gradient_logger", {"_target_": "torch.load"}, "'torch.load' is not"),
        ("trainer.checkpoint.model_weight_initializer", {"_target_": "torch.load"}, "no parts can"),
        ("trainer.logging.wandb_writer", {"_target_": "wandb.init"}, "'wandb.init' is not"),
        ("trainer._target_", "subprocess.run", "trainer._target_: 'subprocess.run' is not"),
        ("trainer.model._target_", "app.files.write_text", "is not built here"),
        ("trainer.data.val.dataset._target_", "sam3.eval.cgf1_eval.CGF1Evaluator", "not allowed"),
        ("trainer.checkpoint.save_dir", "/home/them", "save_dir: /home/them: is written, and not"),
        ("trainer.logging.log_dir", "${launcher.experiment_log_dir}/../x", "log_dir: "),
        ("trainer.meters.val.valid.detection.dump_dir", "/etc", "dump_dir: /etc: is written"),
        ("trainer.env_variables", {"LD_PRELOAD": "x.so"}, "variables of the environment"),
        ("trainer.data.val.dataset.coco_json_loader.prompts", "print(1)", "is no list of"),
        ("trainer.optim.options.lr.0.module_cls_names", ["this.x"], "'this.x' is not allowed"),
        ("trainer.max_epochs", "${oc.env:HF_TOKEN}", "trainer.max_epochs: "),
        ("trainer.max_epochs", "${ oc.env : HF_TOKEN}", "of resolvers there are add"),
        ("trainer.max_epochs", "${oc.${scratch.x}:HF_TOKEN}", "of resolvers there are add"),
        ("trainer.max_epochs", '${string:"${oc.env:HF_TOKEN}"}', "of resolvers there are add"),
        ("trainer.max_epochs", "${string:{a: ${oc.env:X}}}", "of resolvers there are add"),
        ("trainer.max_epochs", "${get_method:os.system}", "of resolvers there are add"),
        ("trainer.max_epochs", "${range:1000000000000}", "of resolvers there are add"),
        ("trainer.max_epochs", "${pow:9,${pow:9,9}}", "of resolvers there are add"),
        ("trainer.max_epochs", "${times:ab,1000000000}", "is no number"),
        ("trainer.max_epochs", "${", "no viable alternative"),
        ("trainer.max_epochs", "${trainer.max_epochs}", "refers to itself"),
        ("scratch", 3, "scratch: must be a mapping"),
        ("trainer", "sam3.train.", "trainer: must be a mapping"),
    ],
)
def test_what_acts_is_refused(
    command, tmp_path: Path, shapes: Path, key: str, value: object, said: str
) -> None:
    content = yamls.roboflow("train")
    _set(key, value)(content)
    file = yamls.write(tmp_path / "theirs.yaml", content)
    words = ("--model", "nano", "--dataset-dir", shapes, "--output-dir", tmp_path / "out")
    done = command("train", "--config", file, "--checkpoint", "none", *words)
    assert done.code == 2, done.out + done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_what_acts_is_refused_in_an_override_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of resolvers there are add"):
        _prepare(tmp_path, lambda _: None, **{"trainer.max_epochs": "${oc.env:HOME}"})


@pytest.mark.parametrize("kind", ["lists", "texts", "keys with dots"])
def test_references_that_double_again_and_again_are_refused_at_once(kind: str) -> None:
    first = ["x"] * 9 if kind == "lists" else "x" * 9
    content: dict[str, Any] = {"a0": first, "a.b": 1}
    for n in range(1, 40):
        twice = [f"${{a{n - 1}}}"] * 2
        content[f"a{n}"] = twice if kind == "lists" else "".join(twice)
    if kind == "keys with dots":
        content["a"] = {"b": "${a39}${a39}"}
    began = time.process_time()
    with pytest.raises(UserError, match="grows without an end"):
        check_interpolations(OmegaConf.create(content))
    assert time.process_time() - began < 2


def test_references_of_published_yamls_are_resolved() -> None:
    register_resolvers()
    config = OmegaConf.create(
        {
            "names": ["a", "b"],
            "at": {"index": 1, "near": "${.index}", "up": "${..names}", "item": "${names[0]}"},
            "path": "/data/${names.${string:${at.index}}}/x",
            "rate": "${times:8e-4,${divide:${at.index},2}}",
            "whole": "${ceil_int:${add:1.2,${subtract:3,1}}}",
        }
    )
    check_interpolations(config)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    assert resolved["path"] == "/data/b/x"
    assert resolved["rate"] == pytest.approx(4e-4)
    assert resolved["whole"] == 4
    assert resolved["at"] == {"index": 1, "near": 1, "up": ["a", "b"], "item": "a"}


def test_yamls_that_build_on_each_other_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [{base}, _self_]\n")
    with pytest.raises(UserError, match="lead back to itself"):
        read_upstream(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping"):
        read_upstream(tmp_path / "c.yaml")
