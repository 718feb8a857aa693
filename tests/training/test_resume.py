"""Stopped anywhere and resumed, a run ends at the weights of one that was never stopped."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.config.compose import load_config
from app.training.prepare import decide_precision
from app.training.trainer import Trainer
from tests.helpers import (
    PATIENCE,
    REPOSITORY,
    Command,
    Result,
    finish,
    metrics,
    metrics_rows,
    once,
    same_weights,
)
from tests.training.conftest import Train, train_words

# What draws random numbers in a step, and more than one batch an update: four updates in all.
RANDOM = ("model.dropout=0.2", "model.vision.drop_path=0.2")
STEPS = ("--epochs", 2, "--batch-size", 1, "--grad-accum", 2)
AVERAGED = "training.ema=0.9"
slow = pytest.mark.slow


@pytest.fixture
def train(train: Train) -> Train:
    """Train the room's tiny run with what STEPS and RANDOM ask for."""

    def run(*words: object, folder: str = "cut") -> Result:
        return train(*RANDOM, *STEPS, *words, folder=folder)

    return run


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped, with an average, loading its images itself."""
    return once(
        tmp_path_factory,
        "never-stopped",
        lambda folder: finish(*train_words(shapes, folder), *RANDOM, *STEPS, AVERAGED),
    )


def _figures(folder: Path) -> list[dict[str, str]]:
    return metrics_rows(folder, timed=False)


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("updates", "workers"),
    [
        (1, 0),
        (2, 2),
        *(pytest.param(*case, marks=slow) for case in [(1, 2), (2, 0), (3, 0), (3, 2)]),
    ],
)
def test_stopped_at_an_update(train, stop_after, whole, tmp_path, updates, workers) -> None:
    """Within an epoch, and at its end, before its validation; whoever loads the images."""
    words = (f"training.num_workers={workers}", AVERAGED)
    stop_after(updates)
    stopped = train(*words)
    assert stopped.code == 143
    assert f"stopped after update {updates}" in stopped.out
    assert "--resume" in stopped.out
    assert _saved(tmp_path / "cut")[-1] == f"update-{updates:08d}"
    done = train(*words, "--resume")
    assert done.code == 0, done.err
    for name in ("last", "best"):
        assert same_weights(whole, tmp_path / "cut", name)
    assert _figures(whole) == _figures(tmp_path / "cut")


def test_without_the_random_state_it_would_differ(
    train, stop_after, whole, tmp_path, monkeypatch
) -> None:
    """The test above can fail: dropout does decide the weights."""
    stop_after(1)
    assert train(AVERAGED).code == 143
    monkeypatch.setattr("app.training.checkpoints.restore_random_state", lambda _: None)
    assert train(AVERAGED, "--resume").code == 0
    assert not same_weights(whole, tmp_path / "cut")


def test_a_run_in_float16_goes_on_with_its_scale(train, stop_after, tmp_path, monkeypatch) -> None:
    """And with the updates counted that it skipped, until its scale was low enough."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**100, backoff_factor=2.0**-48)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert train("training.precision=fp16", folder="uncut").code == 0
    rows = _figures(tmp_path / "uncut")
    assert [float(row["train/skipped_updates"]) for row in rows] == [2, 0]
    stop_after(1)
    assert train("training.precision=fp16").code == 143
    done = train("training.precision=fp16", "--resume")
    assert done.code == 0, done.err
    assert "note: 2 of 2 updates skipped" in done.out
    assert same_weights(tmp_path / "uncut", tmp_path / "cut")
    assert _figures(tmp_path / "cut") == rows


def test_the_precision_that_was_chosen_is_kept(train, tmp_path) -> None:
    """Whatever the machine is that the run goes on at; unless it was open in the checkpoint."""
    assert train("--epochs", 1).code == 0
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    content = json.loads((checkpoint / "run.json").read_text())
    assert content["fingerprint"]["training.precision"] == "fp32"
    config = load_config([f"output_dir={tmp_path / 'cut'}"])
    assert config.training.precision == "auto"
    for then in ("bf16", "auto"):
        content["fingerprint"]["training.precision"] = then
        (checkpoint / "run.json").write_text(json.dumps(content))
        assert decide_precision(config, "all").training.precision == then
    assert decide_precision(config, "weights").training.precision == "fp32"


def test_stopped_in_a_validation(train, stop_after, whole, tmp_path) -> None:
    """It is repeated, and the best weights are those of the run that was not stopped."""
    stop_after(2, Trainer, "_row")
    assert train(AVERAGED).code == 143
    assert len(_figures(tmp_path / "cut")) == 1
    done = train(AVERAGED, "--resume")
    assert "  2/2  " in done.out
    assert "  1/2  " not in done.out
    for name in ("last", "best"):
        assert same_weights(whole, tmp_path / "cut", name)
    assert _figures(whole) == _figures(tmp_path / "cut")


def test_saves_by_the_clock(train, tmp_path) -> None:
    assert train("training.save_minutes=0").code == 0
    assert _saved(tmp_path / "cut") == ["update-00000003", "update-00000004"]
    state = json.loads((tmp_path / "cut/checkpoints/update-00000003/run.json").read_text())["state"]
    assert (state["epoch"], state["updates"], state["images"]) == (1, 3, 2)


def test_more_epochs(train, tmp_path) -> None:
    assert train("--epochs", 1).code == 0
    done = train("--resume")
    assert done.code == 0, done.err
    assert [row["epoch"] for row in _figures(tmp_path / "cut")] == ["1", "2"]


def test_what_is_recomputed_may_change(train, tmp_path) -> None:
    """It depends on a machine's memory; it was in the fingerprint before."""
    assert train("--epochs", 1).code == 0
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    content = json.loads((checkpoint / "run.json").read_text())
    content["fingerprint"]["model.activation_checkpointing"] = True
    (checkpoint / "run.json").write_text(json.dumps(content))
    done = train("--resume", "model.activation_checkpointing=[vision]")
    assert done.code == 0, done.err
    assert [row["epoch"] for row in _figures(tmp_path / "cut")] == ["1", "2"]


def test_the_batch_that_was_chosen_is_kept(
    train, command: Command, shapes: Path, tmp_path: Path
) -> None:
    """Where none is given: by a GPU's memory it may have been another than a CPU takes."""
    assert train("--epochs", 1).code == 0
    words = (*train_words(shapes, tmp_path / "cut"), *RANDOM, "--epochs", 2)
    done = command(*words, "--recipe", "none", "--resume")  # not by the settings of its folder
    assert done.code == 0, done.err
    assert "batch size: 1 image, as the run has it that goes on" in done.out
    assert _saved(tmp_path / "cut")[-1] == "update-00000004"


def test_another_run_is_refused_by_name(train, whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    settings = (tmp_path / "cut" / "config_resolved.yaml").read_bytes()
    words = ("--seed", 4, "--lr", 1e-3, "--batch-size", 2, "dataset.limit=3")
    done = train(AVERAGED, "--resume", *words)
    assert done.code == 2
    assert "  --seed: 0 then, 4 now" in done.err
    assert "  --batch-size: 1 then, 2 now" in done.err
    assert "  --lr: not given then, 0.001 now" in done.err
    assert '  training data: "4 images of circle; rectangle; triangle (' in done.err
    assert "--resume=weights" in done.err
    assert (tmp_path / "cut" / "config_resolved.yaml").read_bytes() == settings


def test_another_method_is_refused_by_name(train, tiny_run: Path, tmp_path: Path) -> None:
    """Its weights alone as well, where an adapter comes in."""
    begin = ("--checkpoint", tiny_run / "weights" / "best", "--epochs", 1)
    assert train(*begin).code == 0
    before = _saved(tmp_path / "cut")
    done = train(*begin, "--resume", "--method", "head")
    assert done.code == 2
    assert '  --method: "full" then, "head" now' in done.err
    done = train(*begin, "--resume=weights", "--method", "lora")
    assert done.code == 2
    assert "is of method full, whose weights are no beginning for this one" in done.err
    assert _saved(tmp_path / "cut") == before
    done = train(*begin, "--resume=weights", "--method", "head")
    assert done.code == 0, done.err
    assert "the schedule starts anew" in done.out


def test_another_adapter_is_refused_by_name(train, tiny_run: Path, tmp_path: Path) -> None:
    begin = ("--checkpoint", tiny_run / "weights" / "best", "--epochs", 1)
    words = (*begin, "--method", "lora-minimal")
    assert train(*words).code == 0
    done = train(*words, "--resume=weights", "method.lora.rank=2")
    assert done.code == 2
    assert "(method.lora.rank)" in done.err


def test_another_world_size_is_refused_by_name(train, whole, tmp_path, monkeypatch) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = train(AVERAGED, "--resume")
    assert done.code == 2
    assert "  --num-gpus: 1 then, 2 now" in done.err


def test_harmless_changes_are_accepted(train) -> None:
    assert train("--epochs", 1).code == 0
    words = ("training.num_workers=1", "evaluation.every=2", "training.save_every=2")
    done = train("--resume", *words)
    assert done.code == 0, done.err


def test_the_weights_alone(train, tmp_path) -> None:
    """With other data: a new schedule, from the trained weights; the old checkpoints give way."""
    assert train().code == 0
    before = load_file(tmp_path / "cut/checkpoints/update-00000004/model.safetensors")
    baseline = _state(tmp_path / "cut/checkpoints/update-00000004")["baseline"]
    done = train("--resume=weights", "--epochs", 1, "dataset.limit=3", "optim.lr_scale=1e-9")
    assert done.code == 0, done.err
    assert "the schedule starts anew" in done.out
    assert _saved(tmp_path / "cut") == ["update-00000000", "update-00000002"]
    after = load_file(tmp_path / "cut/checkpoints/update-00000002/model.safetensors")
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)
    assert [row["epoch"] for row in _figures(tmp_path / "cut")] == ["1"]
    states = [_state(tmp_path / "cut" / "checkpoints" / name) for name in _saved(tmp_path / "cut")]
    assert states[0]["baseline"] == states[1]["baseline"] == baseline  # of before all training


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "run.json").read_text())["state"]


def test_times_are_of_all_legs(train, stop_after, tmp_path) -> None:
    """And stay as they are where nothing is left to train."""
    stop_after(1)
    assert train().code == 143
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    content = json.loads((checkpoint / "run.json").read_text())
    assert 0 < content["state"]["elapsed"] < 600
    content["state"]["elapsed"] = 7200.0
    (checkpoint / "run.json").write_text(json.dumps(content))
    done = train("--resume")
    assert "done in 2 h 0 min" in done.out
    assert "nothing is left" not in done.out
    seconds = metrics(tmp_path / "cut")["seconds"]
    assert 7200 < seconds < 7800
    again = train("--resume=auto")
    assert again.code == 0, again.err
    assert "nothing is left to train: more --epochs go on" in again.out
    assert metrics(tmp_path / "cut")["seconds"] == seconds


def test_the_folder_alone_knows_the_settings(
    command, train, stop_after, whole, tmp_path, monkeypatch
) -> None:
    stop_after(1)
    assert train(AVERAGED, "--lr", 4e-4).code == 143
    out = tmp_path / "cut"
    changed = command("train", "--output-dir", out, "--resume", "--lr", 3e-4)
    assert changed.code == 2
    assert [line for line in changed.err.splitlines() if " then, " in line] == [
        "  --lr: 0.0004 then, 0.0003 now"
    ]
    done = command("train", "--output-dir", out, "--resume", "--epochs", 3)
    assert done.code == 0, done.err
    assert f"settings that are not given: those of {out}/config_resolved.yaml" in done.out
    assert [row["epoch"] for row in _figures(out)] == ["1", "2", "3"]


def test_the_folder_knows_the_settings_of_a_run_that_saved_nothing(
    command, train, stop_after, tmp_path
) -> None:
    """Or another run would be made there: of drawn shapes, as no source is given."""
    stop_after(1)
    assert train().code == 143
    out = tmp_path / "cut"
    shutil.rmtree(out / "checkpoints")
    then = (out / "config_resolved.yaml").read_text()
    stop_after(1)
    done = command("train", "--output-dir", out, "--resume")
    assert done.code == 143, done.err
    assert f"nothing was saved yet in {out}: from the beginning" in done.out
    assert (out / "config_resolved.yaml").read_text() == then


@pytest.mark.parametrize("mistake", ["taken", "no run", "unwritable"])
def test_a_folder_that_cannot_be_used_is_told_before_torch_is_imported(
    whole, tmp_path, mistake
) -> None:
    (tmp_path / "file").touch()
    words, said = {
        "taken": (["--output-dir", whole], "holds a run already"),
        "no run": (["--output-dir", tmp_path / "none", "--resume"], "no run in"),
        "unwritable": (["--output-dir", tmp_path / "file" / "out"], "cannot be written"),
    }[mistake]
    script = "import sys\nfrom app.__main__ import main\ntry: main()\n" + (
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines()[-1] == "2 False", done.stderr
    assert said in done.stderr


def test_auto_resumes_or_starts(train, tmp_path) -> None:
    started = train("--resume=auto", "--epochs", 1)
    assert started.code == 0, started.err
    done = train("--resume=auto")
    assert "resumed from" in done.out
    assert len(_figures(tmp_path / "cut")) == 2
    assert train("--resume=never").code == 2


def test_a_run_that_goes_on_keeps_its_first_command(train, tmp_path) -> None:
    assert train("--epochs", 1, "--lr", 1e-4).code == 0
    kept = [(tmp_path / "cut" / name).read_bytes() for name in ("config.yaml", "environment.json")]
    assert train("--resume", "--lr", 1e-4).code == 0
    again = [(tmp_path / "cut" / name).read_bytes() for name in ("config.yaml", "environment.json")]
    assert again == kept


def test_patience_ends_a_run(train, tmp_path) -> None:
    """A rate of next to nothing: no validation betters the first one."""
    words = ("--epochs", 9, "optim.lr_scale=1e-12", "training.patience=2")
    done = train(*words)
    assert done.code == 0, done.err
    assert len(_figures(tmp_path / "cut")) == 3
    assert "no better" in done.out
    again = train(*words, "--resume")
    assert again.code == 0, again.err
    assert len(_figures(tmp_path / "cut")) == 3
