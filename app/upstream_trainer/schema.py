"""Recognise a YAML in the schema of upstream's Trainer."""

from __future__ import annotations

from pathlib import Path

from app.config.compose import CONFIGS, read_yaml

BASE_CONFIG = CONFIGS / "upstream" / "full_finetune.yaml"


def is_upstream_schema(file: Path) -> bool:
    """Return whether a YAML has upstream's schema, told by `trainer._target_`."""
    content = read_yaml(file)
    trainer = content.get("trainer") if isinstance(content, dict) else None
    target = trainer.get("_target_", "") if isinstance(trainer, dict) else ""
    return str(target).startswith("sam3.train.")
