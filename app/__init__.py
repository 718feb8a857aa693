"""Teach SAM 3 (Segment Anything with Concepts) to find your things."""

from app.model.upstream.pin import prepare_import

__version__ = "0.1.0"

prepare_import()
