"""Recognise a YAML in the schema of upstream's Trainer, and read it with what it builds on."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from app.config.compose import CONFIGS
from app.config.yaml_data import read_yaml
from app.errors import UserError

BASE_CONFIG = CONFIGS / "upstream" / "full_finetune.yaml"


def is_upstream_schema(file: Path) -> bool:
    """Return whether a YAML has upstream's schema, told by its parts of upstream's in `trainer`."""
    content = read_yaml(file)
    trainer = content.get("trainer") if isinstance(content, dict) else None
    return "sam3.train." in str(trainer)


def read_upstream(file: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """Read a YAML over those that its `defaults` name.

    Hydra would look for them in upstream's package; here they lie in the folders above the file.

    Args:
        above: the YAMLs that build on this one.

    Raises:
        UserError: one of them is not there, or they build on each other.
    """
    content = read_yaml(file)
    defaults = content.pop("defaults", []) if isinstance(content, dict) else None
    if not isinstance(defaults, list):
        raise UserError(f"{file}: must be a mapping of keys to values, and its defaults a list")
    if file.resolve() in above:
        raise UserError(f"{file}: its defaults lead back to itself")
    bases = [str(name) for name in defaults if name != "_self_"]
    read = (read_upstream(_find(name, file), (*above, file.resolve())) for name in bases)
    merged = OmegaConf.merge(*read, content)
    assert isinstance(merged, DictConfig)
    return merged


def _find(name: str, file: Path) -> Path:
    relative = Path(name.strip("/").removesuffix(".yaml") + ".yaml")
    folders = file.resolve().parents
    places = [folders[0] / relative.name, *(folder / relative for folder in folders)]
    found = [place for place in places if place.is_file() and place != file.resolve()]
    if not found:
        raise UserError(
            f"{file}: builds on '{name}', and no folder above it holds {relative}; keep both where "
            f"upstream has them, or lay {relative.name} beside it"
        )
    return found[0]
