"""Serve weights over HTTP: an API, a page, versions and figures.

The way of a request: `guard.py` checks who asks and takes the body; a route of `api.py` reads it by
`messages.py` and `uploads.py`; `engine.py` asks the model, whose features `cache.py` keeps;
`answers.py` writes what is found.
"""
