"""From network settings to keys, TLS and deadlines; every mistake is one line."""

from __future__ import annotations

import errno
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.network import (
    address_for_peers,
    cannot_listen,
    client_side_tls,
    listener_tls,
    make_endpoint,
    shared_key,
)
from lab.settings import NetworkSettings, UserError
from lab.wire.faults import Peer, PeerGone, PeerRefused, PeerSilent, Unreachable, WrongKey, unreachable
from lab.wire.frames import MessageTable

PEER = Peer(role="verifier", address="127.0.0.1:1", phase="handshake")


@pytest.fixture
def network() -> NetworkSettings:
    return compose_settings("fed_learn", "", FederatedSettings).network


def test_values_arrive_where_they_belong(network: NetworkSettings) -> None:
    changed = replace(
        network,
        connect_timeout_seconds=1.0,
        handshake_timeout_seconds=2.0,
        request_timeout_seconds=3.0,
        heartbeat_seconds=4.0,
        dead_after_seconds=9.0,
        max_frame_bytes=5000,
        max_handshake_bytes=600,
    )
    endpoint = make_endpoint(
        changed,
        role="a",
        peer_roles=frozenset({"b"}),
        table=MessageTable({}),
        protocol=range(1, 2),
        fingerprints={"x": "y"},
    )
    deadlines, limits = endpoint.deadlines, endpoint.limits
    assert (deadlines.connect_seconds, deadlines.handshake_seconds, deadlines.send_seconds) == (1.0, 2.0, 3.0)
    assert (deadlines.ping_seconds, deadlines.dead_seconds) == (4.0, 9.0)
    assert (limits.payload_bytes, limits.handshake_bytes) == (5000, 600)
    assert endpoint.fingerprints == {"x": "y"}


def test_the_key_comes_from_the_file_or_the_environment(
    network: NetworkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAB_KEY", raising=False)
    assert shared_key(network) == b""
    monkeypatch.setenv("LAB_KEY", "from-the-environment")
    assert shared_key(network) == b"from-the-environment"
    file = tmp_path / "key"
    file.write_text("from-the-file-here\n")
    assert shared_key(replace(network, key_file=str(file))) == b"from-the-file-here"
    file.write_text("short")
    with pytest.raises(UserError, match=r"must hold at least 16 bytes .*, got 5$"):
        shared_key(replace(network, key_file=str(file)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host": "0.0.0.0"}, r"^network\.key_file must be set \(or network\.host be a loopback address\)"),
        ({"tls_certificate": "/no", "tls_private_key": "/no"}, r"must be a PEM certificate with its key, got /no"),
        ({"host": "nosuch.invalid"}, r"^network\.host must be a name that resolves, got 'nosuch\.invalid' \("),
        ({"tls_certificate": "/no"}, r"^network\.tls_private_key must be set where network\.tls_certificate is"),
    ],
)
def test_listeners_that_are_refused(network: NetworkSettings, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        listener_tls(replace(network, **changes))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EADDRINUSE, "in use"), "network.port must be free on 127.0.0.1, got 0 ([Errno 98] in use)"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "network.host must be an address of this machine, got '127.0.0.1' ("),
        (OSError(errno.EACCES, "denied"), "network.port must be one that this user may open, got 0 ("),
        (socket.gaierror(-2, "unknown"), "network.host must be a name that resolves, got '127.0.0.1' (unknown)"),
    ],
)
def test_a_listener_that_cannot_be_opened_blames_what_is_to_blame(
    network: NetworkSettings, error: OSError, line: str
) -> None:
    assert str(cannot_listen(network, error)).startswith(line)


def test_brackets_belong_to_an_address_with_a_port(network: NetworkSettings) -> None:
    with pytest.raises(ValueError, match=r"^host must be an address without brackets \(::1\), got '\[::1\]'$"):
        replace(network, host="[::1]")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (TimeoutError(), "did not answer within 30 s"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), r"could not be reached \(\[Errno \d+\] timed out\)"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), r"could not be reached \(\[Errno \d+\] refused\)"),
        (socket.gaierror(-2, "unknown"), r"has a name that does not resolve \(unknown\)"),
    ],
)
def test_only_who_waited_is_told_of_seconds(error: OSError, what: str) -> None:
    assert re.fullmatch(f"verifier 127.0.0.1:1 {what} during handshake", str(unreachable(PEER, error, 30.0)))


def test_no_certificates_no_tls(network: NetworkSettings) -> None:
    assert listener_tls(network) is None
    assert client_side_tls(network) is None
    with pytest.raises(UserError, match="must be a PEM certificate, got /no"):
        client_side_tls(replace(network, tls_authority="/no"))


def test_which_faults_are_the_users_to_mend() -> None:
    assert Unreachable(PEER, "x").exit_code == 2
    assert WrongKey(PEER, "x").exit_code == 2
    assert PeerRefused(PEER, "WrongKey", "x").exit_code == 2
    assert PeerRefused(PEER, "BadFrame", "x").exit_code == 1
    assert PeerGone(PEER, "x").exit_code == 1
    assert PeerSilent(PEER, "x").exit_code == 1


def test_the_address_that_peers_type() -> None:
    assert address_for_peers("127.0.0.1") == "127.0.0.1"
    assert address_for_peers("192.0.2.7") == "192.0.2.7"
    everywhere = address_for_peers("0.0.0.0")
    assert everywhere != "0.0.0.0"
    assert socket.getaddrinfo(everywhere, 1)
