"""The run as a table on the terminal: a row an epoch, the progress of the next one below."""

from __future__ import annotations

from collections.abc import Mapping

from app.console import duration

# Heading, figure, digits. What an epoch lacks is left empty.
COLUMNS = (
    ("loss", "train/loss", 2),
    ("boxes", "train/loss_bbox", 3),
    ("masks", "train/loss_mask", 3),
    ("box AP", "bbox/AP", 3),
    ("AP50", "bbox/AP50", 3),
    ("mask AP", "segm/AP", 3),
    ("AP50", "segm/AP50", 3),
    ("off-prompt", "off_prompt/firing", 2),
)
WIDTH = 7  # characters, least, of a column
AGAIN = 25  # rows between headings


class Table:
    """Format a run as lines for the log.

    Args:
        epochs: of the whole run.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._rows = 0

    def row(self, epoch: int, figures: Mapping[str, float], left: float | None = None) -> str:
        """Return the line of an epoch (0: before training), below a heading where one is due.

        Args:
            left: seconds that the run has left; None where they are not known.
        """
        cells = [f"{epoch}/{self.epochs}".rjust(WIDTH)]
        for heading, key, digits in COLUMNS:
            cell = f"{figures[key]:.{digits}f}" if key in figures else ""
            cells.append(cell.rjust(max(WIDTH, len(heading))))
        cells.append("" if left is None else duration(left))
        line = "  ".join(cells).rstrip()
        if self._rows % AGAIN == 0:
            line = f"{_heading()}\n{line}"
        self._rows += 1
        return line


def _heading() -> str:
    names = [heading.rjust(max(WIDTH, len(heading))) for heading, *_ in COLUMNS]
    return "  ".join(["epoch".rjust(WIDTH), *names, "left"])
