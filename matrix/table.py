"""A sweep's results as a table: cells by their values on the axes, every figure a median with spread and n."""

import csv
import io
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from lab.bench import Sample
from lab.settings import UserError
from matrix.grid import identity, look_up
from matrix.results import Result


@dataclass(frozen=True)
class Metric:
    """One figure of a cell, as `MetricSettings` describe it."""

    column: str
    """Column of the unscaled figure in results.csv."""

    figure: str
    title: str
    unit: str
    scale: float
    better: str
    """`lower` or `higher`."""

    @property
    def label(self) -> str:
        """Title with the unit of the scaled figure."""
        return f"{self.title} ({self.unit})"


@dataclass(frozen=True)
class Row:
    """One cell with all its runs."""

    point: dict[str, Any]
    results: list[Result]

    @property
    def failed(self) -> Result | None:
        """The first run that failed or was not run; if there is one, the cell has no figures."""
        return next((result for result in self.results if result["status"] != "ok"), None)

    @property
    def status(self) -> str:
        """`ok`, `failed` or `not run`."""
        return str(self.failed["status"]) if self.failed else "ok"

    def lacks(self, metric: Metric) -> str | None:
        """The reason why the cell lacks this figure, in a few words; None if it has the figure."""
        if self.failed:
            return str(self.failed["failure"])
        found = [look_up(result, metric.figure) for result in self.results]
        if missing := [value for value in found if not _is_figure(value)]:
            return "no figure" if missing[0] is None else f"not a number: {missing[0]}"[:LONGEST_REASON]
        return None

    def sample(self, metric: Metric) -> Sample | None:
        """The metric in its own unit, unscaled; None for a failed cell, and if a run does not report it."""
        if self.lacks(metric) is not None:
            return None
        return Sample.of([float(look_up(result, metric.figure)) for result in self.results])

    @property
    def command(self) -> str:
        """Command line that repeats the cell's first run."""
        first = self.results[0]
        return shlex.join(["python", "-m", first["command"], *first["words"]])


@dataclass(frozen=True)
class Table:
    """All cells of a sweep."""

    sweep: dict[str, Any]
    rows: list[Row]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The table of a sweep.json. UserError when it holds no result."""
        rows: dict[str, Row] = {}
        for result in document["results"]:
            rows.setdefault(identity(result["point"]), Row(result["point"], [])).results.append(result)
        if not rows:
            raise UserError("matrix.plot must be a sweep with at least one result, got none")
        return cls(dict(document["sweep"]), list(rows.values()))

    @cached_property
    def metrics(self) -> list[Metric]:
        """Metrics that at least one cell reports."""
        return [metric for metric in self._asked if any(row.sample(metric) for row in self.rows)]

    @cached_property
    def unknown(self) -> list[Metric]:
        """Metrics that no cell reports."""
        return [metric for metric in self._asked if not any(row.sample(metric) for row in self.rows)]

    @property
    def _asked(self) -> list[Metric]:
        taken, found = {*self.sweep["axes"], "row", *_ABOUT_A_CELL}, list[Metric]()
        for about in self.sweep["metrics"]:
            column = next(name for name in _names(about["figure"]) if name not in taken)
            taken |= {column, *(column + end for end, _ in _COLUMNS)}
            found.append(Metric(column, **about))
        return found

    @property
    def failures(self) -> list[Row]:
        """Cells without figures: a run failed, or was not run."""
        return [row for row in self.rows if row.failed]

    def label(self, axis: str) -> str:
        """Name of an axis, with its unit."""
        return str(self.sweep["labels"].get(axis, axis))

    def cell(self, point: Mapping[str, Any]) -> Row | None:
        """The cell with these values on its axes."""
        return self._cells.get(identity(point))

    @cached_property
    def _cells(self) -> dict[str, Row]:
        return {identity(row.point): row for row in self.rows}

    def values(self, axis: str) -> list[Any]:
        """Values of an axis, in the order of the command line."""
        return list({identity(row.point[axis]): row.point[axis] for row in self.rows}.values())

    def figures(self) -> list[dict[str, Any]]:
        """Every cell with its metrics, each as a `Sample`."""
        return [
            {
                "row": "cell",
                **row.point,
                "failure": row.failed and row.failed["failure"],
                **{metric.column: row.sample(metric) for metric in self.metrics},
            }
            for row in self.rows
        ]

    def csv(self) -> str:
        """results.csv: a line per cell; figures unscaled, each as median, smallest, largest and number of its runs."""
        lines = [self._line(row) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def _line(self, row: Row) -> dict[str, Any]:
        line = {axis: in_words(value) for axis, value in row.point.items()} | {"status": row.status}
        line |= {key: row.failed[key] if row.failed else "" for key in ("failure", "detail")}
        for metric in self.metrics:
            sample = row.sample(metric)
            line |= {f"{metric.column}{end}": getattr(sample, of, "") for end, of in _COLUMNS}
        first = row.results[0]
        line |= {"seconds": sum(result["seconds"] for result in row.results)}
        return line | {key: first[key] for key in ("device", "host", "commit", "signature")} | {"command": row.command}


_COLUMNS = (("", "median"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
_ABOUT_A_CELL = ("status", "failure", "detail", "seconds", "device", "host", "commit", "signature", "command")
LONGEST_REASON = 40
"""Longest reason, in characters, that is drawn in place of a figure."""


def _names(figure: str) -> Iterator[str]:
    """Candidates for the column name of a metric: the last part that is no list index, then longer names."""
    yield [figure, *(name for name in figure.split(".") if not name.lstrip("-").isdecimal())][-1]
    yield figure
    yield from (f"{figure}_{count}" for count in itertools.count(2))


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_words(value: Any) -> str:
    """A value of an axis for readers: texts without quotes, other values as on the command line."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    return json.dumps(value, ensure_ascii=False)
