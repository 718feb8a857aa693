"""CLIP's tokenizer of prompts, for the libraries that exported folders are read by."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.model.transformers.config import TOKENS, VOCABULARY
from app.model.upstream.pin import bpe_path

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def make_tokenizer() -> CLIPTokenizer:
    """Return upstream's vocabulary (tokenizer_ve.py) as transformers' CLIP tokenizer."""
    from sam3.model.tokenizer_ve import bytes_to_unicode
    from transformers import CLIPTokenizer

    lines = gzip.decompress(bpe_path().read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 * 256 - 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def write_tokenizer(file: Path) -> None:
    """Write `tokenizer.json`, which the tokenizers package reads."""
    make_tokenizer().backend_tokenizer.save(str(file))
