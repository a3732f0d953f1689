from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fl.plots import MAX_LABELLED_CLIENTS, draw_run
from fl.report import RoundFigures

matplotlib.use("Agg")


def states(clients: int, rounds: int = 3) -> list[RoundFigures]:
    return [
        RoundFigures(
            round=number,
            eval_loss=3.0 - number / 4,
            client_losses={client: 3.0 - number / 4 + client / 10 for client in range(clients) if client != number},
            eval_sites=[client for client in range(clients) if client != number],
            train_loss=2.0,
            train_seconds={client: 1.0 + client for client in range(clients)} if number else {},
            uplink_bytes=2_000_000 * bool(number),
            downlink_bytes=1_000_000 * bool(number),
            round_seconds=10.0,
            aggregate_seconds=0.5,
        )
        for number in range(rounds + 1)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as matplotlib holds them."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        kept.append(figure)
        save(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_the_picture_shows_what_the_history_says(tmp_path: Path, drawn: list[Figure]) -> None:
    path = draw_run(states(4), "title", 270_000_000, tmp_path / "deep" / "run.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert matplotlib.image.imread(path).std() > 0.05, "it is not blank"
    loss, sizes, seconds = drawn[0].axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    assert {*lines} == {"client 0", "client 1", "client 2", "client 3", "weighted mean"}
    np.testing.assert_allclose(np.asarray(lines["weighted mean"].get_ydata(), float), [3.0, 2.75, 2.5, 2.25])
    assert np.asarray(lines["client 2"].get_xdata()).tolist() == [0, 1, 3], (
        "a client that missed a round has no point there"
    )
    widths = [bar.get_width() for bar in sizes.patches if isinstance(bar, Rectangle)]
    np.testing.assert_allclose(widths, [6.0, 3.0, 270.0])
    heights = np.reshape([bar.get_height() for bar in seconds.patches if isinstance(bar, Rectangle)], (3, 3))
    np.testing.assert_allclose(heights.sum(axis=0), [10.0] * 3)
    np.testing.assert_allclose(heights[0], 4.0)


def test_a_crowd_is_drawn_without_a_legend_of_all(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_run(states(MAX_LABELLED_CLIENTS + 1), "title", 1, tmp_path / "run.png")
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["weighted mean"]


def test_the_history_of_one_round_is_a_picture_too(tmp_path: Path) -> None:
    assert draw_run(states(1, rounds=1), "title", 1, tmp_path / "run.png").stat().st_size > 5_000
