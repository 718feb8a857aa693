"""The manifests are what the API of Kubernetes takes, and name what the server has."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import yaml

from app.serving.guard import OPEN
from tests.helpers import REPOSITORY, Command
from tests.kubernetes import faults

FOLDER = REPOSITORY / "deploy" / "kubernetes"
MANIFESTS = {
    f"{file.relative_to(FOLDER)}: {document['kind']}": document
    for file in sorted(FOLDER.rglob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
}


def _of(kind: str) -> dict[str, Any]:
    return next(document for name, document in MANIFESTS.items() if name.endswith(f": {kind}"))


def _container(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    pod = spec["predictor"] if "predictor" in spec else spec["template"]["spec"]
    container: dict[str, Any] = pod["containers"][0]
    return container


def test_all_kinds_are_there() -> None:
    kinds = {manifest["kind"] for manifest in MANIFESTS.values()}
    assert kinds == {
        *("Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"),
        "InferenceService",
    }


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_of_its_schema(name: str) -> None:
    assert faults(MANIFESTS[name]) == []


def test_a_misspelt_key_is_seen() -> None:
    for kind in ("Deployment", "InferenceService"):
        manifest = json.loads(json.dumps(_of(kind)))
        probe = _container(manifest)["readinessProbe"]
        probe["periodSecond"] = probe.pop("periodSeconds")
        probe["timeoutSeconds"] = "5s"
        said = "\n".join(faults(manifest))
        assert "periodSecond" in said
        assert '"5s" is not of type' in said


def test_the_parts_name_each_other() -> None:
    deployment = _of("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert _of("Service")["spec"]["selector"].items() <= labels.items()
    assert _of("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    target = _of("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    ports = {port["name"]: port["containerPort"] for port in _container(deployment)["ports"]}
    for port in _of("Service")["spec"]["ports"]:
        assert port["targetPort"] in ports


@pytest.mark.parametrize("kind", ["Deployment", "InferenceService"])
def test_they_start_the_server_and_ask_what_it_answers(
    kind: str, command: Command, client: httpx.Client
) -> None:
    container = _container(_of(kind))
    done = command(*container["args"], "--help")
    assert done.code == 0, done.err
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = container[probe]["httpGet"]
        assert request["path"] in OPEN, "the kubelet has no key"
        assert client.get(request["path"]).status_code == 200
        assert request["port"] in [
            *(port["name"] for port in container["ports"]),
            *(port["containerPort"] for port in container["ports"]),
        ]
    assert str(container["ports"][0]["containerPort"]) in container["args"]
    assert {each["name"] for each in container["env"]} >= {"SAM3_API_KEY"}
