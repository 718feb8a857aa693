"""Teach SAM 3 (Segment Anything with Concepts) to find your things."""

import os
import sys

# `python -m app` looks for modules in the caller's folder first, which may be a dataset of others
# with a yaml.py in it. PYTHONSAFEPATH=1, which the scripts set, keeps Python from that as well.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (loaded)
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] != [_ROOT]:  # noqa: PTH109
    del sys.path[0]

from app.model.upstream.pin import prepare_import  # noqa: E402 (only now)

__version__ = "0.1.0"

prepare_import()
