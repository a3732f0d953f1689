"""One self-contained HTML page: pictures are inlined, no scripts, no external files."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lab.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its content, in this order."""

    title: str
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Names and values."""
    pictures: Sequence[Path | str] = ()
    """PNG files; for a missing one, a text with the reason."""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    """A table below `header`."""
    commands: Sequence[str] = ()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page to `path`, and return it."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inlined"] = _inlined
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_whole(path, template.render(title=title, sections=sections))
    return path


def _inlined(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
