from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from app.config.compose import load_model_config
from app.deploy.tokenizer import write_tokenizer
from app.model.build import build_model


def test_the_tokenizer_reads_as_upstreams_does(tmp_path: Path) -> None:
    words = ["red circle", "  A  Dog's\tbowl ", "naïve café 42%", "狗", "visual", "x-ray (left)"]
    write_tokenizer(tmp_path / "tokenizer.json")
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text: Any = build_model(load_model_config("nano"), device="meta").backbone.language_backbone
    for word, tokens in zip(words, text.tokenizer(words, context_length=32), strict=True):
        assert read.encode(word).ids == [token for token in tokens.tolist() if token], word
