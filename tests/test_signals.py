"""Signals to real processes: the first saves and ends with 143, the second ends at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from app import signals
from app.datasets.synthetic.shapes import make_shapes
from tests.helpers import PATIENCE, REPOSITORY, TINY, Command, until

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(shapes: Path, tmp_path: Path) -> Iterator[Start]:
    """Begin `python -m app train WORDS` as the leader of its own process group."""
    begun: list[subprocess.Popen[str]] = []

    def run(*words: object) -> subprocess.Popen[str]:
        command = [
            *(sys.executable, "-m", "app", "train", "--dataset-dir", shapes, "--model", "nano"),
            *("--output-dir", tmp_path / "out", "--epochs", 300, "--checkpoint", "none"),
            *("evaluation.every=300", "evaluation.pictures=0", *TINY, *words),
        ]
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        with contextlib.suppress(ProcessLookupError):  # of a test that failed
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until(lambda: path.exists() or process.poll() is not None, str(path))
    assert path.exists(), process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_group_saves_and_ends(start, tmp_path, number) -> None:
    """As a terminal and a cluster send it: the processes that load images get it as well."""
    process = start("training.num_workers=2", "training.save_every=300")
    _wait_for(tmp_path / "out" / "metrics.csv", process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "stopped after update" in out
    assert "Traceback" not in err
    saved = sorted((tmp_path / "out" / "checkpoints").glob("update-*"))
    assert len(saved) == 1
    assert (saved[0] / "state.pt").is_file()


def test_a_signal_waits_while_processes_start() -> None:
    """They begin with the handlers of torch, which end them."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=_say_what_waits, args=(theirs,))
    try:
        with signals.blocked_signals():
            child.start()
            os.kill(os.getpid(), signal.SIGTERM)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGTERM)
        ours.send("sent")
        assert ours.poll(PATIENCE)
        assert ours.recv() == {signal.SIGTERM}  # which has not ended it
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        child.kill()


def _say_what_waits(parent: Connection) -> None:
    """With the handler of the system, which ends a process, once a signal was sent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent.recv()
    parent.send(signal.sigpending())


@pytest.mark.slow
def test_a_signal_before_there_is_a_run(start, tmp_path: Path) -> None:
    process = start()
    _wait_for(tmp_path / "out" / "train.log", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start, tmp_path: Path) -> None:
    """Wherever it is, in a save as well: the checkpoint before it is whole."""
    process = start("training.save_minutes=0")
    folder = tmp_path / "out" / "checkpoints"
    _wait_for(folder / "update-00000002", process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert "stopped after update" not in out  # which is said once all is saved
    newest = max(path for path in folder.glob("update-*"))
    _check_whole(newest)


@pytest.mark.system
def test_a_second_signal_ends_all_processes_at_once(start, tmp_path: Path) -> None:
    """In an update that takes long; torchrun, which alone is told, hands each of the two on."""
    make_shapes(tmp_path / "set", train=160, valid=1, fog=0, width=64, height=64, seed=0)
    process = start(
        *("--dataset-dir", tmp_path / "set", "--num-gpus", 2, "training.device=cpu"),
        *("--batch-size", 1, "--grad-accum", 80, "--warm-start", "pixels"),
        *("training.warm_start.steps=1", "training.warm_start.batch_size=2"),
    )
    folder = tmp_path / "out" / "checkpoints"
    _wait_for(folder / "update-00000000", process)  # what the warm start came to
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    first = ""
    while "once more ends at once" not in first:
        more = os.read(process.stderr.fileno(), 1 << 16)
        assert more, first
        first += more.decode()
    time.sleep(2 * signals.ECHO_SECONDS)  # what comes sooner is taken for an echo of the first
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=PATIENCE)
    err = first + rest
    assert process.returncode == 143
    assert err.count("once more ends at once") == 1
    assert "Traceback" not in err
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1]
    _check_whole(folder / "update-00000000")
    # The update under way was neither finished nor saved.
    assert [path.name for path in folder.glob("update-*")] == ["update-00000000"]


def _check_whole(checkpoint: Path) -> None:
    assert load_file(checkpoint / "model.safetensors")
    assert torch.load(checkpoint / "state.pt", weights_only=True)["optimizer"]


def test_a_warm_start_is_cut_off(command: Command, shapes, tmp_path, monkeypatch) -> None:
    """Nothing to save yet: it ends at the next instruction."""
    from app.training import run

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("went on after the signal")

    monkeypatch.setattr(run, "warm_start", kill)
    words = ("--checkpoint", "none", "--warm-start", "pixels", "--output-dir", tmp_path / "out")
    assert command("train", "--dataset-dir", shapes, *TINY, *words).code == 143


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.watch() as request, pytest.raises(signals.Stopped), request.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.system
def test_two_processes_stop_and_go_on_together(shapes: Path, tmp_path: Path) -> None:
    """torchrun hands the signal on; both end after the same update, and resume to the same end."""
    words = [
        *("-m", "app", "train", "--dataset-dir", str(shapes), "--model", "nano"),
        *("--num-gpus", "2", "--epochs", "6", "--batch-size", "1", "training.device=cpu"),
        *("--checkpoint", "none", "model.dropout=0.2", "evaluation.every=6", *TINY),
        *("evaluation.pictures=0", "training.save_every=6"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(name: str, *more: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, *words, "--output-dir", str(tmp_path / name), *more],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # What the command would become, without what it checks before.
    whole = run(
        "whole",
        launcher=("-m", "app.launch.torchrun", "--standalone", "--nproc-per-node=2"),
    )
    out, err = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, err
    assert "2 processes" in out
    assert out.count("    6/6  ") == 1  # the second process is silent
    cut = run("cut")
    _wait_for(tmp_path / "cut" / "metrics.csv", cut)
    cut.send_signal(signal.SIGTERM)
    out, err = cut.communicate(timeout=PATIENCE)
    assert "stopped after update" in out, err
    assert cut.returncode == 143, err
    assert "Traceback" not in err
    resumed = run("cut", "--resume")
    out, err = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0, err
    ours, theirs = (
        load_file(tmp_path / name / "weights" / "last" / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
