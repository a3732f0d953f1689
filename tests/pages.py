"""The pages that people read: where they are, and the commands, links and headings in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
"""Those whose commands are run, and whose links lead somewhere; with the next ones, only the latter."""
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md"]


def named(page: Path) -> str:
    """A page's name, for tests about it."""
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands_of(page: Path) -> list[str]:
    """Every command of a page's ```sh blocks, continued lines joined, comments cut, and those in its running text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    typed = [line.split(" #")[0] for line in lines if line.strip() and not line.startswith("#")]
    in_text = re.findall(r"`((?:python|make|flwr|flower-\w+) [^`\n]+)`", prose_of(page))
    return [" ".join(command.split()) for command in [*typed, *in_text] if "..." not in command.split()[-1:]]


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def links_of(page: Path) -> list[str]:
    """Targets of the page's links and pictures that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [link for link in found if "://" not in link]


def anchors_of(page: Path) -> set[str]:
    """What `#...` may name on a page, as GitHub makes it of headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)}


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, hyphens for spaces, no other punctuation but underscores."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def tables_of(page: Path) -> list[list[list[str]]]:
    """Every table of a page: rows of cells, the heading first, the line below it left out."""
    tables = re.findall(r"(?:^\|.*\|$\n?)+", read(page), flags=re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line.strip("|")) for line in table.splitlines()] for table in tables]
    return [[[cell.strip() for cell in row] for row in [rows[0], *rows[2:]]] for rows in split]
