"""The page of the demonstration: each part with its command, its result in a sentence, and its pictures."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.environment import describe_environment
from lab.page import Section, write_page


@dataclass(frozen=True)
class PartResult:
    """One part after its run."""

    name: str
    title: str
    command: list[str]
    """Module and overrides."""
    seconds: float
    found: str
    """Its figures in one sentence."""
    figures: Mapping[str, Any]
    """Its last line."""


def write_demo_page(path: Path, parts: Sequence[PartResult]) -> Path:
    """Write the page to `path`: an overview, a section per part with its pictures, and the machine."""
    took = [(f"{_name(part)}: {part.found}", f"{part.seconds:.0f}") for part in parts]
    sections = [Section(title="At a glance", header=("what it found", "seconds"), rows=took)]
    for part in parts:
        facts = {"command": f"python -m {shlex.join(part.command)}", "result": part.found}
        facts |= {"text": part.figures["text"]} if "text" in part.figures else {}
        plots = [Path(plot) for plot in part.figures.get("plots", [])]
        sections.append(Section(title=_name(part), text=part.title, facts=facts, pictures=plots))
    return write_page(path, "distributed-llm-lab: demonstration", [*sections, _machine()])


def _name(part: PartResult) -> str:
    return part.name.replace("_", " ").capitalize()


def _machine() -> Section:
    environment = describe_environment()
    machine = environment["machine"]
    facts = {
        "command": "make demo",
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        "commit": environment["commit"],
        **{name: version for name, version in environment["versions"].items() if version},
    }
    return Section(title="This machine", facts=facts)
