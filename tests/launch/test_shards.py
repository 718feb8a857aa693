"""Pieces are numbered by Slurm's arrays, Kubernetes's Indexed Jobs, or by hand."""

from __future__ import annotations

import pytest

from app.errors import UserError
from app.launch.shards import Shard, numbered, parse_shard


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, None),
        ({"SLURM_ARRAY_TASK_ID": "7"}, 7),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "1"}, 7),
        ({"JOB_COMPLETION_INDEX": "0"}, 0),
    ],
)
def test_engines_number_from_what_is_first(environment, number) -> None:
    assert numbered(environment) == number


def test_what_is_no_number() -> None:
    with pytest.raises(UserError, match="JOB_COMPLETION_INDEX=x"):
        numbered({"JOB_COMPLETION_INDEX": "x"})


def test_a_shard_by_hand() -> None:
    assert parse_shard("3/8") == Shard(3, 8)


@pytest.mark.parametrize("text", ["8/8", "1", "-1/3", "a/b", "1/0", "1/3/4", "٣/8"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N"):
        parse_shard(text)
