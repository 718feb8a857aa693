"""Two processes beside one with twice the batch: the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY

UPDATES = 6


def train(folder: Path, output: Path, batch_size: int) -> None:
    """Write the losses of a few updates; masks by all pixels, not by points drawn at random."""
    import torch
    from hydra.utils import instantiate

    from app.config import load_config
    from app.datasets.build import load_splits
    from app.model.build import build_model
    from app.training import run
    from app.training.loop import Loop, build_accelerator

    config = load_config(
        [
            *(*TINY, f"training.batch_size={batch_size}", "model.dropout=0"),
            *("model.vision.drop_path=0", "transforms=none", "dataset.foreign=1"),
        ]
    )
    accelerator = build_accelerator(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    data = run.query_dataset(config, load_splits(folder).train)
    loop = Loop(config, model, data, accelerator, lr_scale=0.1)
    loop.criterion.loss_fns_find[2].num_sample_points = None
    steps = [step for epoch in range(UPDATES // 2) for step in loop.run_epoch(epoch)]
    if accelerator.is_main_process:
        prompts = {len(data[index].find_queries) for index in range(len(data))}
        content = {"losses": [step.losses for step in steps], "prompts": len(prompts)}
        output.write_text(json.dumps(content), encoding="utf-8")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(
    shapes: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words, output, size in (([], one, 2), (launcher, two, 1)):
        command = [sys.executable, *words, "-m", "tests.training.test_global_losses"]
        command += [str(shapes), str(output), str(size)]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=300)
    alone, together = (json.loads(file.read_text()) for file in (one, two))
    assert len(alone["losses"]) == len(together["losses"]) == UPDATES
    for ours, theirs in zip(together["losses"], alone["losses"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # Later, rounding has gone through AdamW, which divides it by gradients near to nothing.
    assert together["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
