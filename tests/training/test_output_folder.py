"""What a run makes of the folder that it is to write to."""

from __future__ import annotations

from pathlib import Path

from app.training.output_folder import prepare_folder


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """Their files are those that `files.atomic_path` has not moved into place."""
    best = tmp_path / "weights" / "best"
    best.mkdir(parents=True)
    left = [tmp_path / ".report.html.x1y2z3.html", best / ".model.safetensors.a.safetensors"]
    kept = [tmp_path / ".notes", tmp_path / "report.html", best / "model.safetensors"]
    for file in (*left, *kept):
        file.touch()
    prepare_folder(tmp_path, resume="all", overwrite=False)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in kept)
