"""The pictures show the figures of the rows, all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speculative.bench.__main__ import plots
from speculative.bench.timeline import Timeline

Row = dict[str, Any]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that was saved, still open."""
    drawn: list[Any] = []

    def keep(figure: Any, path: Path) -> None:
        figure.savefig(path, dpi=40)
        drawn.append(figure)

    monkeypatch.setattr("lab.drawing.save", keep)
    return drawn


def _row(mode: str, rtt_seconds: float, speedup: float, **more: Any) -> Row:
    sample = {"median": speedup, "low": 0.9 * speedup, "high": 1.1 * speedup, "n": 3}
    row = {"mode": mode, "draft_length": {"sync": 8, "async": "auto"}.get(mode, 0), "rtt_seconds": rtt_seconds}
    return row | {"speedup": sample, "predicted_speedup": None} | more


def test_measured_points_predicted_lines_and_acceptance(tmp_path: Path, figures: list[Any]) -> None:
    rows = [
        _row(mode, rtt, speed - 5 * rtt, predicted_speedup=None if mode == "target_only" else speed)
        for mode, speed in (("target_only", 1.0), ("sync", 2.3), ("async", 2.5))
        for rtt in (0.0, 0.05, 0.1)
    ]
    rows[-3]["alpha_by_position"] = [0.8, 0.7, 0.9]
    rows[-2]["alpha_by_position"] = rows[-1]["alpha_by_position"] = [0.8, 0.6]
    path = plots.draw_speedups(tmp_path / "speedup.png", rows, "title")
    assert path.stat().st_size > 1000
    [figure] = figures
    speeds, acceptance = figure.axes
    labels = [text.get_text() for text in speeds.get_legend().get_texts()]
    assert labels == ["target alone", "sync, k = 8", "async, k = auto"]
    points = {line.get_label(): list(line.get_ydata()) for bars in speeds.containers for line in [bars.lines[0]]}
    assert list(points.values())[-1] == pytest.approx([2.5, 2.25, 2.0])
    dashed = [list(line.get_ydata()) for line in speeds.get_lines() if line.get_linestyle() == "--"]
    assert [2.3] * 3 in dashed
    assert [2.5] * 3 in dashed
    curves = {line.get_label(): list(line.get_ydata()) for line in acceptance.get_lines()}
    assert curves == {"0 ms": [0.8, 0.7, 0.9], "50, 100 ms": [0.8, 0.6]}


def test_a_panel_for_each_text(tmp_path: Path, figures: list[Any]) -> None:
    rows = [
        _row(mode, 0.0, speed, text=text)
        for text in ("edit", "prose")
        for mode, speed in (("assisted", 1.4), ("target_only", 1.0), ("async", 1.6))
    ]
    plots.draw_texts(tmp_path / "texts.png", rows)
    assert [axes.get_title() for axes in figures[0].axes] == ["edit", "prose"]
    assert any(list(line.get_ydata()) == [1.4, 1.4] for line in figures[0].axes[0].get_lines()), "the baseline"


def test_who_was_busy_when(tmp_path: Path, figures: list[Any]) -> None:
    timeline = Timeline([(0.0, 0.04), (0.04, 0.09)], [1, 5], [(0.0, 0.004)], [(0.06, 1, False), (0.11, 3, True)])
    plots.draw_timelines(tmp_path / "busy.png", {"sync": timeline, "async": timeline}, 0.04)
    first = figures[0].axes[0]
    assert [text.get_text() for text in first.texts] == ["1", "5"]
    assert [line.get_linestyle() for line in first.get_lines()] == ["-", "--"]
    assert list(first.get_lines()[1].get_xdata()) == pytest.approx([0.09, 0.11]), "half the round trip"
