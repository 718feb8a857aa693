"""Fixtures of the server's tests: nano, loaded once, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.servers import Loaded, load_nano, serving


@pytest.fixture(scope="session")
def nano() -> Loaded:
    return load_nano()


@pytest.fixture(scope="module")
def client(nano: Loaded) -> Iterator[httpx.Client]:
    """A server of nano with the usual limits, which the tests of a module share."""
    with serving(nano.engine()) as client:
        yield client
