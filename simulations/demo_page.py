"""The demonstration's page: every part with its figures and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.environment import describe_environment
from lab.figures import number
from lab.page import Section, write_page

NOT_SHOWN = ("status", "settings_digest", "run_folder", "commit", "adapter_path")
LONGEST_LIST = 12
"""A longer list of figures is no fact that one reads."""


def write_demo_page(path: Path, parts: Mapping[str, Mapping[str, Any]]) -> Path:
    """The page at `path`, a section a part; what a part's last line calls `plots` are its pictures."""
    environment = describe_environment()
    machine = environment["machine"]
    setup = {
        "command": "make demo",
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        "commit": environment["commit"],
        **{name: version for name, version in environment["versions"].items() if version},
    }
    sections = [Section(title="Setup", facts=setup)]
    for name, figures in parts.items():
        plots = [Path(plot) for plot in figures.get("plots", [])]
        sections.append(
            Section(title=name.capitalize(), text=str(figures.get("text", "")), facts=facts(figures), pictures=plots)
        )
    return write_page(path, "distributed-llm-lab: demonstration", sections)


def facts(figures: Mapping[str, Any]) -> dict[str, str]:
    """What can be read as a word or a few numbers."""
    shown = {name: _text(value) for name, value in figures.items() if name not in (*NOT_SHOWN, "text", "plots")}
    return {name.replace("_", " "): text for name, text in shown.items() if text}


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value)
    if isinstance(value, list) and len(value) <= LONGEST_LIST and all(isinstance(item, int | float) for item in value):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else ""
