"""Record how long the work of a real run takes: what `test_pace.py` replays.

    python tests/training/record_durations.py OUTPUT_DIR     # on a quiet machine

Writes `recorded_durations.json` beside itself: for each piece of work its kind, the seconds that
passed before it since the piece before, and its own; the end of the run is a piece as well.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from app.__main__ import main
from app.training import pace, run


def record(output: str) -> None:
    """Run `./train.sh` as it stands, and note each piece of its work."""
    work: list[tuple[str, float, float]] = []
    last = time.monotonic()

    def note(kind: str, seconds: float) -> None:
        nonlocal last
        now = time.monotonic()
        work.append((kind, round(max(now - last - seconds, 0.0), 4), round(seconds, 4)))
        last = now

    add, score = pace.Pace.add, run.score_best

    def add_and_note(self: pace.Pace, kind: pace.Kind, seconds: float) -> None:
        note(kind, seconds)
        add(self, kind, seconds)

    def score_and_note(*arguments: object) -> object:
        begun = time.monotonic()
        scored = score(*arguments)  # type: ignore[arg-type]
        note("validation", time.monotonic() - begun)
        return scored

    pace.Pace.add = add_and_note  # type: ignore[method-assign]
    run.score_best = score_and_note  # type: ignore[assignment]
    sys.argv = ["train", "train", "--output-dir", output]
    try:
        main()
    finally:
        note("end", 0.0)
        lines = ",\n".join(json.dumps(piece) for piece in work)
        Path(__file__).with_name("recorded_durations.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    record(sys.argv[1])
