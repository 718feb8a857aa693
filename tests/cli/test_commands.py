"""The table of commands: what it lists, imports and refuses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from app.__main__ import COMMANDS
from app.model.bundled import NANO
from tests.helpers import REPOSITORY, Command, run_apart

# Sources of labelled images, alike in each command that reads them.
SOURCES = ("--dataset-dir", "--hf-dataset", "--hf-config", "--hf-split", "--columns", "--roboflow")


def _command(name: str) -> object:
    return get_command(importlib.import_module(f"app.cli.{name}").cli)


def _panels(name: str) -> dict[str, str]:
    """Return the panel of each flag."""
    command = _command(name)
    return {
        flag: param.rich_help_panel
        for param in command.params  # type: ignore[attr-defined]
        for flag in param.opts
        if flag.startswith("--")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    assert _command(name).help == COMMANDS[name]  # type: ignore[attr-defined]


def test_each_file_of_a_command_is_in_the_table() -> None:
    shared = {"__init__", "options", "training", "sweeping", "scaling"}
    files = {file.stem for file in (REPOSITORY / "app" / "cli").glob("*.py")} - shared
    assert files == {*COMMANDS}
    data = _command("data")
    assert isinstance(data, TyperGroup)
    assert [*data.commands] == ["check", "fix", "build", "films"]


def test_help_lists_all_commands(command: Command) -> None:
    done = command("--help")
    assert done.code == 0
    assert re.findall(r"^│ (\w+)  +\S", done.out, flags=re.MULTILINE) == [*COMMANDS]
    assert command("-h").out == done.out


def test_an_unknown_command_is_refused_with_the_nearest(command: Command) -> None:
    done = command("tran")
    assert done.code == 2
    assert "No such command 'tran'" in done.err
    assert "'train'" in done.err


def test_an_unknown_flag_is_refused(command: Command) -> None:
    done = command("infer", "--treshold", "1")
    assert done.code == 2
    assert "--threshold" in done.err


@pytest.mark.parametrize("name", ["train", "infer", "evaluate", "compact", "export", "label"])
def test_long_help_is_in_panels(name: str) -> None:
    outside = [flag for flag, panel in _panels(name).items() if panel is None]
    assert outside == []


def test_panels_of_train(command: Command) -> None:
    panels = _panels("train")
    assert {panels[flag] for flag in SOURCES} == {"Data"}
    shown = command("train", "--help").out
    listed = re.findall(r"^╭─ (\w+)", shown, flags=re.MULTILINE)
    assert listed == [
        *("Arguments", "Options", "Data", "Labels", "Model", "Method", "Schedule", "Output"),
        "Cluster",
    ]
    assert {*panels.values()} == {*listed[2:]}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown_whole(command: Command, name: str) -> None:
    """Words in brackets too, which rich takes for the name of a style, and leaves out."""
    called = _command(name)
    inner = called.commands if isinstance(called, TyperGroup) else {"": called}
    for verb, one in inner.items():
        shown = command(*filter(None, (name, verb)), "--help").out
        for param in one.params:  # type: ignore[attr-defined]
            assert param.help, f"{verb} {param.name}"
            said = param.show_default if isinstance(param.show_default, str) else ""
            missing = {*re.findall(r"\w+", f"{param.help} {said}")} - {*re.findall(r"\w+", shown)}
            assert not missing, f"{verb} {param.name}"


@pytest.mark.parametrize("name", ["train", "evaluate", "compact", "export"])
def test_sources_are_the_same_flags_everywhere(name: str) -> None:
    assert {*SOURCES} <= {*_panels(name)}
    assert ("--dataset-format" if name == "export" else "--format") in _panels(name)


# Each takes from a tenth of a second to two seconds to import.
HEAVY = (
    *("accelerate", "boto3", "cv2", "datasets", "httpx", "huggingface_hub", "matplotlib"),
    *("mlflow", "numpy", "pandas", "peft", "pycocotools", "sam3", "scipy", "skimage"),
    *("tensorboard", "timm", "torch", "torchvision", "transformers"),
)


@pytest.mark.parametrize("words", [("--help",), *((name, "--help") for name in COMMANDS)])
def test_help_imports_nothing_that_takes_long(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom app.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "loaded = {name for name, module in sys.modules.items() if 'later' not in vars(module)}\n"
        f"print(*(loaded & {{*{HEAVY!r}}}), file=sys.stderr)"  # not those that wait (lazy.py)
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--help" in done.stdout
    assert done.stderr.split() == []


def test_modules_in_the_callers_folder_are_not_run(tmp_path: Path) -> None:
    """It may be a dataset of others, in which somebody has put a module of a library's name."""
    for name in ("typer", "difflib", "yaml", "safetensors"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PYTHONSAFEPATH", None)
    words = [sys.executable, "-m", "app", "merge", "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_paths_that_are_wrong_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Importing it takes seconds; one process is enough to see that nothing of it was."""
    scene, none = REPOSITORY / "examples" / "scene.png", tmp_path / "none"
    adapter, taken, file = tmp_path / "adapter", tmp_path / "taken", tmp_path / "file"
    for path in (adapter / "adapter_model.safetensors", taken / "model.safetensors", file):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    out, found = ("--output-dir", tmp_path / "out"), ("--input", scene, "--prompt", "circle")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("merge", none, *out), "no such checkpoint"),
        (("merge", NANO, *out), "is no adapter"),
        (("merge", adapter, "--output-dir", taken), "holds model.safetensors already"),
        (("merge", adapter, "--output-dir", file / "out"), "is no folder"),
        (("compact", none, *out, "--to", "small"), "no such checkpoint"),
        (("compact", NANO, *out, "--mlp", "0.5", "--dataset-dir", none), "no such folder or zip"),
        (
            ("compact", NANO, *out, "--mlp", "0.5", "--images", none),
            f"--images {none}: no such file",
        ),
        (("compact", NANO, *out, "--mlp", "0.5", "--width", "magic"), "give one of taylor"),
        (("compact", NANO, "--output-dir", taken, "--mlp", "0.5"), "holds model.safetensors"),
        (("compact", NANO, "--output-dir", file / "out", "--mlp", "0.5"), "is no folder"),
        (("export", NANO, *out, "--dataset-dir", none), "no such folder or zip"),
        (("export", none, *out), "no such checkpoint"),
        (("export", NANO, *out, "--images", none), f"--images {none}: no such file, folder"),
        (("train", "--dataset-dir", none), "no such folder or zip"),
        (("train", f"dataset.dir={none}", *out), "no such folder or zip"),
        (("train", "--checkpoint", none), "no such checkpoint"),
        (("train", "--teacher", none), "no such checkpoint"),
        (("evaluate", "--checkpoint", none, "--dataset-dir", none), "no such folder or zip"),
        (("infer", "--checkpoint", none, *found, *out), "no such checkpoint"),
        (("label", "--checkpoint", none, *found, *out), "no such checkpoint"),
    ]
    for (words, message), done in zip(cases, run_apart(*(w for w, _ in cases)), strict=True):
        assert (done.code, done.imported_torch) == (2, False), words
        assert message in done.err, words
    assert not (tmp_path / "out").exists()
