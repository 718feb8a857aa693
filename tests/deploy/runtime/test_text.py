"""Prompts beside upstream's own tokenizer, and stored ones."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sam3.model.tokenizer_ve import SimpleTokenizer

from app.deploy.runtime.manifest import Manifest, read_manifest
from app.deploy.runtime.runtime import Runtime
from app.deploy.runtime.text import TOKENIZER, AnyWords, clean
from app.deploy.tokenizer import write_tokenizer
from app.errors import UserError
from app.model.upstream.pin import bpe_path
from tests.deploy.tiny import TOKENS, features, write_folder, write_manifest

WORDS = (
    *("circle", "  A Red\tThing ", "l'école d'été", "x", "don't stop", "3 dogs, 2 cats!"),
    *("&lt;b&gt; bold &amp;amp; more", "naïve café", "schÃ¶n", "日本語の看板", "🙂", "a_b-c/d"),
    *("pothole " * 40, "!", "ＦＵＬＬ", "cafe\u0301"),
)


@pytest.fixture(scope="module")
def any_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("words") / "tiny", any_words=True)
    write_tokenizer(folder / TOKENIZER)
    write_manifest(folder, read_manifest(folder))
    return folder


@pytest.mark.parametrize("length", [32, 5])
def test_tokens_are_upstreams(any_words: Path, length: int) -> None:
    manifest = Manifest(**{**vars(read_manifest(any_words)), "context_length": length})
    words = AnyWords(any_words, manifest, lambda tokens: (tokens, tokens == 0))
    theirs = SimpleTokenizer(bpe_path())
    for prompt in WORDS:
        expected = theirs([prompt], context_length=length).numpy()
        np.testing.assert_array_equal(words.tokens(prompt), expected, err_msg=prompt)


def test_without_ftfy_only_broken_encodings_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = {prompt: clean(prompt) for prompt in WORDS}
    monkeypatch.setitem(sys.modules, "ftfy", None)
    without = {prompt: clean(prompt) for prompt in WORDS}
    assert {prompt for prompt in WORDS if with_it[prompt] != without[prompt]} == {
        "schÃ¶n",
        "ＦＵＬＬ",
    }


def test_any_words_are_asked_for_by_the_text_graph(any_words: Path) -> None:
    """The tiny text graph repeats each token's number."""
    runtime = Runtime.load(any_words, backend="onnxruntime")
    text, mask = runtime.text(["circle", "dog"])
    tokens = SimpleTokenizer(bpe_path())(["circle", "dog"], context_length=TOKENS).numpy()
    np.testing.assert_array_equal(text[:, :, 0], tokens)
    np.testing.assert_array_equal(mask, tokens == 0)


def test_without_the_package_it_says_what_to_install(
    any_words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        Runtime.load(any_words, backend="onnxruntime")


def test_a_tokenizer_with_another_pattern_is_refused(any_words: Path, tmp_path: Path) -> None:
    """One made for it searches a short prompt for hours."""
    folder = shutil.copytree(any_words, tmp_path / "tiny")
    content = json.loads((folder / TOKENIZER).read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+!"}, "content": " "}
    (folder / TOKENIZER).write_text(json.dumps(content))
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UserError, match=r"tokenizer\.json: .* another pattern than CLIP's"):
        Runtime.load(folder, backend="onnxruntime")


def test_a_broken_tokenizer(any_words: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", any_words=True)
    with pytest.raises(UserError, match=r"the manifest names no tokenizer\.json"):
        Runtime.load(folder, backend="onnxruntime")
    (folder / TOKENIZER).write_text((any_words / TOKENIZER).read_text()[:1000])
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        Runtime.load(folder, backend="onnxruntime")


@pytest.mark.parametrize(
    "stored",
    [
        {"features": features()[:2], "mask": np.zeros((2, TOKENS), bool)},
        {"features": features().astype(np.float64), "mask": np.zeros((3, TOKENS), bool)},
        {"features": features()[:, :, 0], "mask": np.zeros((3, TOKENS), bool)},
    ],
)
def test_features_that_are_not_the_manifests(stored: dict, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    np.savez(folder / "text.npz", **stored)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UserError, match="are not those of 3 prompts of 4 tokens"):
        Runtime.load(folder, backend="onnxruntime")


def test_features_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    np.savez(folder / "text.npz", features=np.array([{}]), mask=np.zeros((3, TOKENS), bool))
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UserError, match=r"text\.npz: cannot be read"):
        Runtime.load(folder, backend="onnxruntime")
