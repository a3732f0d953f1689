"""Certificates verify strictly for the names asked for and for no others; keys are private and never overwritten."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fl import certificates
from fl.certificates import ServerFiles, make_server, make_site
from lab.settings import UserError


def connect(server: ServerFiles, authority: Path, name: str) -> str:
    """Shakes hands over a real socket as a strict client that trusts `authority` and expects `name`; TLS version."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server.certificate, server.key)
    ours = ssl.create_default_context(cafile=str(authority))
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.settimeout(10)
            with connection, suppress(OSError):  # where the client refuses, the client says so
                theirs.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as connection,
                ours.wrap_socket(connection, server_hostname=name) as secure,
            ):
                return str(secure.version())
        finally:
            thread.join(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerFiles:
    return make_server(tmp_path_factory.mktemp("server"), ["lab.example", "192.168.7.9", "fd00::9"], 8443)


@pytest.mark.parametrize("name", ["lab.example", "192.168.7.9", "fd00::9", "localhost", "127.0.0.1", "::1"])
def test_the_certificate_is_valid_for_its_names(server: ServerFiles, name: str) -> None:
    assert connect(server, server.authority, name) == "TLSv1.3"


@pytest.mark.parametrize("name", ["evil.example", "192.168.7.10"])
def test_and_for_no_other_name(server: ServerFiles, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        connect(server, server.authority, name)


def test_another_authority_does_not_vouch_for_it(server: ServerFiles, tmp_path: Path) -> None:
    other = make_server(tmp_path, ["lab.example"], 8443)
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        connect(server, other.authority, "lab.example")


def test_the_servers_certificate_vouches_for_nobody(server: ServerFiles) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(server, server.certificate, "lab.example")


def test_the_authority_key_is_kept_nowhere(server: ServerFiles) -> None:
    folder = server.authority.parent
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {"ca.crt", "server.pem", "server.key", "flwr/config.toml"}
    assert [file for file in sorted(files) if b"PRIVATE KEY" in (folder / file).read_bytes()] == ["server.key"]


def test_flower_finds_the_server(tmp_path: Path) -> None:
    server = make_server(tmp_path / "a \\ folder", ["fd00::9"], 9443)
    connections = tomllib.loads((server.flower_home / "config.toml").read_text(encoding="utf-8"))["superlink"]
    expected = {"address": "[fd00::9]:9443", "root-certificates": str(server.authority)}
    assert connections == {"default": "lab", "lab": expected}


def test_a_site_has_a_p384_pair(tmp_path: Path) -> None:
    site = make_site(tmp_path, "alice")
    key = load_ssh_private_key(site.key.read_bytes(), password=None)
    public_key = load_ssh_public_key(site.public_key.read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key() == public_key
    assert b"PRIVATE" not in site.public_key.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes; the profile folder's rights hold there")
def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private = [make_server(tmp_path / "new", ["localhost"], 8443).key, make_site(tmp_path / "new", "alice").key]
    finally:
        os.umask(before)
    assert [oct(file.stat().st_mode & 0o777) for file in private] == ["0o600", "0o600"]
    assert oct((tmp_path / "new").stat().st_mode & 0o777) == "0o700"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    server, site = make_server(tmp_path, ["localhost"], 8443), make_site(tmp_path, "alice")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"ca\.crt must not be there yet"):
        make_server(tmp_path, ["localhost"], 8443)
    server.authority.unlink()
    with pytest.raises(UserError, match=r"server\.pem must not be there yet"):
        make_server(tmp_path, ["localhost"], 8443)
    with pytest.raises(UserError, match="alice must not be there yet"):
        make_site(tmp_path, "alice")
    site.key.unlink()
    with pytest.raises(UserError, match=r"alice\.pub must not be there yet"):
        make_site(tmp_path, "alice")
    with pytest.raises(FileExistsError):
        certificates.write_new(server.key, b"")
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == {file: data for file, data in before.items() if file not in (server.authority, site.key)}


@pytest.mark.parametrize("name", ["lab.example:8443", "two words", "-a", "a..b", "", "lab/../x", "*.example"])
def test_a_name_must_be_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name must be an IP address or a host name"):
        make_server(tmp_path / "new", [name], 8443)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../alice", "a b", ".ssh", ""])
def test_a_site_must_be_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="site must be letters"):
        make_site(tmp_path / "new", name)


def test_a_site_does_not_take_the_servers_folder(tmp_path: Path) -> None:
    server = make_server(tmp_path, ["localhost"], 8443)
    with pytest.raises(UserError, match="flwr must not be there yet"):
        make_site(tmp_path, server.flower_home.name)


def test_a_port_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"port must be in \[1, 65535\], got 0"):
        make_server(tmp_path, ["localhost"], 0)


def test_keys_stay_out_of_the_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder must lie outside"):
        make_site(certificates.CHECKOUT / "keys", "alice")
    (tmp_path / "link").symlink_to(certificates.CHECKOUT, target_is_directory=True)
    with pytest.raises(UserError, match="folder must lie outside"):
        make_site(tmp_path / "link" / "keys", "alice")
    assert not (certificates.CHECKOUT / "keys").exists()


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fl.certificates", *arguments]
    return subprocess.run(command, cwd=certificates.CHECKOUT, capture_output=True, text=True, timeout=60)


def test_the_command_says_what_to_type_next(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    server = call("server", "lab.example", "--port", "9443", "--folder", str(folder))
    assert server.returncode == 0, server.stderr
    assert json.loads(server.stdout)["authority"] == str(folder / "ca.crt")
    assert f'--ssl-ca-certfile "{folder / "ca.crt"}"' in server.stderr
    assert "--port 9443" in server.stderr
    again = call("server", "lab.example", "--folder", str(folder))
    assert again.returncode == 2
    assert again.stderr.startswith("error: ca.crt must not be there yet")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "<&- >&- 2>&-", "| head -c 0", "> /dev/full"])
@pytest.mark.skipif(os.name == "nt", reason="a shell of its own")
def test_a_key_is_made_whoever_reads_what_is_said(closed: str, tmp_path: Path) -> None:
    words = f"{sys.executable} -m fl.certificates site alice --folder {tmp_path} {closed}"
    done = subprocess.run(words, shell=True, cwd=certificates.CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, (tmp_path / "alice.pub").exists()) == (int("full" in closed), True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file" / "José", "Not a directory"), (Path("~nobody-here/x"), "a path without ~")):
        done = call("site", "alice", "--folder", str(folder))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("error: --folder must be ")
        assert why in done.stderr
