"""The features of prompts, as the ground graph takes them: stored ones, or a text graph's."""

from __future__ import annotations

import html
import importlib
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.deploy.runtime.manifest import REMEDY, Manifest, check_files
from app.errors import UserError
from app.files import SETTINGS_BYTES, read_json
from app.model.vocabulary import unknown_words

STORED, TOKENIZER = "text.npz", "tokenizer.json"
STARTS, ENDS = ("<|startoftext|>", "<start_of_text>"), ("<|endoftext|>", "<end_of_text>")
# Regular expressions of CLIP's tokenizer, as app/deploy/tokenizer.py writes it.
PATTERNS = (
    r"\s+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
CACHED = 256  # prompts whose features are cached
Texts = tuple[NDArray[np.float32], NDArray[np.bool_]]  # (K, L, D); (K, L), True: no token


class Words(Protocol):
    """Encodes prompts."""

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """Return features (K, L, D) and mask (K, L) of K prompts; raise UserError."""


class StoredWords:
    """Encodes the prompts of a fixed vocabulary, whose features are stored.

    Raises:
        UserError: the file is missing, changed, or not what the manifest describes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        check_named(folder, manifest, STORED)
        self.prompts = manifest.prompts or ()
        self._places = {prompt: place for place, prompt in enumerate(self.prompts)}
        try:
            with np.load(folder / STORED, allow_pickle=False) as content:
                self.features, self.mask = content["features"], content["mask"]
        except (OSError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / STORED}: cannot be read ({error}). {REMEDY}") from None
        expected = (len(self.prompts), manifest.context_length)
        types = (self.features.dtype, self.mask.dtype) == (np.float32, np.bool_)
        shapes = self.features.shape[:2] == self.mask.shape == expected and self.features.ndim == 3
        if not (types and shapes):
            raise UserError(
                f"{folder / STORED}: features {self.features.shape} and mask {self.mask.shape} are "
                f"not those of {expected[0]} prompts of {expected[1]} tokens. {REMEDY}"
            )

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """Return the stored features; raise UserError for other prompts, and list those stored."""
        unknown = [prompt for prompt in prompts if prompt not in self._places]
        if unknown:
            raise UserError(
                unknown_words(self.prompts, unknown)
                or f"{unknown}: must be among {', '.join(self.prompts)}"
            )
        places = [self._places[prompt] for prompt in prompts]
        return self.features[places], self.mask[places]


class AnyWords:
    """Encodes any prompt by a tokenizer and the text graph.

    Args:
        encode: tokens (1, L) int64 → features (1, L, D) and mask (1, L).

    Raises:
        UserError: the tokenizers package is missing, or the file is missing, changed or broken.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, encode: Callable[[NDArray[np.int64]], Texts]
    ) -> None:
        check_named(folder, manifest, TOKENIZER)
        self._encode, self._length = encode, manifest.context_length
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ImportError:
            raise UserError(
                f"{folder}: takes any words, for which a package is missing: pip install tokenizers"
            ) from None
        try:
            _check_patterns(folder / TOKENIZER)
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the package raises nothing narrower
            raise UserError(f"{folder / TOKENIZER}: cannot be read ({error}). {REMEDY}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._start, self._end = (self._special(folder, names) for names in (STARTS, ENDS))
        self._cache: dict[str, Texts] = {}

    def _special(self, folder: Path, names: Sequence[str]) -> int:
        """Return the number of a special token, by the first of its names that there is."""
        for name in names:
            if (number := self._tokenizer.token_to_id(name)) is not None:
                return int(number)
        raise UserError(f"{folder / TOKENIZER}: has no token {names[0]}. {REMEDY}")

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """Return the features of the prompts, computed once for each."""
        texts = [self._text(prompt) for prompt in prompts]
        features, masks = zip(*texts, strict=True)
        return np.concatenate(features), np.concatenate(masks)

    def _text(self, prompt: str) -> Texts:
        if prompt not in self._cache:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[prompt] = self._encode(self.tokens(prompt))
        return self._cache[prompt]

    def tokens(self, prompt: str) -> NDArray[np.int64]:
        """Return tokens (1, L) as upstream's: cut to L with the end token last, and 0 behind it."""
        ids = self._tokenizer.encode(clean(prompt), add_special_tokens=False).ids
        ids = [self._start, *ids[: self._length - 2], self._end]
        tokens = np.zeros((1, self._length), dtype=np.int64)
        tokens[0, : len(ids)] = ids
        return tokens


def _check_patterns(file: Path) -> None:
    """Raise ValueError where a tokenizer has another regular expression than CLIP's.

    With one made for it, a prompt of a line is searched for hours.
    """
    waiting = [read_json(file, most=SETTINGS_BYTES)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
            if node.get("Regex", PATTERNS[0]) not in PATTERNS:
                raise ValueError(f"it has another pattern than CLIP's: {node['Regex']!r}")
        elif isinstance(node, list):
            waiting += node


def clean(text: str) -> str:
    """Clean a prompt as upstream's tokenizer does: Unicode, HTML, blanks, lower case.

    Without the ftfy package broken encodings stay as they are; NFC does the rest of its work.
    """
    try:
        fix: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    except ImportError:
        text = unicodedata.normalize("NFC", text)
    else:
        text = fix(text)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def check_named(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise UserError where a file is not what the manifest says, or not in the manifest."""
    if name not in manifest.files:
        raise UserError(f"{folder}: the manifest names no {name}. {REMEDY}")
    check_files(folder, manifest, [name])
