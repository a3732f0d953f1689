"""A site's own memory between rounds, on its own disk: what compression rounded away, the adapter it was last sent, and
what it keeps to itself.

A reply may be lost, and a message may be sent again. So all is kept in two versions: the one from before a round, and
the one that holds once the server has folded the round's reply in. The server says in every message which of the site's
rounds it has folded last, and the site goes on from that version: a reply that was lost changes nothing, and a message
that is answered twice gets the same reply.

One file for each run and site, written whole or not at all: `<folder>/<run>/site-<number>.safetensors`.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lab.settings import UserError

SECONDS_OF_A_DAY = 86_400
ERROR, SENT, PERSONAL = "error", "sent", "personal"
"""Kinds of vectors: what was rounded away, the adapter as it was sent, and the site's own after its training."""

log = logging.getLogger(__name__)

Vectors = Mapping[int, torch.Tensor]
"""A flat float32 vector for each of some rounds."""


class SiteMemory:
    """The memory of one site in one run."""

    def __init__(self, folder: Path, run: str, site: int, keep_days: float) -> None:
        self._root = folder
        self._keep_seconds = keep_days * SECONDS_OF_A_DAY
        self._file = folder / run / f"site-{site}.safetensors"
        self._vectors = self._read()

    def error_after(self, server_round: int, size: int) -> torch.Tensor:
        """What was rounded away up to a round whose reply was folded in; zeros for round 0, or where it is missing.

        UserError where the site has gone beyond that round: the run was continued from there before.
        """
        found = self.vector(ERROR, server_round)
        if found is not None and found.shape == (size,):
            return found
        if not server_round:
            return torch.zeros(size)
        kept = (name.partition(".") for name in self._vectors)
        if any(kind == ERROR and int(number) > server_round for kind, _, number in kept):
            rule = f"project.resume must be the newest continuation of its run, got one that is at round {server_round}"
            raise UserError(f"{rule}: this site has compressed later rounds, and forgot what was rounded away before")
        log.warning("%s has no error of round %d: it starts again from zero", self._file, server_round)
        return torch.zeros(size)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self._file.parent

    def vector(self, kind: str, server_round: int) -> torch.Tensor | None:
        """A vector of a round, if the site still has it; rounds that were not folded in are none."""
        return self._vectors.get(f"{kind}.{server_round}") if server_round else None

    def write(self, vectors: Mapping[str, Vectors]) -> None:
        """Replace the memory by vectors, by their kinds and rounds."""
        self._vectors = {
            f"{kind}.{number}": vector for kind, found in vectors.items() for number, vector in found.items()
        }
        new = not self._file.parent.exists()
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            save_file(self._vectors, unfinished)
            unfinished.chmod(0o600)
            unfinished.replace(self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        if new:
            self._forget_old_runs()

    def _read(self) -> dict[str, torch.Tensor]:
        try:
            return dict(load_file(self._file)) if self._file.exists() else {}
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read and is left out: %s", self._file, error)
            return {}

    def _forget_old_runs(self) -> None:
        for folder in self._root.iterdir():
            if folder == self._file.parent or folder.is_symlink():
                continue
            with suppress(OSError):  # no folder; or another worker removes it at the same moment
                # Only what runs leave: the setting may name a folder that holds other things.
                held = [inside.name for inside in folder.iterdir()]
                is_ours = bool(held) and all(name.startswith(("site-", ".site-")) for name in held)
                if is_ours and time.time() - folder.stat().st_mtime > self._keep_seconds:
                    shutil.rmtree(folder, ignore_errors=True)
