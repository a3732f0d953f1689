"""Keys, TLS, and the rules for listening."""

import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from lab.wire.faults import Peer, PeerGone, TlsRefused, WireError

logger = logging.getLogger(__name__)

KEY_MIN_BYTES = 16  # a server proves first, so any peer can try keys offline: they must be long


def read_key(key_file: Path | None, variable: str, environment: Mapping[str, str] = os.environ) -> bytes:
    """Return the shared key from `key_file`, else from the environment `variable`, else empty (loopback only).

    White space around it is ignored. Raises `ValueError` for a missing file and for a short key.
    """
    if key_file is None:
        key, source = environment.get(variable, "").encode().strip(), f"environment variable {variable}"
        if not key:
            return b""
    else:
        if not key_file.is_file():
            raise ValueError(f"network.key_file must be a readable file, got {key_file}")
        key, source = key_file.read_bytes().strip(), f"network.key_file {key_file}"
        if os.name == "posix" and key_file.stat().st_mode & 0o077:
            logger.warning("%s can be read by other users of this machine: chmod 600 it", key_file)
    if len(key) < KEY_MIN_BYTES:
        raise ValueError(f"{source} must hold at least {KEY_MIN_BYTES} bytes (openssl rand -hex 32), got {len(key)}")
    return key


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an address, is this machine only. An empty host is every interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def check_listener(host: str, *, key: bytes, tls: bool, trusted_link: bool) -> None:
    """Refuse to listen where strangers could connect. Raises `ValueError` with what is missing and why.

    On loopback nothing is required. Elsewhere a key is, together with TLS or a link that is encrypted already: the key
    protects only the handshake, and later frames could be read and altered on the way.
    """
    try:
        socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # a name that no resolver is asked for is the latter
        raise ValueError(f"network.host must be a name that resolves, got {host!r} ({error})") from None
    if is_loopback(host):
        return
    if not key:
        raise ValueError(
            f"network.key_file must be set (or network.host be a loopback address), got network.host={host} "
            "without a key: anyone who reaches this port could use this machine"
        )
    if not tls and not trusted_link:
        raise ValueError(
            f"network.trusted_link must be true (a VPN) or network.tls_certificate be set, got network.host={host} "
            "with a key but neither: frames after the handshake could be read and altered on the way"
        )


def server_tls(cert_file: Path, private_key_file: Path, ca_file: Path | None) -> ssl.SSLContext:
    """Return TLS 1.3 for a listener. With `ca_file`, clients must show a certificate signed by it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load("network.tls_certificate", cert_file, private_key_file, context)
    if ca_file is not None:
        _load_ca(ca_file, context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(ca_file: Path, cert_file: Path | None, private_key_file: Path | None) -> ssl.SSLContext:
    """Return TLS 1.3 for a client that trusts `ca_file` only (a self-signed certificate is its own), host name checked.

    `cert_file` and `private_key_file` are shown to a listener that asks for a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_ca(ca_file, context)
    if cert_file is not None:
        _load("network.tls_certificate", cert_file, private_key_file, context)
    return context


def tls_refused(peer: Peer, error: OSError) -> TlsRefused:
    """Return the fault of a failed TLS handshake at the client."""
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return TlsRefused(peer, "hung up on TLS (it has no network.tls_certificate, or this is another port)")
    return TlsRefused(peer, f"could not agree on TLS ({error})")


def explain_hangup(gone: PeerGone, host: str, port: int, seconds: float) -> WireError:
    """Return the fault that ended the handshake of a client without TLS: a listener with TLS hangs up without a
    reason."""
    if not _speaks_tls(host, port, seconds):
        return gone
    peer = Peer(role=gone.role, address=gone.address, phase=gone.phase)
    return TlsRefused(peer, "takes TLS only (network.tls_authority must be set, got null)")


def _speaks_tls(host: str, port: int, seconds: float) -> bool:
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=seconds) as probe, anyone.wrap_socket(probe):
            return True
    except OSError:
        return False


def _load(name: str, cert_file: Path, private_key_file: Path | None, context: ssl.SSLContext) -> None:
    try:
        context.load_cert_chain(cert_file, private_key_file)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{name} must be a PEM certificate with its key, got {cert_file}: {error}") from None


def _load_ca(ca_file: Path, context: ssl.SSLContext) -> None:
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:
        raise ValueError(f"network.tls_authority must be a PEM certificate, got {ca_file}: {error}") from None
