"""From `network.*` settings to what `lab.wire` takes: keys, TLS, deadlines, limits; for every role with a socket."""

import errno
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from lab.files import path_of
from lab.settings import NetworkSettings, UserError, user_errors
from lab.wire.endpoint import Deadlines, Endpoint, Fingerprints, common_names_differ
from lab.wire.frames import Limits, MessageTable
from lab.wire.listener import check_listener, client_tls, is_loopback, read_key, server_tls

KEY_VARIABLE = "LAB_KEY"
"""Environment variable that holds the shared key where `network.key_file` is null."""


def make_endpoint(
    network: NetworkSettings,
    *,
    role: str,
    peer_roles: frozenset[str],
    table: MessageTable,
    protocol: range,
    fingerprints: Fingerprints,
    difference: Callable[[Fingerprints, Fingerprints], str | None] = common_names_differ,
) -> Endpoint:
    """One side of the wire. UserError for a key that cannot be read and for deadlines that make no sense."""
    with user_errors():
        return Endpoint(
            role=role,
            peer_roles=peer_roles,
            key=shared_key(network),
            table=table,
            protocol=protocol,
            limits=Limits(
                handshake_bytes=network.max_handshake_bytes,
                payload_bytes=network.max_frame_bytes,
                backlog_bytes=network.max_frame_bytes,
                outgoing_bytes=2 * network.max_frame_bytes,
            ),
            deadlines=_deadlines(network),
            fingerprints=fingerprints,
            difference=difference,
        )


def _deadlines(network: NetworkSettings) -> Deadlines:
    try:
        return Deadlines(
            connect_seconds=network.connect_timeout_seconds,
            handshake_seconds=network.handshake_timeout_seconds,
            send_seconds=network.request_timeout_seconds,
            ping_seconds=network.heartbeat_seconds,
            dead_seconds=network.dead_after_seconds,
        )
    except ValueError:
        least = 2 * network.heartbeat_seconds
        raise UserError(
            f"network.dead_after_seconds must be at least 2 x heartbeat_seconds = {least}, "
            f"got {network.dead_after_seconds}"
        ) from None


def shared_key(network: NetworkSettings) -> bytes:
    """The key from `network.key_file` or the environment, empty when there is none. UserError for a bad one."""
    with user_errors():
        return read_key(_path(network.key_file), KEY_VARIABLE)


def listener_tls(network: NetworkSettings) -> ssl.SSLContext | None:
    """TLS of a listener, None without a certificate.

    Raises:
        UserError: a host off loopback without a key, or with one but neither TLS nor `network.trusted_link`.
    """
    certificate, private_key = _path(network.tls_certificate), _path(network.tls_private_key)
    with user_errors():
        check_listener(
            network.host, key=shared_key(network), tls=certificate is not None, trusted_link=network.trusted_link
        )
        if certificate is None:
            return None
        if private_key is None:
            raise UserError("network.tls_private_key must be set where network.tls_certificate is, got None")
        return server_tls(certificate, private_key, _path(network.tls_authority))


def cannot_listen(network: NetworkSettings, error: OSError) -> UserError:
    """The UserError for a listener that could not be opened: whether host or port is to blame."""
    if isinstance(error, socket.gaierror):
        return UserError(f"network.host must be a name that resolves, got {network.host!r} ({error.strerror})")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"network.host must be an address of this machine, got {network.host!r} ({error})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"network.port must be one that this user may open, got {network.port} ({error})")
    return UserError(f"network.port must be free on {network.host}, got {network.port} ({error})")


def client_side_tls(network: NetworkSettings) -> ssl.SSLContext | None:
    """TLS of a client, None without an authority to trust. UserError for files that are no certificates."""
    authority = _path(network.tls_authority)
    if authority is None:
        return None
    with user_errors():
        return client_tls(authority, _path(network.tls_certificate), _path(network.tls_private_key))


def address_for_peers(host: str) -> str:
    """Under which address a peer reaches a listener on `host`: for the command that is typed over there.

    A listener on every interface has several; the one that leads outside is taken. Nothing is sent.
    """
    if is_loopback(host) or host not in ("", "0.0.0.0", "::"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737): only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _path(name: str | None) -> Path | None:
    return None if name is None else path_of(name, "network.key_file and network.tls_*")
