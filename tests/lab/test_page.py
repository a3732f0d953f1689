"""The page opens in a browser: no error on its console, nothing fetched, nothing wider than a screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from lab.page import Section, write_page
from tests.browser import browser

WIDTH = 1200


def console(page: Path, profile: Path) -> list[str]:
    """What the page says on its console."""
    command = [
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={profile}", f"--window-size={WIDTH},2000"),
        *(f"--screenshot={profile.parent / 'page.png'}", page.as_uri()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (profile.parent / "page.png").stat().st_size > 1000
    return re.findall(r"CONSOLE[:(].*", done.stderr)


def with_script(page: Path, script: str) -> Path:
    """A copy of the page that runs `script` at its end."""
    copy = page.with_name("with-script.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return copy


@pytest.fixture
def page(tmp_path: Path) -> Path:
    figure, axes = plt.subplots()
    axes.plot([1, 2], [3, 4])
    figure.savefig(tmp_path / "a_picture.png")
    plt.close(figure)
    sections = [
        Section(title="Setup", facts={"model": "<SmolLM2>", "device": "x" * 400}),
        Section(title="Pictures", pictures=[tmp_path / "a_picture.png", "b.png could not be drawn (<why>)"]),
        Section(title="Table", header=["a", "b"], rows=[[1, "wide " * 100]] * 3),
        Section(title="Commands", commands=["python -m lab.decode " + "project.context=1 " * 40]),
    ]
    made = write_page(tmp_path / "page.html", "A page & more", sections)
    (tmp_path / "a_picture.png").unlink()
    return made


def test_it_carries_everything(page: Path) -> None:
    text = page.read_text()
    assert "&lt;SmolLM2&gt;" in text
    assert "A page &amp; more" in text
    assert '<p class="missing">b.png could not be drawn (&lt;why&gt;)</p>' in text
    assert 'src="data:image/png;base64,iVBOR' in text
    assert "<script" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "something is fetched from elsewhere"


REPORT = """
window.onload = () => {
    const broken = [...document.images].filter((picture) => !picture.naturalWidth).length;
    console.log(`WIDTH ${document.documentElement.scrollWidth} PICTURES ${document.images.length} BROKEN ${broken}`);
};
"""


def mistakes(page: Path, profile: Path) -> list[str]:
    """What is wrong with a page that is open in a browser."""
    *said, report = console(with_script(page, REPORT), profile)
    width, pictures, broken = map(int, re.findall(r"(?:WIDTH|PICTURES|BROKEN) (\d+)", report))
    wrong = [f"{width} pixels wide"] if width > WIDTH else []
    return said + wrong + ([f"{broken} of {pictures} pictures broken"] if broken or not pictures else [])


@pytest.mark.real
def test_a_browser_opens_it_without_an_error(page: Path, tmp_path: Path) -> None:
    assert console(page, tmp_path / "as it is") == []
    assert mistakes(page, tmp_path / "measured") == []


@pytest.mark.real
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("<script>nothing.there()</script>", "nothing is not defined"),
        ('<img src="missing.png">', "1 of 2 pictures broken"),
        ('<div style="width: 1300px">x</div>', "pixels wide"),
    ],
)
def test_a_page_with_a_mistake_is_noticed(page: Path, tmp_path: Path, mistake: str, named: str) -> None:
    """The negative control."""
    page.write_text(page.read_text().replace("</body>", f"{mistake}</body>"))
    (wrong,) = mistakes(page, tmp_path / "profile")
    assert named in wrong


def test_a_missing_browser_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("LAB_BROWSER", raising=False)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium here"):
        browser()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no Chromium here"):
        browser()
