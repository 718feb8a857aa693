"""A page over the rounds of a ring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.files import write_text
from app.page import page, table, text
from app.ring.rounds import Round

REPORT = "ring.html"
HEADING = (
    *("round", "images", "objects", "AP before", "AP after", "difference, 95 %"),
    *("verdict", "minutes", "proposals kept", "moved, removed, added"),
)


def write_report(folder: Path, rounds: Sequence[Round]) -> Path:
    """Write `ring.html`; return its file."""
    rows = [_row(each) for each in rounds]
    kind = "box" if rounds and rounds[-1].figure.startswith("bbox") else "mask"
    words = f"The {kind} AP on the validation set. Better is a whole interval above 0."
    parts = ["<h2>Rounds</h2>", f"<p>{words}</p>", table(HEADING, rows)]
    if rounds and rounds[-1].second_look:
        looked = [[text(name), text(why)] for name, why in rounds[-1].second_look]
        parts += [
            "<h2>Labels worth a second look</h2>",
            "<p>Where the last round's weights see the images that they learnt from otherwise than "
            "they are labelled.</p>",
            table(("image", "what differs"), looked, numbers=2),
        ]
    file = folder / REPORT
    write_text(file, page("The ring", parts))
    return file


def _row(each: Round) -> list[str]:
    share = each.review.accepted
    return [
        str(each.number),
        str(each.images),
        str(each.objects),
        f"{each.before:.3f}",
        f"{each.after:.3f}",
        f"{each.low:+.3f} to {each.high:+.3f}",
        "new champion" if each.is_better else "champion stays",
        f"{each.minutes:.1f}",
        "–" if share is None else f"{share:.0%}",
        f"{each.review.moved}, {each.review.removed}, {each.review.added}",
    ]
