"""docs/elsewhere.md, whose commands and lines the tests run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.helpers import REPOSITORY, finish

PAGE = (REPOSITORY / "docs" / "elsewhere.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run_documented(command: str, checkpoint: Path, output: Path | None, *more: object) -> None:
    """Run the command of the page that has these words, with its weights and output elsewhere.

    Args:
        output: its last word; None where it writes nothing.
        more: flags that spare a test time.
    """
    (line,) = [each for each in COMMANDS if f"app {command}" in each]
    words = [str(checkpoint) if word == "last" else word for word in shlex.split(line)[3:]]
    finish(*(words if output is None else [*words[:-1], output]), *more)


def lines_of(word: str, **places: Path) -> str:
    """Return the Python of the page that has this word, with folders of outputs/ elsewhere."""
    (block,) = [each for each in BLOCKS if word in each]
    for name, place in places.items():
        block = block.replace(f"outputs/{name}", str(place))
    return block
