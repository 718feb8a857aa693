"""The features of images that were seen before, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from app.inference.finder import Encoded


class FeatureCache:
    """Keeps features by the hash of an image's file; the longest unused go first.

    Args:
        most: bytes of all features.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._entries: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> Encoded | None:
        """Return the features of an image; None where they are not kept."""
        with self._lock:
            if digest in self._entries:
                self._entries.move_to_end(digest)
            return self._entries.get(digest)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def put(self, digest: str, encoded: Encoded) -> None:
        """Keep features, unless they alone are too many."""
        with self._lock:
            if encoded.nbytes > self._most or digest in self._entries:
                return
            self._entries[digest] = encoded
            self._held += encoded.nbytes
            while self._held > self._most:
                self._held -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._entries.clear()
            self._held = 0

    @property
    def nbytes(self) -> int:
        """The memory of what is kept."""
        return self._held
