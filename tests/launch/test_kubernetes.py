"""The Indexed Job is what Kubernetes takes, and its rules do what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config.compose import load_config
from app.errors import UserError
from app.launch import kubernetes
from tests.helpers import log_lines
from tests.kubernetes import faults

CLUSTER = ["cluster.image=registry/sam3:1", "cluster.memory_gb=16", "cluster.queue=gpu"]


def job(*overrides: str, completions: int = 8, at_once: int | None = 3) -> dict[str, Any]:
    config = load_config([*CLUSTER, *overrides])
    words = ["sweep", "outputs/mine", "--cell", "auto"]
    return kubernetes.manifest(
        words, config, "My sweep_1", completions=completions, at_once=at_once
    )


@pytest.mark.parametrize("overrides", [(), ("training.device=cpu", "cluster.queue=null")])
def test_it_is_of_its_schema(overrides: tuple[str, ...]) -> None:
    assert faults(job(*overrides)) == []


def test_it_asks_for_what_the_configuration_says() -> None:
    made = job("training.num_gpus=2", "cluster.cpus=4", "cluster.save_seconds=77")
    assert made["metadata"]["name"] == "my-sweep-1"
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    spec = made["spec"]
    assert (spec["completions"], spec["parallelism"], spec["suspend"]) == (8, 3, True)
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 77
    (container,) = pod["containers"]
    assert container["image"] == "registry/sam3:1"
    assert container["args"] == ["sweep", "outputs/mine", "--cell", "auto"]
    limits = {"nvidia.com/gpu": 2, "memory": "16Gi"}
    assert container["resources"] == {"requests": {"cpu": 8, **limits}, "limits": limits}
    plain = job("training.device=cpu", "cluster.queue=null", at_once=None)
    assert "suspend" not in plain["spec"]
    assert plain["spec"]["parallelism"] == 8
    (container,) = plain["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def controller(spec: dict[str, Any], ends: dict[int, list[int | str]]) -> tuple[set[int], set[int]]:
    """Play Kubernetes's Job controller: `ends` are each index's exit codes, or a condition's name.

    Rules are tried in their order, the first that fits holds (kubernetes.io, "Pod failure policy");
    without one a failure counts towards `backoffLimitPerIndex`.
    """
    done, failed = set(), set()
    for index in range(spec["completions"]):
        counted = 0
        for end in ends.get(index, [0]):
            if end == 0:
                done.add(index)
                break
            action = "Count"
            for rule in spec["podFailurePolicy"]["rules"]:
                codes = rule.get("onExitCodes", {"values": []})["values"]
                conditions = [each["type"] for each in rule.get("onPodConditions", [])]
                if end in codes or end in conditions:
                    action = rule["action"]
                    break
            counted += action == "Count"
            if action == "FailIndex" or counted > spec["backoffLimitPerIndex"]:
                failed.add(index)
                break
    return done, failed


def test_what_the_user_must_mend_is_not_tried_again_and_stops_cost_nothing() -> None:
    stops: list[int | str] = [143, "DisruptionTarget"] * 50
    ends: dict[int, list[int | str]] = {
        1: [2, 0],
        2: [3, 0],
        3: [*stops, 0],
        4: [*[1] * 6, 0],
        5: [*[1] * 7, 0],
        6: [137, *stops, 0],
    }
    done, failed = controller(job()["spec"], ends)
    assert failed == {1, 2, 5}
    assert done == {0, 3, 4, 6, 7}
    assert job()["spec"]["maxFailedIndexes"] == 8


def test_it_is_written_where_no_cluster_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = log_lines(monkeypatch)
    folder = tmp_path / "outputs" / "mine"
    words = ["sweep", str(folder), "--cell", "auto"]
    file = kubernetes.submit(words, load_config(CLUSTER), folder, "mine", completions=2)
    made = yaml.safe_load(file.read_text())
    assert faults(made) == []
    args = made["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args == ["sweep", "outputs/mine", "--cell", "auto"]
    assert "kubectl apply -f" in lines[-1]
    with pytest.raises(UserError, match="is outside of"):
        kubernetes.submit(words, load_config(), tmp_path.parent, "x", completions=2)


@pytest.mark.parametrize(("applied", "said"), [(0, "job.batch/mine created"), (1, "refused it")])
def test_it_is_applied_where_one_does(
    applied: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        f'#!/bin/sh\n[ "$1" = version ] && exit 0\necho "job.batch/mine created"\nexit {applied}'
    )
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(script + "\n")
    kubectl.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    lines = log_lines(monkeypatch)
    submit = (["sweep"], load_config(CLUSTER), tmp_path / "out", "mine")
    if applied:
        with pytest.raises(UserError, match=said):
            kubernetes.submit(*submit, completions=2)
    else:
        kubernetes.submit(*submit, completions=2)
        assert said in lines[-1]
