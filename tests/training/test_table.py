"""The table of a run: figures under their headings, time left, headings again."""

from __future__ import annotations

from app.training.table import AGAIN, Table


def test_figures_stand_under_their_headings() -> None:
    table = Table(epochs=20)
    heading, before = table.row(0, {"bbox/AP": 0.25, "off_prompt/firing": 1.5}).split("\n")
    row = table.row(3, {"train/loss": 12.346, "segm/AP50": 0.5, "train/loss_mask": 0.01})
    assert "\n" not in row
    for line, name, value in (
        (before, "box AP", "0.250"),
        (before, "off-prompt", "1.50"),
        (row, "loss", "12.35"),
        (row, "masks", "0.010"),
    ):
        assert line.index(value) + len(value) == heading.index(name) + len(name)
    assert row.index("0.500") + 5 == heading.rindex("AP50") + 4
    assert before.split() == ["0/20", "0.250", "1.50"]  # what is not known is left empty


def test_time_left_stands_at_the_end() -> None:
    table = Table(epochs=12)
    assert table.row(10, {}, 30.0).endswith("  30 s")
    assert table.row(11, {"bbox/AP": 0.5}, 75.0).endswith("  1 min 15 s")


def test_headings_come_again() -> None:
    table = Table(epochs=100)
    rows = [table.row(epoch, {}) for epoch in range(1, 2 * AGAIN + 1)]
    assert [n for n, row in enumerate(rows) if "box AP" in row] == [0, AGAIN]
