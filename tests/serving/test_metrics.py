"""Figures are what Prometheus reads, count what happened, and tell drift where there is some."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.inference.detections import Detections
from app.inference.finder import Query
from app.model.score_counts import BINS, ScoreCounts, count_scores
from app.serving.drift import LEAST, WINDOW, Drift, stability_index
from app.serving.keep import Keeper
from app.serving.metrics import Figures
from app.serving.uploads import Uploaded
from tests.helpers import REPOSITORY, until
from tests.serving.servers import Loaded, files, scene, serving

DOCS = REPOSITORY / "docs" / "serving"
IMAGE = Uploaded("a.jpg", b"", "0" * 64)


@dataclass(eq=False)
class Told:
    """What figures and drift read of a finder."""

    prompts: tuple[str, ...] = ("car", "bus")
    threshold: float = 0.4
    scores: ScoreCounts | None = None
    levels: Any = None


@dataclass(eq=False)
class Named:
    """What figures read of an engine."""

    name: str = "nano"
    version: str = "1"
    finder: Any = field(default_factory=Told)


def query(*prompts: str, threshold: float = 0.4, boxes: Any = ()) -> Query:
    return Query(prompts, boxes, (), threshold, 100)


def found(prompts: tuple[str, ...], *pairs: tuple[int, float]) -> Detections:
    """Return detections: the prompt and the score of each."""
    scores = np.array([score for _, score in pairs], np.float32)
    ids = np.array([prompt for prompt, _ in pairs], np.int64)
    boxes = np.zeros((len(pairs), 4), np.float32)
    return Detections(boxes, scores, ids, prompts, None, 100, 80, best_score=0.9)


def read(figures: Figures) -> dict[tuple[str, ...], float]:
    """Return each sample as Prometheus reads it: (name, label, value, …) → number."""
    return as_read(figures.render().decode())


def as_read(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(part for pair in sorted(sample.labels.items()) for part in pair)): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_happens_is_counted() -> None:
    figures, engine = Figures(), Named()
    with figures.stage("encode"):
        pass
    figures.waited(0.2)
    figures.waiting(engine, 3)
    figures.batch(4)
    for hit in (True, False, True):
        figures.cache(hit)
    queries = (query("car", "tree"), query("visual", boxes=((1, 2, 3, 4),)))
    prompts = ("car", "tree", "visual")
    figures.answered(engine, IMAGE, queries, found(prompts, (0, 0.9), (0, 0.5), (2, 0.8)))
    figures.answered(engine, IMAGE, (query("tree"),), found(("tree",)))
    values = read(figures)
    who = ("model", "nano", "version", "1")
    assert values["sam3_stage_seconds_count", "stage", "encode"] == 1
    assert values["sam3_stage_seconds_sum", "stage", "queue"] == pytest.approx(0.2)
    assert values["sam3_stage_seconds_count", "stage", "masks"] == 0  # there before it happens
    assert values["sam3_queue_length", *who] == 3
    assert values["sam3_batch_images_bucket", "le", "4.0"] == 1
    assert values["sam3_batch_images_bucket", "le", "2.0"] == 0
    assert values["sam3_cache_lookups_total", "result", "hit"] == 2
    assert values["sam3_images_total", *who] == 2
    assert values["sam3_empty_images_total", *who] == 1
    kinds = {
        name: {
            kind: values.get((f"sam3_{name}_total", "kind", kind, *who))
            for kind in ("class", "other", "boxes")
        }
        for name in ("prompts", "empty_prompts")
    }
    assert kinds["prompts"] == {"class": 1, "other": 2, "boxes": 1}
    assert kinds["empty_prompts"] == {"class": 0, "other": 2, "boxes": 0}
    assert values["sam3_prompt_detections_bucket", "le", "1.0", *who] == 3
    assert values["sam3_prompt_detections_sum", *who] == 3
    assert values[("process_resident_memory_bytes",)] > 1e6


def test_no_word_of_a_client_is_told() -> None:
    figures, engine = Figures(), Named()
    prompts = ("car", "my neighbour's dog")
    asked = (query(*prompts),)
    figures.answered(engine, IMAGE, asked, found(prompts, (0, 0.9), (1, 0.8)))
    text = figures.render().decode()
    assert "neighbour" not in text
    assert 'prompt="car"' in text


def test_each_server_has_figures_of_its_own() -> None:
    one, other = Figures(), Figures()
    one.responded("/v1/predict", 200, 0.1)
    assert "/v1/predict" in one.render().decode()
    assert "/v1/predict" not in other.render().decode()


def test_scores_are_told_as_a_histogram_beside_those_of_validation() -> None:
    figures = Figures()
    results = [
        {"image_id": 1, "category_id": 1, "score": 0.6},
        {"image_id": 1, "category_id": 1, "score": 0.97},
        {"image_id": 2, "category_id": 1, "score": 0.97},
    ]
    engine = Named(finder=Told(scores=count_scores(4, {1: "car"}, results, 0.4)))
    figures.answered(engine, IMAGE, (query("car"),), found(("car",), (0, 0.52), (0, 0.3)))
    values = read(figures)
    labels = ("model", "nano", "prompt", "car", "version", "1")
    bucket = {
        name: [
            values[(f"sam3_{name}_bucket", "le", le, *labels)]
            for le in ("0.5", "0.55", "0.95", "1", "+Inf")
        ]
        for name in ("class_score", "validation_score")
    }
    assert bucket["class_score"] == [0, 1, 1, 1, 1]  # 0.3 is below the threshold
    assert bucket["validation_score"] == [0, 0, 1, 3, 3]
    assert values["sam3_validation_found_share", *labels] == 2 / 4


def test_an_engine_that_is_gone_tells_no_drift() -> None:
    figures, engine = Figures(), Named()
    figures.answered(engine, IMAGE, (query("car"),), found(("car",), (0, 0.9)))
    assert "sam3_class_score_bucket" in figures.render().decode()
    del engine
    gc.collect()
    assert "sam3_class_score_bucket" not in figures.render().decode()


def test_a_servers_requests_are_counted_and_its_doubts_kept(nano: Loaded, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    with serving(nano.engine(), observer=Figures(keeper)) as client:
        for _ in range(2):
            answer = client.post("/v1/predict", files=files(scene()), data={"threshold": "0.01"})
            assert answer.status_code == 200
        assert client.post("/v1/predict", json={}).status_code == 422
        assert client.get("/v2/models/other/ready").status_code == 404
        assert client.get("/no/such/path").status_code == 404
        until(lambda: not keeper._busy.locked(), "the image is kept")
        told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=")
    values = as_read(told.text)
    routes = {key[2:]: value for key, value in values.items() if key[0] == "sam3_requests_total"}
    assert routes["/v1/predict", "status", "200"] == 2
    assert routes["/v1/predict", "status", "422"] == 1
    assert routes["/v2/models/{model}/ready", "status", "404"] == 1
    assert routes["unknown", "status", "404"] == 1
    assert values["sam3_request_seconds_count", "route", "/v1/predict"] == 3
    stages = ("decode", "queue", "encode", "prompts", "masks")
    counts = [values["sam3_stage_seconds_count", "stage", stage] for stage in stages]
    assert counts == [1, 2, 1, 2, 2]  # the second was seen before
    assert values["sam3_queue_length", "model", "nano", "version", "1"] == 0
    assert values["sam3_images_total", "model", "nano", "version", "1"] == 2
    content = json.loads((tmp_path / "train" / "_annotations.coco.json").read_text())
    assert len(content["images"]) == 1
    assert [each["name"] for each in content["categories"]] == list(nano.finder.prompts)
    assert len(content["annotations"]) > 2


# --- drift ---------------------------------------------------------------------------------------


def _counts(scores: np.ndarray) -> list[int]:
    return np.histogram(scores, bins=BINS, range=(0, 1))[0].tolist()


def test_the_index_is_that_of_its_definition() -> None:
    """Two groups of ten bins each, by hand."""
    expected, actual = [0] * BINS, [0] * BINS
    expected[9], expected[19] = 200, 200
    actual[9], actual[19] = 300, 100
    e = np.array([200.5, 200.5]) / 401
    a = np.array([300.5, 100.5]) / 401
    assert stability_index(expected, actual) == pytest.approx(((a - e) * np.log(a / e)).sum())


def test_the_index_tells_a_change_from_chance() -> None:
    numbers = np.random.default_rng(1)
    drawn = [_counts(numbers.beta(8, 2, 400)) for _ in range(50)]
    same = [stability_index(drawn[0], other) for other in drawn[1:]]
    assert max(index for index in same if index is not None) < 0.15
    assert all(index is not None for index in same)
    lower = stability_index(drawn[0], _counts(numbers.beta(5, 4, 400)))
    assert lower is not None
    assert lower > 0.25


def test_the_index_of_few_is_not_told() -> None:
    many = _counts(np.random.default_rng(2).random(500))
    assert stability_index(many, _counts(np.full(LEAST - 1, 0.5))) is None
    assert stability_index(_counts(np.full(500, 0.9)), many) is None  # one group alone
    assert stability_index([], many) is None
    assert stability_index(_counts(np.array([0.9, 0.8])), many) is None


def test_only_questions_like_those_of_validation_count() -> None:
    scores = ScoreCounts(10, {"car": 10}, {"car": _counts(np.random.default_rng(3).random(100))})
    drift = Drift(Told(scores=scores))  # type: ignore[arg-type]
    answer = found(("car",), (0, 0.9))
    drift.add([query("car", threshold=0.8)], answer)  # what scores less was not asked for
    drift.add([query("car", boxes=((1, 2, 3, 4),))], answer)
    drift.add([query("tree")], found(("tree",), (0, 0.9)))
    assert sum(drift.counts()["car"]) == 0
    drift.add([query("car", threshold=0.1)], found(("car",), (0, 0.9), (0, 0.2)))
    assert sum(drift.counts()["car"]) == 1


def test_drift_is_that_of_the_newest_answers() -> None:
    numbers = np.random.default_rng(4)
    validation = numbers.uniform(0.7, 1, 300)
    scores = ScoreCounts(100, {"car": 80}, {"car": _counts(validation)})
    drift = Drift(Told(scores=scores))  # type: ignore[arg-type]

    def answer(low: float, high: float) -> None:
        for score in numbers.uniform(low, high, WINDOW):
            drift.add([query("car")], found(("car",), (0, float(score))))

    answer(0.7, 1)
    assert drift.indices()["car"] < 0.1
    answer(0.4, 0.7)
    assert drift.indices()["car"] > 1
    answer(0.7, 1)
    assert drift.indices()["car"] < 0.1
    assert drift.shares()["car"] == 1
    assert drift.validation_shares() == {"car": 0.8, "bus": 0}
    for _ in range(WINDOW):
        drift.add([query("car")], found(("car",)))
    assert drift.shares()["car"] == 0


# --- what reads the figures ----------------------------------------------------------------------


def _expressions(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node[key] for key in ("expr", "definition") if isinstance(node.get(key), str)]
        return own + [each for value in node.values() for each in _expressions(value)]
    return [each for one in node for each in _expressions(one)] if isinstance(node, list) else []


def test_dashboard_alerts_and_docs_name_figures_that_there_are() -> None:
    figures, engine = Figures(), Named(finder=Told(scores=ScoreCounts(1, {}, {"car": [1] * BINS})))
    figures.answered(engine, IMAGE, (query("car"),), found(("car",), (0, 0.9)))
    figures.shadowed(engine, None)
    figures.responded("/v1/predict", 200, 0.1)
    families = list(text_string_to_metric_families(figures.render().decode()))
    known = {family.name for family in families}
    known |= {sample.name for family in families for sample in family.samples}
    named = {
        "grafana.json": " ".join(_expressions(json.loads((DOCS / "grafana.json").read_text()))),
        "alerts.yml": " ".join(_expressions(yaml.safe_load((DOCS / "alerts.yml").read_text()))),
        "watching.md": (DOCS / "watching.md").read_text(),
        "sam3.yaml": (REPOSITORY / "deploy" / "kubernetes" / "sam3.yaml").read_text(),
    }
    used = {
        name: set(re.findall(r"\bsam3_[a-z0-9_]+|process_\w+", text))
        for name, text in named.items()
    }
    assert used["sam3.yaml"] == {"sam3_queue_length"}
    assert all(used.values())
    unknown = {name: words - known for name, words in used.items()}
    assert {name: words for name, words in unknown.items() if words} == {}
    told = {f.name for f in families if re.match(r"sam3_.*(?<!_created)$", f.name)}
    listed = {word.removesuffix("_total") for word in used["watching.md"]}
    assert told - listed == set()


def test_labels_of_expressions_are_those_of_the_figures() -> None:
    figures, engine = Figures(), Named()
    figures.answered(engine, IMAGE, (query("car"),), found(("car",), (0, 0.9)))
    figures.responded("/v1/predict", 200, 0.1)
    labels = {
        label
        for family in text_string_to_metric_families(figures.render().decode())
        for sample in family.samples
        for label in sample.labels
    } | {"job", "instance"}
    text = " ".join(
        _expressions(json.loads((DOCS / "grafana.json").read_text()))
        + _expressions(yaml.safe_load((DOCS / "alerts.yml").read_text()))
    )
    used = {word for part in re.findall(r"{([^}]*)}", text) for word in re.findall(r"(\w+)=", part)}
    used |= {
        word.strip() for part in re.findall(r"by \(([^)]*)\)", text) for word in part.split(",")
    }
    assert used - labels == set()
