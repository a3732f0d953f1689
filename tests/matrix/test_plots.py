"""Pictures of a sweep: what is drawn where, and that nothing lies over anything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lab.drawing import DPI
from lab.settings import UserError
from matrix import plots
from matrix.fitting import told_apart
from matrix.table import Table

mpl.use("Agg")

AXES = {"project.context": [128, 512, 1024], "project.sessions": [1, 2, 4]}
LABELS = {"project.context": "context window (tokens)", "project.sessions": "batch size (texts at once)"}
TIME = {"figure": "figures.token_seconds", "title": "token time", "unit": "ms", "scale": 1000.0, "better": "lower"}
SPEED = {"figure": "figures.speed", "title": "speed", "unit": "tokens/s", "scale": 1.0, "better": "higher"}


def table(
    axes: Mapping[str, Sequence[Any]] = AXES,
    failing: Callable[[dict[str, Any]], Any] | Sequence[tuple[Any, ...]] = (),
    repeats: int = 1,
    by: float = 1.0,
    figures: Callable[[dict[str, Any]], dict[str, Any]] = lambda point: {},
    metrics: Sequence[dict[str, Any]] | None = None,
) -> Table:
    results = []
    for repeat, values in itertools.product(range(repeats), itertools.product(*axes.values())):
        seconds = by * (0.01 + 0.001 * repeat + sum(v for v in values if isinstance(v, int)) / 1e5)
        point = dict(zip(axes, values))
        failed = failing(point) if callable(failing) else tuple(values) in failing
        results.append(
            {
                "status": "failed" if failed else "ok",
                "failure": "out of memory" if failed else None,
                "detail": "too much",
                "point": point,
                "figures": {} if failed else {"token_seconds": seconds, "speed": 1 / seconds} | figures(point),
                "seconds": 1.0,
                "limit": {},
                "command": "lab.decode",
                "words": ["model=random"],
                "device": "cpu: AMD EPYC, 2 cores",
                "host": "vm",
                "commit": "abc",
                "signature": "0",
            }
        )
    about = {"name": "decode", "axes": list(axes), "labels": LABELS, "model": "SmolLM2-135M"}
    about |= {"metrics": metrics or [TIME, SPEED]}
    about |= {"device": "cpu: AMD EPYC, 2 cores", "commit": "a993c00024fa+"}
    return Table.of({"sweep": about, "results": results})


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures of a drawing, by file name, not closed."""
    figures: dict[str, Figure] = {}
    save = plots.save

    def keep(figure: Figure, path: Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    return figures


def beyond(figure: Figure) -> list[mpl.text.Text]:
    """Labels of ticks outside the axes: they have a text and a place, and are not drawn."""
    every = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [(tick, sorted(axis.get_view_interval())) for axis in every for tick in axis.get_major_ticks()]
    outside = [tick for tick, (low, high) in ticks if not low <= tick.get_loc() <= high]
    spare = [tick for axis in every for tick in axis.majorTicks[len(axis.get_major_ticks()) :]]
    return [label for tick in outside + spare for label in (tick.label1, tick.label2)]


def texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that lie over each other, or over its edge."""
    figure.canvas.draw()
    hidden = beyond(figure)
    every = [text for text in figure.findobj(mpl.text.Text) if text.get_visible() and text.get_text().strip()]
    found = [text for text in every if text not in hidden]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    width, height = figure.canvas.get_width_height()
    outside = [(t, "edge") for t, box in boxes if min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1]
    pairs = itertools.combinations(boxes, 2)
    return outside + [(a, b) for (a, one), (b, two) in pairs if one.padded(-1).overlaps(two.padded(-1)) and a != b]


def texts_beyond_their_cell(figure: Figure) -> list[str]:
    """Texts of a heatmap that are wider than a cell."""
    axes = main_axes(figure)
    (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
    return [text.get_text() for text in axes.texts if text.get_window_extent().width > right - left]


def main_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def test_a_heatmap_has_every_figure_names_units_and_says_what_is_better(
    drawn: dict[str, Figure], tmp_path: Path
) -> None:
    paths = plots.draw_sweep(table(), tmp_path, lines_from=8)
    assert [path.file.name for path in paths] == ["token_seconds.png", "speed.png"]
    figure = drawn["token_seconds.png"]
    axes = main_axes(figure)
    assert figure.get_suptitle().splitlines() == [
        "token time (n = 1)", "SmolLM2-135M on cpu: AMD EPYC, 2 cores, commit a993c00024fa+"
    ]  # fmt: skip
    assert (axes.get_xlabel(), axes.get_ylabel()) == (LABELS["project.sessions"], LABELS["project.context"])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["128", "512", "1,024"]
    assert [text.get_text() for text in axes.texts][:2] == ["11.3", "11.3"]
    assert figure.axes[1].get_ylabel() == "token time (ms)"
    assert figure.get_figwidth() * DPI <= 1200


def test_yellow_is_good_whichever_way(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_sweep(table(), tmp_path, lines_from=8)
    for name, top in (("token_seconds.png", False), ("speed.png", True)):
        mesh = main_axes(drawn[name]).collections[0]
        red, green, blue, _ = mesh.to_rgba(1e9 if top else -1e9)
        assert red > 0.9
        assert green > 0.8
        assert blue < 0.3
        (better,) = [text for text in drawn[name].axes[1].texts if text.get_text() == "better"]
        assert (better.get_position()[1] > 1) == top


def test_failed_cells_are_hatched_with_their_reason(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_sweep(table(failing=[(1024, 4), (512, 1)]), tmp_path, lines_from=8)
    axes = main_axes(drawn["speed.png"])
    hatched = {patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()}
    assert hatched == {(2, 2), (0, 1)}
    assert [text.get_text() for text in axes.texts].count("out of memory") == 2


def test_spread_and_n_stand_with_the_median(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_sweep(table(repeats=3), tmp_path, lines_from=8)
    axes = main_axes(drawn["token_seconds.png"])
    assert drawn["token_seconds.png"].get_suptitle().startswith("token time (n = 3)")
    assert axes.texts[0].get_text() == "12.3\n11.3 – 13.3"


def test_an_axis_with_many_numbers_becomes_a_line(drawn: dict[str, Figure], tmp_path: Path) -> None:
    many = {"project.context": list(range(64, 64 * 11, 64)), "project.sessions": [1, 4]}
    plots.draw_sweep(table(many, failing=[(640, 4)]), tmp_path, lines_from=8)
    figure = drawn["token_seconds.png"]
    axes = main_axes(figure)
    assert axes.get_xlabel() == "context window (tokens)"
    assert axes.get_ylabel() == "token time (ms), lower is better"
    assert [len(line.get_xdata()) for line in axes.lines[:2]] == [10, 9]
    said = [f"{LABELS['project.sessions']} = {n}" for n in (1, 4)]
    assert [text.get_text() for text in figure.legends[0].texts] == [*said, "no figure: out of memory"]
    assert [(line.get_xdata()[0], line.get_color()) for line in axes.lines[2:]] == [(640, axes.lines[1].get_color())]
    assert not texts_overlap(figure)


def test_more_axes_make_more_pictures_fewer_one_row(drawn: dict[str, Figure], tmp_path: Path) -> None:
    three = {**AXES, "model.dtype": ["float32", "bfloat16"]}
    assert [path.file.name for path in plots.draw_sweep(table(three), tmp_path, lines_from=8)] == [
        "token_seconds_dtype-float32.png", "token_seconds_dtype-bfloat16.png",
        "speed_dtype-float32.png", "speed_dtype-bfloat16.png",
    ]  # fmt: skip
    assert "model.dtype = bfloat16" in drawn["speed_dtype-bfloat16.png"].get_suptitle()
    plots.draw_sweep(table({"project.sessions": [1, 2]}), tmp_path / "one", lines_from=8)
    assert main_axes(drawn["speed.png"]).get_xlabel() == LABELS["project.sessions"]
    plots.draw_sweep(table({}), tmp_path / "none", lines_from=8)


def test_a_comparison_is_a_ratio_per_cell(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_sweep(table(failing=[(128, 1)]), tmp_path, lines_from=8, other=table(by=2.0, failing=[(128, 2)]))
    axes = main_axes(drawn["token_seconds_ratio.png"])
    reasons = {"out of memory", "other sweep:\nout of memory"}
    assert {text.get_text() for text in axes.texts} - {""} == {"0.5×", *reasons}
    hatched = {patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()}
    assert hatched == {(0, 0), (1, 0)}
    mesh = axes.collections[0]
    assert mesh.get_clim() == (-1.0, 1.0)
    assert drawn["token_seconds_ratio.png"].get_suptitle().splitlines() == [
        "token time, ratio", "SmolLM2-135M on cpu: AMD EPYC, 2 cores, commit a993c00024fa+",
        "over SmolLM2-135M on cpu: AMD EPYC, 2 cores, commit a993c00024fa+",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [1, 3, 7, 10])
def test_no_text_lies_over_another(drawn: dict[str, Figure], tmp_path: Path, columns: int) -> None:
    axes = {"project.context": [128, 512, 1024], "project.sessions": [2**n for n in range(columns)]}
    other = table(axes, by=3.3, failing=[(512, 1)])
    plots.draw_sweep(table(axes, failing=[(1024, 1)], repeats=3), tmp_path, lines_from=99, other=other)
    assert len(drawn) == 4
    for name, figure in drawn.items():
        assert not texts_overlap(figure), name
        assert not texts_beyond_their_cell(figure), name


def test_overlapping_texts_are_noticed() -> None:
    """The negative control of the test above."""
    figure, axes = plt.subplots()
    axes.text(0.5, 0.5, "one text")
    axes.text(0.52, 0.5, "another")
    assert ("one text", "another") in texts_overlap(figure)
    axes.set_xlim(0, 100)
    assert texts_beyond_their_cell(figure) == ["one text", "another"]


SAID = "no room for the figures"
LONG = [f"/home/someone/data/2026/experiments/run-{number}/train.jsonl" for number in range(5)]
PICTURES: dict[str, tuple[Table, str]] = {
    "two hundred cells": (
        table({"a.one": [f"name-{n}" for n in range(20)], "b.two": list("abcdefghij")}, repeats=3, metrics=[TIME],
              failing=lambda point: point["b.two"] == "c"),
        "out of\nmemory",
    ),
    "two hundred narrow cells": (
        table({"a.one": list("abcd"), "b.two": [f"name-{n}" for n in range(50)]}, repeats=3, metrics=[TIME],
              failing=lambda point: point["b.two"] == "name-7"),
        SAID,
    ),
    "long names": (table({"a.one": [f"{'x' * 80}{n}" for n in range(3)], "b.two": LONG}, metrics=[TIME]), "…"),
    "eleven lines": (table({"a.one": list(range(1, 12)), "b.two": list(range(1, 12))}, metrics=[TIME]), "10.0"),
    "ten lines": (
        table({"a.one": list(range(1, 12)), "b.two": [f"{'y' * 50}{n}" for n in range(10)]}, metrics=[TIME],
              failing=lambda point: point["a.one"] == 3),
        "no figure: out of memory",
    ),
    "most of it failed": (table(failing=lambda point: point["project.sessions"] < 4, metrics=[TIME]), "out of memory"),
    "signs": (table({"a.one": ["$x$", "_", ""], "b.two": ["é\nè", "日", " "]}, metrics=[TIME]), "é è"),
    "lists": (table({"a.one": [["q"], ["q", "v"]], "b.two": [None, True, 1, "null"]}, metrics=[TIME]), "[q, v]"),
}  # fmt: skip
"""What is hard to draw, and a text that must be in the picture of it."""


@pytest.mark.parametrize("what", PICTURES)
def test_what_is_hard_to_draw_can_be_read(drawn: dict[str, Figure], tmp_path: Path, what: str) -> None:
    hard, said = PICTURES[what]
    (picture,) = plots.draw_sweep(hard, tmp_path, lines_from=8)
    assert picture.failure is None
    figure = drawn[picture.file.name]
    assert not texts_overlap(figure)
    if figure.axes[0].collections and not figure.legends:
        assert not texts_beyond_their_cell(figure)
    texts = [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_visible()]
    assert any(said in text for text in texts), texts
    assert max(figure.get_size_inches() * DPI) <= 1400


def test_lines_can_be_told_apart(drawn: dict[str, Figure], tmp_path: Path) -> None:
    ten = table({"a.one": list(range(1, 12)), "b.two": list(range(10))}, metrics=[TIME])
    plots.draw_sweep(ten, tmp_path, lines_from=8)
    lines = main_axes(drawn["token_seconds.png"]).lines
    assert (
        len({(line.get_color(), line.get_marker()) for line in lines})
        == len({line.get_marker() for line in lines})
        == 10
    )


def test_a_cell_without_a_figure_says_why(drawn: dict[str, Figure], tmp_path: Path) -> None:
    figures = {(128, 1): {"speed": "nan"}, (128, 2): {"speed": None}, (512, 1): {"speed": True}}
    swept = table(figures=lambda point: figures.get(tuple(point.values()), {}), metrics=[SPEED], repeats=2)
    plots.draw_sweep(swept, tmp_path, lines_from=8)
    texts = [text.get_text() for text in main_axes(drawn["speed.png"]).texts]
    assert {"no figure", "not a number: True"} <= set(texts)
    assert "not a number:\nnan" in texts or "not a number: nan" in texts
    assert "nan" not in swept.csv()


def test_powers_of_two_are_as_far_from_each_other(drawn: dict[str, Figure], tmp_path: Path) -> None:
    def places(contexts: Sequence[int]) -> tuple[str, list[str]]:
        plots.draw_sweep(table({"project.context": contexts}, metrics=[TIME]), tmp_path, lines_from=4)
        axes = main_axes(drawn["token_seconds.png"])
        return axes.get_xscale(), [label.get_text() for label in axes.get_xticklabels() if label.get_visible()]

    assert places([64, 128, 512, 2048]) == ("log", ["64", "128", "512", "2,048"])
    assert places([1, 2, 3, 1_000_000]) == ("log", ["1", "2", "3", "1,000,000"])
    assert places([100, 200, 300, 400])[0] == "linear"


def test_figures_over_many_decades_have_a_logarithmic_scale(drawn: dict[str, Figure], tmp_path: Path) -> None:
    wide = table(figures=lambda point: {"speed": 10.0 ** (point["project.context"] // 100)}, metrics=[SPEED])
    plots.draw_sweep(wide, tmp_path, lines_from=8)
    assert drawn["speed.png"].axes[1].get_yscale() == "log"


def test_each_picture_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_picture", lambda *_: Figure())
    values = ["x/y", "x y", "x_y", "X y", "z" * 300, "z" * 299 + "y", "日" * 90]
    metrics = [{**SPEED, "figure": figure} for figure in ("figures.a.p50", "figures.b.p50", "seconds", "detail")]
    figures = {"a": {"p50": 1.0}, "b": {"p50": 2.0}}
    swept = table({"a.one": [1], "b.two": [1], "c.three": values}, figures=lambda _: figures, metrics=metrics)
    files = [picture.file for picture in plots.draw_sweep(swept, tmp_path, lines_from=8)]
    assert len({file.name.casefold() for file in files}) == 3 * len(values)
    assert all(file.exists() for file in files)
    assert swept.csv().splitlines()[0].startswith("a.one,b.two,c.three,status,failure,detail,p50,")
    (first, *_) = swept.figures()
    assert (first["p50"].median, first["figures.b.p50"].median, first["seconds_2"].median) == (1.0, 2.0, 1.0)


def test_a_picture_that_fails_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = plots._picture
    monkeypatch.setattr(plots, "_picture", lambda p, m, n: whole(p, m, n) if m.title == "speed" else 1 / 0)
    first, second = plots.draw_sweep(table(), tmp_path, lines_from=8)
    assert (first.failure, second.failure) == ("ZeroDivisionError: division by zero", None)
    assert second.file.exists()
    assert "token_seconds.png could not be drawn (ZeroDivisionError: division by zero)" in caplog.text


def test_names_are_shortened_where_they_are_the_same() -> None:
    assert told_apart(["short", "a" * 30], 11) == ["short", "aaaaa…aaaaa"]
    models = [f"unsloth/Meta-Llama-3.{n}-70B-Instruct-bnb-4bit" for n in range(3)]
    assert told_apart(models, 20) == [f"…a-Llama-3.{n}-70B-In…" for n in range(3)]
    assert len(set(told_apart(["x" * 50 + "a" + "x" * 50, "x" * 60 + "a" + "x" * 40, "x" * 101], 20))) == 3


def test_a_table_without_results_is_refused() -> None:
    with pytest.raises(UserError, match=r"matrix.plot must be a sweep with at least one result, got none"):
        Table.of({"sweep": {}, "results": []})
