"""configs/ composed from the filesystem, checked whole, resolved.

Hydra composes; pydantic refuses what no one reads. A mistyped override is an error with the nearest
known key, never ignored (the most common mistake in forks of upstream).
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from app.config.schema import Config, ModelConfig, problems_of
from app.config.targets import check_targets
from app.config.yaml_data import parse_yaml, read_yaml
from app.errors import UserError, nearest
from app.files import flatten

Checked = TypeVar("Checked", bound=BaseModel)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHOWN = 20  # unknown keys
SHORT = {"limit": "dataset.limit"}  # keys that people write without their group
# Group → the kinds of parts that it may name by `_target_`.
_KINDS = {
    "transforms": ("transforms",),
    "loss": ("losses", "matchers"),
    "optim": ("optimizers", "schedules"),
}


def load_config(
    overrides: Sequence[str] = (), file: Path | None = None, model: ModelConfig | None = None
) -> Config:
    """Compose `configs/train.yaml`, `file` over it, and `overrides` (`KEY=VALUE`) over both.

    Args:
        overrides: `GROUP=CHOICE` takes a file of `configs/GROUP/`, and other keys are set singly.
        file: YAML with some of the keys; its `GROUP: CHOICE` takes a file of that group too.
        model: the size that given weights have; takes the place of `configs/model/`.

    Raises:
        UserError: an unknown key (with the nearest known one), a value out of range, an
            interpolation that cannot be resolved; every one of them.
    """
    asked = dict(text.partition("=")[::2] for text in overrides if _key(text) in _config_groups())
    values = [text for text in overrides if _key(text) not in asked]
    content = {} if file is None else _read_settings(file)
    choices, content = _split_choices(content, asked)
    composed = _compose(choices)
    own = _interpolations(composed)
    if unknown := _unknown_keys(content, composed):
        raise UserError([f"{file}: {problem}" for problem in unknown])
    if model is not None:
        composed.model = model.model_dump()
    try:
        composed.merge_with(content)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    for text in values:
        _override(composed, text)
    config = _checked(Config, composed, own)
    problems = [
        problem
        for name, kinds in _KINDS.items()
        for problem in check_targets(getattr(config, name).model_dump(), name, kinds)
    ]
    if problems:
        raise UserError(problems)
    return config


def load_model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """Return the size `configs/model/<name>.yaml`.

    Args:
        overrides: `model.KEY=VALUE`.
    """
    content = read_yaml(_choice_file("model", name))
    if "defaults" in content:  # another file's keys below its own: Hydra's to compose
        return load_config([f"model={name}", *overrides]).model
    composed = OmegaConf.create({"model": content})
    for text in overrides:
        _override(composed, text)
    return _checked(ModelConfig, composed, {}, "model")


def model_config(content: Mapping[str, Any], where: str) -> ModelConfig:
    """Return a checked size; raise UserError whose lines start with `where`."""
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise UserError([f"{where}: {problem}" for problem in problems_of(error)]) from None


def model_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return `configs/recipe/<name>.yaml`; raise UserError where there is none."""
    recipes = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))
    if name not in recipes:
        raise UserError(
            f"--recipe {name}: there is no such recipe; there are auto, {', '.join(recipes)}."
            f"{nearest(name, recipes)}"
        )
    return CONFIGS / "recipe" / f"{name}.yaml"


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_settings(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a configuration is a mapping of keys to values")
    return content


def _split_choices(
    content: Mapping[str, Any], asked: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Part a file's choices of groups from its other keys.

    A file chooses by `GROUP: CHOICE`, or by `GROUP: {name: CHOICE, …}`, where the other keys then
    change what was chosen. What is asked for on the command line takes the place of both.

    Args:
        content: of the file.
        asked: group → choice, on the command line.

    Returns:
        Group → choice, and the keys to set.
    """
    choices, keys = {}, dict(content)
    for group in set(content) & set(_config_groups()):
        value = content[group]
        name = value.get("name") if isinstance(value, Mapping) else value
        is_choice = isinstance(value, str) or str(name) in _choices(group)
        if is_choice:
            choices[group] = str(name)
        if isinstance(value, str) or (is_choice and group in asked):
            del keys[group]
    return choices | dict(asked), keys


def _compose(choices: Mapping[str, str]) -> DictConfig:
    """Return `configs/train.yaml` with these choices of groups."""
    for group, choice in choices.items():
        _choice_file(group, choice)
    return copy.deepcopy(_composed(tuple(sorted(choices.items()))))


@functools.cache
def _composed(choices: tuple[tuple[str, str], ...]) -> DictConfig:
    """Compose by Hydra, once a process, because that takes a tenth of a second."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("train", [f"{group}={choice}" for group, choice in choices])
    except HydraException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None
    OmegaConf.set_struct(composed, False)
    return composed


def _config_groups() -> list[str]:
    return [path.name for path in CONFIGS.iterdir() if path.is_dir()]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _choice_file(group: str, choice: str) -> Path:
    """Return the YAML of a group's choice; raise UserError with the nearest where there is none."""
    choices = _choices(group)
    if choice not in choices:
        raise UserError(
            f"{group}={choice}: there is no such {group}; there are {', '.join(choices)}."
            f"{nearest(choice, choices)}"
        )
    return CONFIGS / group / f"{choice}.yaml"


def _unknown_keys(content: Mapping[str, Any], composed: DictConfig) -> list[str]:
    known = _leaves(composed)
    unknown = (key for key in _leaves(content) if not _is_known(key, known))
    return [
        f"nothing reads '{key}'.{nearest(key, known)}" for key in itertools.islice(unknown, SHOWN)
    ]


def _override(composed: DictConfig, text: str) -> None:
    """Set the key of `KEY=VALUE` in place."""
    key, equals, value = text.partition("=")
    key = SHORT.get(key, key)
    known = _leaves(composed)
    if not equals:
        raise UserError(f"'{text}': an override is KEY=VALUE.{nearest(text, known)}")
    if not _is_known(key, known):
        raise UserError(f"'{text}': nothing reads the key '{key}'.{nearest_key(key, known)}")
    try:
        parsed = value if _is_text(key) and value != "null" else parse_yaml(value, f"'{text}'")
        if isinstance(parsed, str) and not _is_text(key) and _is_number(value):
            parsed = float(value)  # YAML 1.1 reads 1e-4 as text; people write it as a number
        OmegaConf.update(composed, key, parsed, merge=False, force_add=True)
    except OmegaConfBaseException as error:
        raise UserError(f"'{text}': {' '.join(str(error).split())}") from None


def nearest_key(key: str, known: Sequence[str]) -> str:
    """Suggest like `nearest`, but for a bare leaf (`epochs`) its full key (`training.epochs`)."""
    leaf = key.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    matches = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    return f" Did you mean '{by_leaf[matches[0]]}'?" if matches else nearest(key, known)


def _is_text(key: str) -> bool:
    """Return whether the schema wants text: a folder may be called 2024, or [a]."""
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


def _leaves(node: Any) -> list[str]:
    """Return the dotted names of all leaves; items of lists by their index."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    return list(flatten(node, lists=True))


def _interpolations(composed: DictConfig) -> dict[str, str]:
    """Return the text of each leaf that OmegaConf would take for a reference, by its key."""
    return {
        key: value
        for key, value in flatten(
            OmegaConf.to_container(composed, resolve=False), lists=True
        ).items()
        if "${" in str(value)
    }


def _checked(
    schema: type[Checked], composed: DictConfig, own: Mapping[str, str], key: str | None = None
) -> Checked:
    """Resolve the interpolations and check all, or what stands at `key`, against the schema.

    Args:
        own: the interpolations of `configs/`. Others would read the environment, whose secrets
            would be written to the run's folder, or grow without bounds.
    """
    foreign = [name for name, text in _interpolations(composed).items() if own.get(name) != text]
    if foreign:
        raise UserError(
            [f"{name}: '${{…}}' is for configs/ alone; write the value itself" for name in foreign]
        )
    try:
        content: Any = OmegaConf.to_container(composed, resolve=True)
        return schema.model_validate(content if key is None else content[key])
    except OmegaConfBaseException as error:
        raise UserError(f"Configuration: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(problems_of(error)) from None
