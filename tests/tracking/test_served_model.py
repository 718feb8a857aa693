"""The model that MLflow serves, asked as its server asks it."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tests.helpers import REPOSITORY

SCENE = REPOSITORY / "examples" / "scene.png"


@pytest.fixture(scope="module")
def served() -> Any:
    """The object that MLflow loads, with weights that it can be asked with."""
    from app.tracking.served_model import Sam3

    model = Sam3()
    weights = SimpleNamespace(artifacts={"weights": str(REPOSITORY / "app/assets/nano")})
    model.load_context(weights)
    return model


def test_a_served_image_is_bytes_or_their_base64(served: Any) -> None:
    """As text, as bytes, with line breaks, or as a web page writes it."""
    whole = SCENE.read_bytes()
    text = base64.b64encode(whole).decode()
    wrapped = base64.encodebytes(whole)
    forms = [whole, text, text.encode(), wrapped, f"data:image/png;base64,{text}"]
    table = pd.DataFrame({"image": forms, "prompts": [["circle"], "circle", None, None, None]})
    answers = served.predict(None, table)
    assert len(answers[0]["scores"]) > 0
    assert answers[0] == answers[1]
    assert answers[2] == answers[3] == answers[4]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("no base64!", "row 0: image: is text, and no base64"),
        (b"no image at all", "row 0: image: cannot be read as an image \\(it is none of JPEG"),
        (base64.b64encode(b"neither is this"), "row 0: image: cannot be read as an image"),
        (None, "row 0: image: must be the bytes of a JPEG or PNG, or their base64; it is NoneType"),
    ],
)
def test_what_is_wrong_with_a_served_image(served: Any, image: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        served.predict(None, pd.DataFrame({"image": [image]}))
    assert "/tmp" not in str(error.value)
