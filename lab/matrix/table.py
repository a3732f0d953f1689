"""A sweep's results as a table: cells by their values on the axes, every figure a median with spread and n."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.bench import Sample
from lab.matrix.grid import look_up
from lab.matrix.results import Result
from lab.settings import UserError


@dataclass(frozen=True)
class Metric:
    """One figure of a cell, as `MetricSettings` describe it."""

    figure: str
    title: str
    unit: str
    scale: float
    better: str
    """`lower` or `higher`."""

    @property
    def column(self) -> str:
        """Its name in results.csv, where it stands in its own unit: the last part that is no place in a list."""
        return [name for name in self.figure.split(".") if not name.lstrip("-").isdecimal()][-1]

    @property
    def label(self) -> str:
        """Title with the unit it is drawn in."""
        return f"{self.title} ({self.unit})"


@dataclass(frozen=True)
class Row:
    """One cell: all its runs."""

    point: dict[str, Any]
    results: list[Result]

    @property
    def failed(self) -> Result | None:
        """The first run that failed: then the cell has."""
        return next((result for result in self.results if result["status"] == "failed"), None)

    def sample(self, metric: Metric) -> Sample | None:
        """The metric in its own unit, unscaled; None for a failed cell, and where a run does not have it."""
        found = [look_up(result, metric.figure) for result in self.results]
        numbers = [float(value) for value in found if isinstance(value, int | float)]
        return Sample.of(numbers) if len(numbers) == len(found) and not self.failed else None

    @property
    def command(self) -> str:
        """What one types to have its first run again."""
        first = self.results[0]
        return shlex.join(["python", "-m", first["command"], *first["words"]])


@dataclass(frozen=True)
class Table:
    """All cells of a sweep."""

    sweep: dict[str, Any]
    rows: list[Row]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Table:
        """Of a sweep.json. UserError when it holds no result."""
        rows: dict[str, Row] = {}
        for result in document["results"]:
            point = json.dumps(result["point"])
            rows.setdefault(point, Row(result["point"], [])).results.append(result)
        if not rows:
            raise UserError("matrix.plot must be a sweep with at least one result, got none")
        return cls(dict(document["sweep"]), list(rows.values()))

    @property
    def metrics(self) -> list[Metric]:
        """Those that at least one cell has."""
        known = [Metric(**metric) for metric in self.sweep["metrics"]]
        return [metric for metric in known if any(row.sample(metric) for row in self.rows)]

    @property
    def failures(self) -> list[Row]:
        """Cells with a run that failed."""
        return [row for row in self.rows if row.failed]

    def label(self, axis: str) -> str:
        """Its name with its unit."""
        return str(self.sweep["labels"].get(axis, axis))

    def values(self, axis: str) -> list[Any]:
        """What it takes, in the order in which they were asked for."""
        return list(
            dict.fromkeys(row.point[axis] if _hashable(row.point[axis]) else str(row.point[axis]) for row in self.rows)
        )

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
        """results.csv: a line a cell; figures unscaled, each as median, smallest, largest and number of its runs."""
        lines = [self._line(row) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def _line(self, row: Row) -> dict[str, Any]:
        line = {**row.point, "status": "failed" if row.failed else "ok"}
        line |= {key: row.failed[key] if row.failed else "" for key in ("failure", "detail")}
        for metric in self.metrics:
            sample = row.sample(metric)
            line |= {f"{metric.column}{end}": getattr(sample, of, "") for end, of in _COLUMNS}
        first = row.results[0]
        line |= {"seconds": sum(result["seconds"] for result in row.results)}
        return line | {key: first[key] for key in ("device", "host", "commit", "signature")} | {"command": row.command}


_COLUMNS = (("", "median"), ("_low", "low"), ("_high", "high"), ("_n", "n"))


def _hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)


def same_point(rows: Sequence[Row], point: Mapping[str, Any]) -> Row | None:
    """The cell with these values on the same axes."""
    return next((row for row in rows if row.point == point), None)
