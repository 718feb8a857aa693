"""configs/ composed from the filesystem, checked whole, resolved.

Hydra composes; pydantic refuses what no one reads. A mistyped override is an error with the nearest
known key, never ignored (the most common mistake in forks of upstream).
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from app.config.schema import Config, ModelConfig
from app.errors import UserError, nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT = {"limit": "dataset.limit"}  # keys that people write without their group
# A configuration may come from outside: it may name upstream's parts and ours, and no other code.
TARGETS = ("sam3.", "app.", "torch.optim.", "torch.nn.", "fvcore.common.param_scheduler.")


def load_config(
    overrides: Sequence[str] = (), file: Path | None = None, model: ModelConfig | None = None
) -> Config:
    """Compose `configs/train.yaml`, `file` over it, and `overrides` (`KEY=VALUE`) over both.

    Args:
        model: the size that given weights have; takes the place of `configs/model/`.

    Raises:
        UserError: an unknown key (with the nearest known one), a value out of range, an
            interpolation that cannot be resolved; all that are found.
    """
    groups = [text for text in overrides if _key(text) in _config_groups()]
    values = [text for text in overrides if text not in groups]
    composed = _compose("train", [_check_group(text) for text in groups])
    if file is not None:
        composed = _merge_file(composed, file, {_key(text) for text in groups})
    if model is not None:
        changes = _model_changes(file)
        composed.model = OmegaConf.merge(model.model_dump(), changes)
    for text in values:
        composed = _override(composed, text)
    return _validate(composed)


def load_model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """The size `configs/model/<name>.yaml`."""
    return load_config([f"model={name}", *overrides]).model


def model_config(content: Mapping[str, Any], where: str) -> ModelConfig:
    """A checked size; raises UserError that starts with `where`."""
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise UserError([f"{where}: {_problem(item)}" for item in error.errors()]) from None


def model_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """`configs/recipe/<name>.yaml`; raises UserError where there is none."""
    recipes = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))
    if name not in recipes:
        raise UserError(
            f"--recipe {name}: there is no such recipe; there are auto, {', '.join(recipes)}."
            f"{nearest(name, recipes)}"
        )
    return CONFIGS / "recipe" / f"{name}.yaml"


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(file: Path) -> Any:
    """Parse YAML that is data only; raises UserError that names the place."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: broken YAML: {' '.join(str(error).split())}") from None


def check_targets(node: Any, where: str) -> list[str]:
    """Problems of every `_target_` in `node`: unknown, not allowed, given keys it never reads."""
    if isinstance(node, list):
        return [p for i, item in enumerate(node) for p in check_targets(item, f"{where}[{i}]")]
    if not isinstance(node, Mapping):
        return []
    problems = _check_target(node, where) if "_target_" in node else []
    return problems + [p for k, v in node.items() for p in check_targets(v, f"{where}.{k}")]


def _check_target(node: Mapping[str, Any], where: str) -> list[str]:
    target = str(node["_target_"])
    if not target.startswith(TARGETS):
        return [f"{where}._target_: '{target}' is not allowed; targets start with {TARGETS}"]
    module, _, name = target.rpartition(".")
    try:
        part = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return [f"{where}._target_: there is no '{target}'"]
    parameters = inspect.signature(part).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        f"{where}.{key}: {target} reads no '{key}'.{nearest(key, parameters)}"
        for key in node
        if key not in parameters and not key.startswith("_")
    ]


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """Composed once a process: Hydra takes a tenth of a second."""
    return copy.deepcopy(_composed(name, tuple(overrides)))


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except HydraException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None


def _config_groups() -> list[str]:
    return [path.name for path in CONFIGS.iterdir() if path.is_dir()]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _check_group(override: str) -> str:
    group, _, choice = override.partition("=")
    choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if choice not in choices:
        raise UserError(
            f"{group}={choice}: there is no such {group}; there are {', '.join(choices)}."
            f"{nearest(choice, choices)}"
        )
    return override


def _merge_file(composed: DictConfig, file: Path, decided: Collection[str]) -> DictConfig:
    """`file` over what is composed, but for its choice of the groups that are `decided`."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a configuration is a mapping of keys to values")
    for group in set(content) & set(_config_groups()):
        choice = _choice(group, content[group])
        if isinstance(content[group], str) or (choice and group in decided):
            del content[group]
        if choice and group not in decided:
            composed = _regroup(composed, group, choice)
    known = _leaves(composed)
    unknown = [key for key in _leaves(content) if not _is_known(key, known)]
    if unknown:
        raise UserError([f"{file}: nothing reads '{key}'.{nearest(key, known)}" for key in unknown])
    merged = OmegaConf.merge(composed, OmegaConf.create(content))
    assert isinstance(merged, DictConfig)
    return merged


def _choice(group: str, value: Any) -> str | None:
    """The YAML that a file's `group: choice` names, or `group: {name: choice, …}` starts from."""
    if isinstance(value, str):
        return value
    name = str(value.get("name")) if isinstance(value, Mapping) else ""
    return name if (CONFIGS / group / f"{name}.yaml").is_file() else None


def _model_changes(file: Path | None) -> Mapping[str, Any]:
    """Single keys of the size that a file sets; a size's name was seen to before."""
    changes = read_yaml(file).get("model", {}) if file is not None else {}
    return changes if isinstance(changes, Mapping) else {}


def _regroup(composed: DictConfig, group: str, choice: str) -> DictConfig:
    OmegaConf.set_struct(composed, False)
    composed[group] = _compose("train", [_check_group(f"{group}={choice}")])[group]
    return composed


def _override(composed: DictConfig, text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    key = SHORT.get(key, key)
    known = _leaves(composed)
    if not equals:
        raise UserError(f"'{text}': an override is KEY=VALUE.{nearest(text, known)}")
    if not _is_known(key, known):
        raise UserError(f"'{text}': nothing reads the key '{key}'.{nearest_key(key, known)}")
    try:
        parsed = value if _is_text(key) and value != "null" else yaml.safe_load(value)
        if isinstance(parsed, str) and not _is_text(key) and _is_number(value):
            parsed = float(value)  # YAML 1.1 reads 1e-4 as text; people write it as a number
        OmegaConf.update(composed, key, parsed, merge=False, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"'{text}': {' '.join(str(error).split())}") from None
    return composed


def nearest_key(key: str, known: Sequence[str]) -> str:
    """Like `nearest`, but a bare leaf (`epochs`) finds its full key (`training.epochs`) first."""
    leaf = key.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    matches = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    return f" Did you mean '{by_leaf[matches[0]]}'?" if matches else nearest(key, known)


def _is_text(key: str) -> bool:
    """Whether the schema wants text: a folder may be called 2024, or [a]."""
    schema: Any = Config
    for name in key.split("."):
        field = getattr(schema, "model_fields", {}).get(name)
        schema = field.annotation if field is not None else None
    return schema in (str, str | None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_known(key: str, known: Sequence[str]) -> bool:
    # A part named by `_target_` takes whatever its signature reads; `check_targets` sees to that.
    parts = [name.rpartition("._target_")[0] for name in known if name.endswith("._target_")]
    return (
        key in known
        or any(name.startswith(f"{key}.") for name in known)
        or any(key.startswith(f"{part}.") for part in parts)
    )


def _leaves(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaves; list items by their index."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        items = [(str(index), value) for index, value in enumerate(node)]
    else:
        return [prefix.rstrip(".")]
    return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}{key}.")]


def _validate(composed: DictConfig) -> Config:
    if "${oc.env" in OmegaConf.to_yaml(composed):  # its value would be written to the run's folder
        raise UserError("${oc.env:…}: a configuration reads no environment variables")
    try:
        content = OmegaConf.to_container(composed, resolve=True)
        config = Config.model_validate(content)
    except OmegaConfBaseException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError([_problem(item) for item in error.errors()]) from None
    problems = [
        problem
        for name in ("transforms", "loss", "optim")
        for problem in check_targets(getattr(config, name).model_dump(), name)
    ]
    if problems:
        raise UserError(problems)
    return config


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{where}: nothing reads this key"
    if item["type"] == "value_error":
        return message
    return f"{where}: {message} (it is {item['input']!r})"
