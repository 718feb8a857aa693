"""What is imported later: not at a start, and whole where it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

START = "import app, sys, torch, torchvision, app.inference.predictor, app.cli.training\n"
POSTPONED = (
    *("torch._dynamo.convert_frame", "torch._inductor", "timm.models", "sam3.model_builder"),
    *("triton", "scipy.optimize._optimize", "boto3.session", "huggingface_hub.file_download"),
    *("matplotlib", "mlflow", "peft", "transformers", "pandas", "datasets", "tensorboard"),
)
ABSENT = f"there = {{*{POSTPONED!r}}} & {{*sys.modules}}\nassert not there, there\n"

COMPILER = """
for _ in range(2):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    squared = torch.utils.checkpoint.checkpoint(torch.square, parameter, use_reentrant=False)
    squared.sum().backward()
    optimizer.step()
    assert parameter.grad.tolist() == [2, 2]
    doubled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    if "torch._dynamo.convert_frame" not in sys.modules:
        assert doubled(torch.ones(2)).tolist() == [3, 3]
        assert "torch._dynamo.convert_frame" in sys.modules
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch._dynamo.is_compiling() is False
aligned = torchvision.ops.roi_align(torch.ones(1, 2, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2)
assert aligned.tolist() == torch.ones(1, 2, 2, 2).tolist()
"""
UPSTREAM = """
import sam3
assert "sam3.model_builder" not in sys.modules
assert sam3.build_sam3_image_model is sys.modules["sam3.model_builder"].build_sam3_image_model
import timm
assert timm.is_model("vit_base_patch16_224")
"""
MATCHING = """
from scipy.optimize import linear_sum_assignment
import scipy.optimize
costs = [[4, 1, 3], [2, 0, 5], [3, 2, 2]]
def matched(solve, **how):
    return [side.tolist() for side in solve(costs, **how)]
answers = matched(linear_sum_assignment), matched(linear_sum_assignment, maximize=True)
assert answers[0] == [[0, 1, 2], [1, 0, 2]]
assert "scipy.optimize._optimize" not in sys.modules
assert scipy.optimize.minimize is sys.modules["scipy.optimize._minimize"].minimize
now = scipy.optimize.linear_sum_assignment
assert now is not linear_sum_assignment
assert answers == (matched(now), matched(now, maximize=True))
"""
STORES = """
import boto3
assert callable(boto3.client)
assert "boto3.session" in sys.modules
"""
FOCAL_LOSS = """
from sam3.train.loss.sigmoid_focal_loss import triton_sigmoid_focal_loss
from sam3.train.loss import loss_fns
assert "triton" not in sys.modules
try:
    triton_sigmoid_focal_loss(torch.ones(2), torch.ones(2), 0.25, 2)
except Exception:  # a CPU has no Triton
    pass
real = sys.modules["sam3.train.loss.sigmoid_focal_loss"]
assert "triton" in sys.modules
assert real.triton_sigmoid_focal_loss is not triton_sigmoid_focal_loss
"""
THREADS = """
from concurrent.futures import ThreadPoolExecutor
import timm
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: timm.is_model("vit_base_patch16_224"), range(8)))
assert answers == [True] * 8
"""
PREDICTION = """
import numpy
from app.model.bundled import bundled_nano
predictor = app.inference.predictor.Predictor.load(bundled_nano())
found = predictor.predict(numpy.zeros((64, 64, 3), numpy.uint8), ["cross", "a b"], threshold=0)
assert len(found)
assert "sympy" not in sys.modules
"""


@pytest.mark.parametrize(
    "use",
    [COMPILER, UPSTREAM, MATCHING, STORES, FOCAL_LOSS, THREADS, PREDICTION],
    ids=["compiler", "upstream", "matching", "stores", "focal-loss", "threads", "prediction"],
)
def test_what_takes_long_is_imported_where_it_is_used(use: str) -> None:
    subprocess.run([sys.executable, "-c", START + ABSENT + use], cwd=REPOSITORY, check=True)
