"""The words that a model can be asked for; the torch that stores them is in `stored_text`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from app.errors import nearest

VISUAL_PROMPT = "visual"  # what upstream says in place of words when there are boxes only


def unknown_words(vocabulary: Collection[str] | None, words: Collection[str]) -> list[str]:
    """Return a problem for each word that a model with this vocabulary cannot be asked for.

    Args:
        vocabulary: of `ModelConfig`; None: it can be asked for any.
    """
    if vocabulary is None:
        return []
    askable = [word for word in vocabulary if word != VISUAL_PROMPT]
    return [
        f"'{word}': is not in the vocabulary that these weights were made with: "
        f"{', '.join(askable)}.{nearest(word, askable)}"
        for word in dict.fromkeys(words)
        if word not in (*askable, VISUAL_PROMPT)
    ]


def in_vocabulary(vocabulary: Collection[str] | None, words: Sequence[str]) -> list[str]:
    """Return the words that a model with this vocabulary can be asked for."""
    return [word for word in words if not unknown_words(vocabulary, [word])]
