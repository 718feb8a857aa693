"""Two processes beside one with twice the batch: the same losses; and what ends one ends both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from app.signals import StopRequest
from tests.helpers import PATIENCE, REPOSITORY, TINY, until

UPDATES = 6
WAIT = 2.0  # seconds


def train(folder: Path, output: Path, batch_size: int) -> None:
    """Write the losses of a few updates; masks by all pixels, not by points drawn at random.

    Two processes then validate, and the second finds something that is not finite, and is killed.
    """
    from hydra.utils import instantiate

    from app.config.compose import load_config
    from app.datasets.build import load_splits
    from app.errors import UserError
    from app.launch import torchrun
    from app.model import weights
    from app.model.build import build_model
    from app.training.batches import query_dataset
    from app.training.collective import raise_on_all_ranks
    from app.training.nonfinite import NotFiniteError
    from app.training.step import build_accelerator
    from app.training.trainer import Trainer
    from tests.training.updates import make_updates

    config = load_config(
        [
            *(*TINY, f"training.batch_size={batch_size}", "model.dropout=0"),
            *("model.vision.drop_path=0", "transforms=none", "dataset.foreign=0.5"),
        ]
    )
    accelerator = build_accelerator(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    splits = load_splits(folder)
    data = query_dataset(config, splits.train)
    updates = make_updates(config, model, data, accelerator, lr_scale=0.1)
    updates.step.losses.criterion.loss_fns_find[2].num_sample_points = None
    steps = [step for epoch in range(UPDATES // 2) for step in updates.epoch(epoch)]
    if accelerator.is_main_process:
        prompts = {len(data[index].find_queries) for index in range(len(data))}
        content = {"losses": [step.losses for step in steps], "prompts": len(prompts)}
        output.write_text(json.dumps(content), encoding="utf-8")
    if accelerator.num_processes == 1:
        return

    trainer = Trainer(
        *(config, model, updates.batches, updates.step, accelerator),
        valid=splits.valid,
        header=weights.Header(model=config.model),
        fingerprint={},
        precision=torch.float32,
        recorder=None,
        stop=StopRequest(),
    )
    figures = trainer.validate("together").figures
    mean = accelerator.reduce(torch.tensor(figures["bbox/AP"]), "mean")
    waits = torch.distributed.distributed_c10d._get_default_group()._get_backend(mean.device)
    failed = output.with_suffix(".failed")
    waited = {
        "agree": bool(mean == figures["bbox/AP"]),
        "limit": waits.options._timeout.total_seconds(),
        "shorter": _wait(timedelta(seconds=WAIT / 2), accelerator.is_main_process, failed),
        "longer": _wait(timedelta(seconds=PATIENCE), accelerator.is_main_process),
    }
    sys.stdout.write(f"WAITED {accelerator.process_index} {json.dumps(waited)}\n")
    sys.stdout.flush()

    second = not accelerator.is_main_process
    try:
        with raise_on_all_ranks(accelerator.device):
            if second:
                raise UserError("bad image")
    except UserError as error:
        sys.stdout.write(f"RANK {accelerator.process_index}: {error}\n")
    hook = model.dot_prod_scoring.hs_proj.register_forward_hook(
        lambda _module, _inputs, result: result * float("nan") if second else result
    )
    before = model.dot_prod_scoring.hs_proj.weight.clone()
    try:
        list(updates.epoch(9))
    except NotFiniteError as error:
        kept = torch.equal(model.dot_prod_scoring.hs_proj.weight, before)
        sys.stdout.write(f"RANK {accelerator.process_index}: kept {kept}: {error}\n")
        sys.stdout.flush()
    hook.remove()
    list(updates.epoch(10))  # they are in step still
    if second:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which a run would defer
    with torchrun.end_quietly_if_peer_died():
        list(updates.epoch(11))


def _wait(limit: timedelta, is_first: bool, failed: Path | None = None) -> str:
    """Return what becomes of a group with this limit whose first process lets the others wait.

    Args:
        failed: a file that the others make as they fail, and the first waits for; else it waits for
            WAIT seconds.
    """
    group = torch.distributed.new_group(timeout=limit, backend="gloo")
    try:
        if not is_first:
            pass
        elif failed is None:
            time.sleep(WAIT)
        else:
            until(failed.exists, "the second has failed")
        torch.distributed.broadcast(torch.zeros(1), 0, group=group)
    except RuntimeError as error:
        if failed is not None:
            failed.touch()
        return str(error)
    return "went on"


@pytest.mark.system
def test_two_processes_are_as_one(shapes: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    launcher = ["-m", "app.launch.torchrun", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = []
    for words, output, size in (([], one, 2), (launcher, two, 1)):
        command = [sys.executable, *words, "-m", "tests.training.test_collective"]
        command += [str(shapes), str(output), str(size)]
        done.append(
            subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                timeout=PATIENCE,
                capture_output=True,
                text=True,
            )
        )
    assert done[0].returncode == 0, done[0].stderr
    alone, together = (json.loads(file.read_text()) for file in (one, two))
    assert alone["prompts"] > 1  # of the images: each process has its own number
    assert len(alone["losses"]) == len(together["losses"]) == UPDATES
    for ours, theirs in zip(together["losses"], alone["losses"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # Later, rounding has gone through AdamW, which divides it by gradients near to nothing.
    assert together["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    _check_waits(done[1].stdout)
    _check_ends(done[1])


def _check_waits(out: str) -> None:
    """Both have the same figures, and wait for each other for longer than a group that does not."""
    lines = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("WAITED ")]
    waited = {int(rank): json.loads(content) for _, rank, content in lines}
    assert sorted(waited) == [0, 1]
    for rank in (0, 1):
        assert waited[rank]["agree"]
        assert waited[rank]["limit"] == 12 * 3600
        assert waited[rank]["longer"] == "went on"
    assert "imed out" in waited[1]["shorter"]


def _check_ends(done: subprocess.CompletedProcess[str]) -> None:
    """An error of the second process ends what the first one does, with the second one's images."""
    assert "RANK 0: another process of this run cannot go on" in done.stdout
    assert "RANK 1: bad image" in done.stdout
    said = [line for line in done.stdout.splitlines() if "kept True" in line]
    assert len(said) == 2
    for line in said:
        assert "dot_prod_scoring.hs_proj (Linear)" in line
        assert line.count(".png") == 1  # of the second's batch alone
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "error: another process of this run is gone" in done.stderr
    assert "process 1 was killed (SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
