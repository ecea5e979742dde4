"""The page that `make bench` writes."""

from pathlib import Path

import pytest

from load.bench import draw, table, times_as_fast
from load.figures import VARIABLE, Figures, note, noted

OURS = Figures("t", "ours", [2.0, 1.0, 4.0], "s", False)
THEIRS = Figures("t", "theirs", [8.0, 6.0, 9.0], "s", True)


def test_what_benchmarks_note_is_collected_by_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note("t", "nobody collects this", [1.0], "s")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "figures"))
    note("t", "ours", OURS.values, "s")
    note("u", "other", [3.0], "images/s")
    note("t", "theirs", THEIRS.values, "s", is_alternative=True)
    assert noted(tmp_path / "figures")["t"] == [OURS, THEIRS]
    assert list(noted(tmp_path / "figures")) == ["t", "u"]


def test_ratios_say_how_many_times_as_fast_ours_is() -> None:
    assert times_as_fast(OURS, THEIRS) == 4.0
    more = [Figures("t", side, [value], "images/s", False) for side, value in (("a", 300.0), ("b", 100.0))]
    assert times_as_fast(*more) == 3.0


def test_the_table_has_medians_with_their_spread() -> None:
    assert table([OURS, THEIRS]).splitlines() == [
        "| | s | lowest to highest | of theirs |",
        "|---|---|---|---|",
        "| ours | 2 | 1 to 4 | 4.00x |",
        "| theirs | 8 | 6 to 9 | |",
    ]


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw("t", [OURS, THEIRS], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"ours" in (tmp_path / "a.svg").read_bytes() or b"<use" in (tmp_path / "a.svg").read_bytes()
