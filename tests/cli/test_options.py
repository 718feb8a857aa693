"""Flags that stand in one dataclass and become flags of a command."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from app.cli import options
from app.errors import UserError


@dataclass(frozen=True)
class Flags:
    """Hold two flags."""

    size: Annotated[int, typer.Option(min=1, help="pixels")] = 3
    words: Annotated[list[str] | None, typer.Option("--word")] = None


def _app(calls: list[object]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @options.with_flags
    def command(
        *, file: Annotated[Path, typer.Argument()], flags: Flags, loud: bool = False
    ) -> None:
        """Do something."""
        calls.append((file, flags, loud))

    return app


def test_the_command_gets_the_dataclass() -> None:
    calls: list[object] = []
    run = CliRunner().invoke
    words = ["a.txt", "--size", "5", "--word", "x", "--word", "y", "--loud"]
    assert run(_app(calls), words).exit_code == 0
    assert run(_app(calls), ["b.txt"]).exit_code == 0
    assert calls == [
        (Path("a.txt"), Flags(5, ["x", "y"]), True),
        (Path("b.txt"), Flags(), False),
    ]


def test_the_flags_are_checked_and_shown() -> None:
    calls: list[object] = []
    assert CliRunner().invoke(_app(calls), ["a", "--size", "0"]).exit_code == 2
    assert CliRunner().invoke(_app(calls), ["a", "--flags", "1"]).exit_code == 2
    shown = CliRunner().invoke(_app(calls), ["--help"]).output
    assert "Do something." in shown
    assert "--size" in shown
    assert "pixels" in shown
    assert "[default: 3]" in shown
    assert calls == []


def test_two_flags_of_one_name_are_refused() -> None:
    def command(*, size: int = 1, flags: Flags) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        options.with_flags(command)


def test_flags_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        options.SourceFlags().format = "coco"  # type: ignore[misc]


def test_flags_that_were_given_win_over_overrides() -> None:
    flags = options.SourceFlags(dataset_dir="mine", format="yolo")
    assert options.to_overrides(["dataset.format=coco", "seed=1"], flags.by_key()) == [
        "dataset.format=coco",
        "seed=1",
        "dataset.dir=mine",
        "dataset.format=yolo",
    ]
    assert options.to_overrides(None, options.SourceFlags().by_key()) == []


def test_a_newest_run_of_the_future_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock was ahead when it was written: later runs seem older."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.log, "propagate", True)
    for name, ahead in (("ahead", 86_400), ("train", 0)):
        file = Path("outputs") / name / "weights/best/model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time.time() + ahead, time.time() + ahead))
    with caplog.at_level("INFO", logger="app"):
        assert options.last_weights("last") == "outputs/ahead/weights/best"
        assert "by a date in the future: name the run" in caplog.text
        caplog.clear()
        shutil.rmtree("outputs/ahead")
        assert options.last_weights("last") == "outputs/train/weights/best"
        assert "future" not in caplog.text


def test_last_is_the_run_that_wrote_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best weights, whatever their kind; a file called so is meant by name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in outputs has weights"):
        options.last_weights("last")
    for age, file in enumerate(
        (
            "outputs/sub/train-2/weights/best/adapter_model.safetensors",
            "outputs/train/weights/best/model.safetensors",
            "outputs/train-3/weights/last/model.safetensors",  # killed before its first validation
        )
    ):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
        os.utime(file, (1000 - age, 1000 - age))
    best = "outputs/sub/train-2/weights/best"
    assert options.last_weights("last") == best
    assert options.last_weights(Path("last")) == Path(best)
    assert options.last_weights("elsewhere") == "elsewhere"
    assert options.last_weights(None) is None
    Path("last").mkdir()
    assert options.last_weights("last") == "last"
