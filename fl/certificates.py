"""Certificates and keys for a federation across machines.

    python -m fl.certificates server lab.example 192.168.1.10     on the server's machine, with all of its names
    python -m fl.certificates site alice                          on a site's own machine

`server` makes an authority, signs the server's certificate with it, and forgets the authority's key: a server with
another certificate cannot be made later, not even by us. `site` makes the key pair with which one SuperNode signs its
requests; its private half stays on that machine. Nothing is ever overwritten, and nothing is kept in the checkout.
"""

import argparse
import ipaddress
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.command import streams
from lab.command.terminal import one_line
from lab.files import cannot_use, path_of
from lab.settings import UserError

FOLDER = Path("~/.config/distributed-llm-lab/certificates")
CONNECTION_HOME = FOLDER.expanduser() / "flwr"
"""The FLWR_HOME that `server` makes when it is not told another folder."""
CHECKOUT = Path(__file__).resolve().parent.parent
CONNECTION = "lab"
"""The server's name in Flower's config.toml."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""The SuperLink's own server app reaches it under these."""
VALID = timedelta(days=365)
CLOCKS_DIFFER = timedelta(hours=1)
PRIVATE = 0o600


@dataclass(frozen=True)
class ServerFiles:
    """Files of a server."""

    authority: Path
    """Certificate of the authority: public, every site needs it."""
    certificate: Path
    key: Path
    """Private; mode 0600."""
    flower_home: Path
    """A FLWR_HOME whose config.toml names the server as the connection `lab`."""


@dataclass(frozen=True)
class SiteFiles:
    """The two halves of a site's key."""

    key: Path
    """Private, OpenSSH format, mode 0600; it stays on the site's machine."""
    public_key: Path
    """For `flwr supernode register`."""


def make_server(folder: Path, names: Iterable[str], port: int) -> ServerFiles:
    """A new authority and a certificate for a server with `names` (hosts or IP addresses) that listens on `port`.

    UserError for a name that is none, a port that is none, a folder inside the checkout, or files that are there.
    """
    folder, names = outside_checkout(folder), list(names)
    if not 1 <= port <= 65535:
        raise UserError(f"port must be in [1, 65535], got {port}")
    alternatives = [alternative_name(name) for name in dict.fromkeys([*names, *LOCAL_NAMES])]
    files = ServerFiles(folder / "ca.crt", folder / "server.pem", folder / "server.key", folder / "flwr")
    connection = files.flower_home / "config.toml"
    refuse_existing([files.authority, files.certificate, files.key, connection])
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority = authority_certificate(authority_key)
    certificate = server_certificate(server_key, names[0], alternatives, authority, authority_key)
    write_new(files.key, server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=PRIVATE)
    write_new(files.authority, authority.public_bytes(Encoding.PEM))
    write_new(files.certificate, certificate.public_bytes(Encoding.PEM))
    write_new(connection, connection_file(address(names[0], port), files.authority).encode())
    return files


def make_site(folder: Path, name: str) -> SiteFiles:
    """A new EC P-384 key pair `name`, `name.pub`; UserError for a name that is none, or files that are there."""
    folder = outside_checkout(folder)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"site must be letters, digits, - and _, got {name!r}")
    files = SiteFiles(folder / name, folder / f"{name}.pub")
    refuse_existing([files.key, files.public_key])
    key = ec.generate_private_key(ec.SECP384R1())
    write_new(files.key, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=PRIVATE)
    write_new(files.public_key, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return files


def authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed certificate that may sign servers' certificates and nothing else."""
    name = common_name("distributed-llm-lab authority")
    usage = key_usage(key_cert_sign=True, crl_sign=True)
    return (
        _unsigned(name, name, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    key: ec.EllipticCurvePrivateKey,
    name: str,
    alternatives: list[x509.GeneralName],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for a TLS server, valid for the names and addresses in `alternatives`."""
    return (
        _unsigned(common_name(name[:64]), authority.subject, key.public_key(), authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, issuer_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """The common part of both certificates; Python 3.13 verifies strictly and wants the key identifiers (RFC 5280)."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def common_name(text: str) -> x509.Name:
    """A distinguished name of one part."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    """A KeyUsage extension that allows the named uses and nothing else."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def alternative_name(name: str) -> x509.GeneralName:
    """`name` as an IP address or a host name in a certificate. UserError when it is neither."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if len(name) > 253 or not re.fullmatch(rf"{label}(\.{label})*", name):
        raise UserError(f"name must be an IP address or a host name without port, got {name!r}")
    return x509.DNSName(name)


def address(name: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def connection_file(server: str, authority: Path) -> str:
    """Flower's config.toml with one connection."""
    # A JSON string is also a TOML basic string, backslashes of a Windows path included.
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(server)}\nroot-certificates = {json.dumps(str(authority), ensure_ascii=False)}\n"
    )


def outside_checkout(folder: Path) -> Path:
    """`folder`, absolute; UserError when it lies where it could be committed."""
    folder = path_of(str(folder), "--folder")
    if folder.resolve().is_relative_to(CHECKOUT):
        raise UserError(f"folder must lie outside {CHECKOUT}, got {str(folder)!r}")
    return folder


def refuse_existing(files: Iterable[Path]) -> None:
    """UserError if one of `files` exists."""
    for file in files:
        if file.exists():
            raise UserError(f"{file.name} must not be there yet (move it away to make another), got {str(file)!r}")


def write_new(file: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a new file; FileExistsError if it exists. On Windows `mode` has no effect: the folder protects the file."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)


def server_steps(files: ServerFiles, name: str, port: int) -> str:
    """The commands to type next, and on which machine."""
    return f"""
Here, in the folder that shall hold the results:
  flower-superlink --ssl-ca-certfile {quoted(files.authority)} --ssl-certfile {quoted(files.certificate)} \
--ssl-keyfile {quoted(files.key)} --enable-supernode-auth --disable-runtime-dependency-installation \
--host 0.0.0.0 --port {port}
For each site, with the NAME.pub that it sent (no secret):
  {set_flower_home(files.flower_home)}
  flwr supernode register NAME.pub {CONNECTION}
Give each site {quoted(files.authority)} (no secret) and the address {address(name, port)}.
Then, in the checkout:
  flwr run . {CONNECTION} --stream --run-config "overrides='project.num_clients=2 project.rounds=3 \
project.data.source=jsonl'"
"""


def site_steps(files: SiteFiles) -> str:
    """The commands to type next, and on which machine."""
    return f"""
Send {quoted(files.public_key)} to the server (no secret), and get its ca.crt and its address HOST:PORT.
Once the key is registered, here:
  flower-supernode --superlink HOST:PORT --root-certificates ca.crt --auth-supernode-private-key {quoted(files.key)} \
--node-config "partition-id=0 data-path='/path/to/this/site.jsonl'"
Every site has its own partition-id: 0, 1, 2, ...
"""


def quoted(path: Path) -> str:
    """A path as every shell takes it."""
    return f'"{path}"' if re.search(r"\s", str(path)) else str(path)


def set_flower_home(folder: Path) -> str:
    """The shell's command that makes `flwr` read this folder's config.toml."""
    return f"set FLWR_HOME={folder}" if os.name == "nt" else f"export FLWR_HOME={quoted(folder)}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a bad one ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fl.certificates", description="Certificates and keys for a federation across machines."
    )
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("server", help="an authority and the server's certificate")
    server.add_argument("names", nargs="+", metavar="NAME", help="host name or IP address under which sites reach it")
    server.add_argument("--port", type=int, default=8443, help="port that it listens on (%(default)s)")
    site = roles.add_parser("site", help="the key pair of one site")
    site.add_argument("name", metavar="NAME", help="name of the site: becomes the file name")
    for role in (server, site):
        role.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Make the files; next steps on stderr, paths as JSON on stdout. Exit code 2 for a bad request."""
    streams.in_utf8_mode()
    out = streams.open_streams()
    asked = parse(arguments)
    try:
        if asked.role == "server":
            server = make_server(asked.folder, asked.names, asked.port)
            files, steps = vars(server), server_steps(server, asked.names[0], asked.port)
        else:
            site = make_site(asked.folder, asked.name)
            files, steps = vars(site), site_steps(site)
    except (UserError, OSError) as error:
        line = error if isinstance(error, UserError) else cannot_use("--folder", asked.folder, error)
        print(f"error: {one_line(str(line))}", file=sys.stderr)
        raise SystemExit(2) from None
    print(steps, file=sys.stderr)
    streams.print_last_line(json.dumps({"status": "ok", **{name: str(path) for name, path in files.items()}}), out)
    if streams.lost(out) and not streams.is_left(out):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
