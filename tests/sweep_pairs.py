"""Sweeps over cells that another sweep has left, against the same sweeps run fresh: random pairs of grids (hypothesis).

The cells are computed in this process and in no time: their figures, and whether they fail and on what limit, are a
function of all their settings that are signed. Everything else is the real thing: words, settings, signatures, records,
claims, tables, reports. Some pictures fail to be drawn, and some of the first sweeps are interrupted.
"""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from lab.command.entry import compose_config, compose_settings
from lab.settings import digest
from matrix.drawing import draw, figures_of, write_report
from matrix.grid import sort_overrides, without
from matrix.results import CellRun
from matrix.settings import MatrixSettings, SweepSettings
from matrix.supervisor import Job, Outcome
from matrix.sweep import SweepResult, run_sweep

AXES: dict[str, list[str]] = {
    "seed": ["0", "1", "'1'", "+1", "7"],
    "model": ["random", "smollm2_135m"],
    "model.name": ["x/y", "'x y'", "x_y", "'1,000'", "null_"],
    "model.dtype": ["float32", "bfloat16"],
    "model.lora_targets": ["[q_proj]", "[q_proj,v_proj]", "[v_proj,q_proj]", "['q_proj']"],
    "model.adapter": ["null", "'null'", "/nowhere"],
    "device.threads": ["1", "2"],
    "network.connect_timeout_seconds": ["1", "1.0", "2"],
    "project.matrix_size": ["64", "128", "'128'", "1_28"],
}
"""Values as one types them. Some are the same after parsing; some of the keys change no figure."""

PRESET = {
    "name": "pairs",
    "command": "lab.doctor",
    "config": "doctor",
    "axes": {"device.threads": [1, 2]},
    "metrics": [
        {"figure": "figures.speed", "title": "speed", "unit": "m/s", "scale": 1.0, "better": "higher"},
        {"figure": "figures.loss", "title": "loss", "unit": "nats", "scale": 1.0, "better": "lower"},
    ],
}


@dataclass(frozen=True)
class Asked:
    """One sweep: its words, and what else a sweep is told."""

    words: tuple[str, ...]
    repeats: int
    time_limit_seconds: float
    memory_limit_gib: float
    ends_after: int | None = None
    """Runs after which it is interrupted; None: it is not."""


@dataclass
class Report:
    """What came of the pairs."""

    pairs: int = 0
    kept: int = 0
    """Cells of second sweeps that the first had left."""
    failures: int = 0
    """Cells of second sweeps that failed."""
    interrupted: int = 0
    pictures: int = 0
    not_drawn: int = 0
    differences: int = 0
    without_report: int = 0
    first_wrong: str | None = None
    """The first pair that differed, or had no report."""


def grids() -> st.SearchStrategy[tuple[str, ...]]:
    """Some keys in some order, each with one value or several, which may be there twice."""
    keys = st.lists(st.sampled_from(list(AXES)), max_size=3, unique=True)
    return keys.flatmap(
        lambda names: st.tuples(
            *(
                st.lists(st.sampled_from(AXES[key]), min_size=1, max_size=3).map(functools.partial(_word, key))
                for key in names
            )
        )
    )


def _word(key: str, values: Sequence[str]) -> str:
    return f"{key}={','.join(values)}"


@st.composite
def pairs(draw_one: st.DrawFn) -> tuple[Asked, Asked]:
    """The limits of the second sweep are those of the first, or larger."""
    limits = [sorted(draw_one(st.tuples(*[st.sampled_from(steps)] * 2))) for steps in ((1.0, 2.0, 4.0), (1.0, 2.0))]
    words = [draw_one(grids()) for _ in range(2)]
    if draw_one(st.booleans()):  # another sweep over the same cells, as far as it goes
        words[1] = tuple(draw_one(st.permutations(words[0])))[: draw_one(st.integers(0, 3))] or words[1]
    repeats = [draw_one(st.integers(1, 2)) for _ in range(2)]
    ends = draw_one(st.none() | st.integers(0, 5))
    return (
        Asked(words[0], repeats[0], limits[0][0], limits[1][0], ends_after=ends),
        Asked(words[1], repeats[1], limits[0][1], limits[1][1]),
    )


@dataclass
class InstantLauncher:
    """Cells that are computed as soon as they are asked for."""

    ends_after: int | None
    at_once: int = 1

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
        """See `CellLauncher.run`."""
        for index, job in enumerate(jobs):
            if index == self.ends_after:
                raise KeyboardInterrupt
            yield index, outcome_of(job)


def outcome_of(job: Job) -> Outcome:
    """A function of what the cell is, and of its limits where it does not fit them."""
    dice = random.Random(job.arguments[0])
    seconds, gib = dice.choice([0.5, 0.5, 1.5, 3.0, 9.0]), dice.choice([0.5, 0.5, 1.5, 9.0])
    broken, no_figure = dice.random() < 0.1, dice.random() < 0.1
    figures = {"speed": dice.random(), "loss": "nan" if no_figure else dice.random()}
    failure, detail, limit = None, "", dict[str, float]()
    if broken:
        failure, detail = "error", "RuntimeError: broken"
    elif seconds > job.time_limit_seconds:
        failure, detail = "time-out", f"not done after {job.time_limit_seconds:g} s"
        limit = {"time_limit_seconds": job.time_limit_seconds}
    elif gib * 2**30 > job.memory_limit_bytes:
        failure, detail = "out of memory", f"more than {job.memory_limit_bytes} bytes"
        limit = {"memory_limit_gib": job.memory_limit_bytes / 2**30}
    return Outcome(
        failure=failure, detail=detail, figures={} if failure else figures, seconds=seconds,
        peak_rss_bytes=int(gib * 2**30), host="here", limit=limit,
    )  # fmt: skip


def compare_pairs(count: int, pictures_every: int = 0) -> Report:
    """So many pairs, always the same ones; every so many with real pictures (0: none)."""
    report = Report()

    @hypothesis.settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
    )
    @hypothesis.given(pairs())
    def compare(pair: tuple[Asked, Asked]) -> None:
        real = pictures_every > 0 and report.pairs % pictures_every == 0
        with tempfile.TemporaryDirectory() as folder:
            _compare(*pair, Path(folder), report, real_pictures=real)
        if report.first_wrong is None and (report.differences or report.without_report):
            report.first_wrong = repr(pair)

    with (
        patch("matrix.grid.compose_config", _compose),
        patch("matrix.sweep._job", _instant_job),
        patch("matrix.sweep.sources_digest", lambda packages: "0" * 16),  # someone may edit them meanwhile
    ):
        compare()
    return report


def _compose(name: str, words: Sequence[str]) -> DictConfig:
    """As Hydra would, which takes a quarter of a second: it composes the groups once, and we set the values."""
    return _composed(name, tuple(sorted(words)))


@functools.cache
def _composed(name: str, words: tuple[str, ...]) -> DictConfig:
    groups = tuple(word for word in words if "." not in word.partition("=")[0] and not word.startswith("seed="))
    config = copy.deepcopy(_groups(name, groups))
    for word in OverridesParser.create().parse_overrides([word for word in words if word not in groups]):
        OmegaConf.update(config, word.key_or_group, word.value())
    return config


@functools.cache
def _groups(name: str, words: tuple[str, ...]) -> DictConfig:
    return compose_config(name, words)


def _compare(first: Asked, second: Asked, folder: Path, report: Report, *, real_pictures: bool) -> None:
    left, _ = _sweep(first, folder / "shared", folder / "first", real_pictures=False)
    kept, figures = _sweep(second, folder / "shared", folder / "second", real_pictures=real_pictures)
    fresh, _ = _sweep(second, folder / "fresh", folder / "fresh-sweep", real_pictures=real_pictures)
    report.pairs += 1
    report.kept += kept.skipped
    report.failures += figures["failed"]
    report.interrupted += left.ended_by is not None
    report.pictures += len(figures["plots"])
    report.not_drawn += len(figures["not_drawn"])
    report.differences += plain(kept.document) != plain(fresh.document)
    for file in ("results.csv", "report.html"):
        texts = [(folder / name / file).read_text() for name in ("second", "fresh-sweep")]
        report.differences += texts[0] != texts[1]
    for name in ("first", "second", "fresh-sweep"):
        page = folder / name / "report.html"
        report.without_report += not page.exists() or "Figures" not in page.read_text()


def plain(document: Mapping[str, Any]) -> Any:
    """A sweep.json without what time has to do with it."""
    about = {key: value for key, value in document["sweep"].items() if key != "seconds"}
    return [about, [{**result, "date": None} for result in document["results"]]]


def _sweep(asked: Asked, results: Path, folder: Path, *, real_pictures: bool) -> tuple[SweepResult, dict[str, Any]]:
    words = sort_overrides(list(asked.words))
    matrix = replace(
        _settings().matrix, results=str(results), repeats=asked.repeats, time_limit_seconds=asked.time_limit_seconds,
        memory_limit_gib=asked.memory_limit_gib,
    )  # fmt: skip
    with patch("matrix.sweep.open_launcher", lambda _: InstantLauncher(asked.ends_after)):
        result = run_sweep(replace(_settings(), matrix=matrix), words, folder)
    figures = figures_of(result.document) | write_report(result.document, folder, None)
    if real_pictures:
        return result, figures | draw(result.document, folder, matrix, None)
    with patch("matrix.plots._picture", _no_picture), patch("matrix.plots.save", _save_no_picture):
        return result, figures | draw(result.document, folder, matrix, None)


@functools.cache
def _settings() -> MatrixSettings:
    settings = compose_settings("matrix", "tracking=none tracking.progress=false model=random", MatrixSettings)
    told = {key: value for key, value in PRESET.items() if key != "metrics"}
    metrics = [
        replace(settings.matrix.metrics[0], figure=m["figure"], title=m["title"], unit=m["unit"], scale=1.0)
        for m in PRESET["metrics"]
    ]
    return replace(settings, matrix=replace(settings.matrix, metrics=metrics, **told))


def _instant_job(run: CellRun, sweep: SweepSettings) -> Job:
    what = digest(without(run.cell.settings, sweep.unsigned) | {"repeat": run.repeat})
    return Job(
        arguments=[what], working_folder="", folder=str(run.new_folder()), omp_threads=None,
        time_limit_seconds=sweep.time_limit_seconds, memory_limit_bytes=int(sweep.memory_limit_gib * 2**30),
    )  # fmt: skip


def _no_picture(picture: Any, metric: Any, lines_from: int) -> Figure:
    if len(picture.grid()) % 2:
        raise ValueError("a picture that cannot be drawn")
    return Figure()


def _save_no_picture(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a picture")
