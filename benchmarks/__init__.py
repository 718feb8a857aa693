"""What is measured by hand, each by its own command; `docs/figures.md` has the figures."""

import app  # noqa: F401  # first, because it prepares the import of torch
