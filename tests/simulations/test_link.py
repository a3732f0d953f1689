"""The link as a command, between a client and a server of this test."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from lab.command.entry import compose_settings
from lab.link import CutKind
from lab.settings import UserError
from simulations.link import link_settings
from simulations.link_settings import LinkRunSettings
from tests.speculative.processes import role


@pytest.fixture
def echo() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionResetError):  # how the link ends what is open
                while data := connection.recv(4096):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_bytes_take_their_time_and_are_counted(echo: int) -> None:
    words = ("network.port=0", "tracking=none", f"project.target_port={echo}", "project.up.delay_seconds=0.1")
    with role("simulations.link", *words, "project.down.delay_seconds=0.05") as link:
        with socket.create_connection(("127.0.0.1", link.port), timeout=10) as client:
            began = time.monotonic()
            client.sendall(b"there and back")
            answer = client.recv(100)
            seconds = time.monotonic() - began
        assert answer == b"there and back"
        assert seconds >= 0.15
        code, result = link.interrupt()
    assert (code, result["status"]) == (0, "ok")
    assert (result["connections"], result["up_bytes"], result["down_bytes"]) == (1, 14, 14)
    assert result["device"] is None, "torch was loaded within the seconds that an end may take"


def test_settings_become_a_link() -> None:
    cut = "{at_seconds: 2.0, kind: blackhole, duration_seconds: 1.5}"
    settings = compose_settings(
        "link", f"'project.cuts=[{cut}]' project.up.bytes_per_second=1000.0 seed=4", LinkRunSettings
    )
    link = link_settings(settings.project, settings.seed)
    assert (link.up.delay_seconds, link.up.bytes_per_second, link.seed) == (0.025, 1000.0, 4)
    assert link.down.bytes_per_second == 0
    assert (link.cuts[0].kind, link.cuts[0].duration_seconds) == (CutKind.blackhole, 1.5)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("project.up.delay_seconds=-1.0", "project.up.delay_seconds must be a finite number of at least 0, got -1.0"),
        ("project.target_port=0", "project.target_port must be in [1, 65535], got 0"),
        ("project.buffer_bytes=1", "project.buffer_bytes must be at least 1460, got 1"),
    ],
)
def test_bad_settings(words: str, why: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_settings("link", words, LinkRunSettings)
    assert str(refused.value) == why
