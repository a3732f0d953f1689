"""Requests meant to break the HTTP server, at a small size; `make soak` sends 20,000."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve.fields import MOST_LEVELS, is_deeper
from tests.serve.chat_server import chat_server
from tests.serve.http_fuzz import REQUEST_SECONDS, WORDS, Fuzzer
from tests.speculative.processes import Role

REQUESTS = 300
LENGTH = 400
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % (LENGTH + 1)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    with chat_server(tmp_path_factory.mktemp("serve"), *WORDS) as started:
        yield started


def test_no_request_breaks_the_server(server: Role) -> None:
    found = Fuzzer(server).fuzz(REQUESTS, 1)
    assert found.faults == []
    assert found.is_harmless, found
    served = found.statuses[200]
    assert served > REQUESTS / 20, "requests that are refused at once prove little"
    assert found.statuses[400] > REQUESTS / 20


@pytest.mark.parametrize("begun", [b"GET /health HTTP/1.1\r\nHost: ", HEAD])
def test_a_request_that_arrives_byte_by_byte_is_closed_in_time(server: Role, begun: bytes) -> None:
    assert Fuzzer(server).drip(begun, b"a" * LENGTH, LENGTH * REQUEST_SECONDS)


def test_depth_is_counted_in_levels() -> None:
    deep: object = 1
    for _ in range(MOST_LEVELS):
        deep = [deep]
    assert not is_deeper(deep, MOST_LEVELS)
    assert is_deeper([deep], MOST_LEVELS)
    assert is_deeper({"a": 1, "b": [deep]}, MOST_LEVELS)
    assert not is_deeper({}, 1)
