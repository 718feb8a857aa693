"""Teach SAM 3 (Segment Anything with Concepts) to find your things."""

from app.model.upstream import silence_import_warnings

__version__ = "0.1.0"

silence_import_warnings()
