"""Texts through arguments, streams and files in four locales."""

from __future__ import annotations

import codecs

import pytest

from tests import unicode_texts
from tests.unicode_texts import Found, round_trip


@pytest.mark.real
@pytest.mark.parametrize("locale", unicode_texts.LOCALES)
def test_texts_stay_what_they_are(locale: str) -> None:
    """As `tests.soak unicode_texts` does with 2,000."""
    found = round_trip(60, seed=len(locale), locales=[locale], commands=False)
    assert found.faults == []
    assert found.refused > 0
    assert found.same > 4 * found.refused


def test_another_text_is_a_fault() -> None:
    """The negative control: what a locale makes of UTF-8 is found, and so is a text that should have been refused."""
    found = Found()
    found.add("here", "café", codecs.decode("café".encode(), "cp1252"))
    found.add("here", None, "x")
    found.add("here", "x", None)
    found.add("here", None, None)
    assert (len(found.faults), found.same, found.refused) == (3, 0, 1)
