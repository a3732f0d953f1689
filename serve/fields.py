"""The fields of a request's JSON document: each is read once, by its type and its rule; null is as absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from serve.faults import RequestFault, wrong

MOST_LEVELS = 128
"""Deepest nesting of a body."""


class Fields:
    """A JSON object of a request. Fields that are not read are ignored, as servers of this API do."""

    def __init__(self, document: Mapping[str, Any], of: str = "") -> None:
        self.document, self._of = document, of

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """The fields of a body. RequestFault for one that is no JSON object."""
        try:
            document = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestFault(400, f"the body must be a JSON object in UTF-8, got {reason}") from None
        if not isinstance(document, dict):
            raise RequestFault(400, f"the body must be a JSON object in UTF-8, got {type(document).__name__}")
        if is_deeper(document, MOST_LEVELS):  # what writes it again, or shows a part of it, would exceed the stack
            raise RequestFault(400, f"the body must be nested at most {MOST_LEVELS} levels deep")
        return cls(document)

    def has(self, name: str) -> bool:
        """Whether the field is there, and not null."""
        return self.document.get(name) is not None

    def raw(self, name: str) -> Any:
        """The field as it is; None if it is absent."""
        return self.document.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text."""
        value = self.document.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or not is_text(value):
            raise wrong(self._name(name), "must be a text", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.document.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self._name(name), "must be true or false", value)
        return value

    def whole(self, name: str, least: int, most: float, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.document.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():  # some clients write all numbers as floats
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            bounds = f"in [{least}, {most}]" if most < math.inf else f"at least {least}"
            raise wrong(self._name(name), f"must be a whole number {bounds}", value)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number."""
        value = self.document.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not least <= value <= most:
            bounds = f"in [{least:g}, {most:g}]" if most < math.inf else f"at least {least:g}"
            raise wrong(self._name(name), f"must be a number {bounds}", value)
        return float(value)

    def block(self, name: str) -> Fields | None:
        """An object."""
        value = self.document.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong(self._name(name), "must be an object", value)
        return Fields(value, f"{self._name(name)}.")

    def items(self, name: str) -> Sequence[tuple[str, Any]]:
        """The names and values of an object."""
        inner = self.block(name)
        return [] if inner is None else list(inner.document.items())

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """A text or a list of texts, none of them empty."""
        value = self.document.get(name)
        given = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(given, list) or len(given) > most:
            raise wrong(self._name(name), f"must be a text or a list of at most {most} texts", value)
        for one in given:
            if not isinstance(one, str) or not 1 <= len(one) <= longest or not is_text(one):
                raise wrong(self._name(name), f"must hold texts of 1 to {longest} characters", one)
        return given

    def _name(self, name: str) -> str:
        return f"{self._of}{name}"


def is_text(value: str) -> bool:
    """Whether it can be written in UTF-8: JSON can hold halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deeper(document: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than so many levels."""
    inside = [document]
    for _ in range(levels):
        inside = [
            part
            for one in inside
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, dict | list)
        ]
        if not inside:
            return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")
