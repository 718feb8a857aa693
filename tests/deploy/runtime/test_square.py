"""The square without torch beside the one with it, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.datasets import square as in_torch
from app.deploy.runtime.square import to_pixels, to_square
from app.inference.predictor import normalise
from tests.helpers import REPOSITORY


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 14, 33, 64, 112, 300]))
@example(64, 64, 64)
@example(64, 30, 64)
@example(30, 64, 64)
@example(400, 390, 14)
def test_any_size_up_and_down(width: int, height: int, side: int) -> None:
    image = _noise(width, height)
    np.testing.assert_array_equal(to_square(image, side), in_torch.to_square(image, side).numpy())


@pytest.mark.parametrize("size", [(5000, 40), (40, 9000)])
def test_far_down_where_weights_are_small(size: tuple[int, int]) -> None:
    """Beyond four source pixels a target pixel, sums leave what float32 holds exactly."""
    image = _noise(*size)
    np.testing.assert_array_equal(to_square(image, 56), in_torch.to_square(image, 56).numpy())


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_one_level_stays_what_it_is(level: int) -> None:
    image = Image.new("RGB", (97, 211), (level,) * 3)
    assert (to_square(image, 70) == level).all()


def test_every_level_is_normalised_alike() -> None:
    square = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    expected = normalise(torch.from_numpy(square)).numpy()
    pixels = to_pixels(square)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected)


WORK = """import os, time
from pathlib import Path
import numpy as np
from PIL import Image
from app.deploy.runtime.square import to_square

def spent():
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

before = spent()
while (now := spent()) != before or not now:  # as numpy starts, its threads spin for a while
    before = now
    time.sleep(0.1)
to_square(Image.fromarray(np.zeros((1080, 1920, 3), dtype=np.uint8)), 1008)
print(len(before), sum(spent().values()) - sum(before.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="only Linux says it")
def test_the_cores_are_left_to_what_comes_next() -> None:
    """OpenBLAS's threads would spin for some 25 ms, in which ONNX Runtime has half of them."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", WORK],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    threads, nanoseconds = map(int, done.stdout.split())
    assert threads >= 1
    assert nanoseconds == 0
