"""A server that knows concepts answers them by name, as the predictor does."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import UserError
from app.inference import Predictor, concepts
from app.inference.finder import StagedFinder
from app.serving.engine import Engine
from app.serving.loading import Source
from app.serving.settings import Settings
from tests.serving.servers import NANO, files, opened, scene, serving
from tests.serving.test_api import same


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A concept of a box in the scene."""
    predictor = Predictor.load(NANO, device="cpu")
    made = predictor.concept("widget", [(opened(scene()), [(100, 100, 80, 80)])])
    concepts.write(tmp_path / "widget.concept", [made])
    return tmp_path / "widget.concept"


def test_it_is_a_prompt_like_others(file: Path) -> None:
    source = Source(NANO, "nano", device="cpu", concepts=(str(file),))
    engine = Engine(source.load, Settings())
    expected = Predictor.load(NANO, device="cpu")
    expected.learn(concepts.read(file))
    found = expected.predict(opened(scene()), ["widget", "circle"], threshold=0.01)
    with serving(engine) as client:
        (model,) = client.get("/v1/models").json()["models"]
        assert model["prompts"][-1] == "widget"
        data = {"prompt": ["widget", "circle"], "threshold": "0.01"}
        answer = client.post("/v1/predict", files=files(scene()), data=data)
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
    assert len(found) > 0
    same(result, found)


def test_a_finder_of_words_alone_takes_none(file: Path) -> None:
    class Words(StagedFinder):
        prompts, threshold = ("a",), 0.5
        prepare = encode = ground = finish = _find = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="concept 'widget': this finder takes words alone"):
        Words().learn(concepts.read(file))
