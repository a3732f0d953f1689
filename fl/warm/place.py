"""The files by which client processes find the worker of their SuperNode: its address, and the key to it.

Only the user of the SuperNode may read them. Loads no torch.
"""

import json
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from flwr.supercore.utils import get_flwr_home

from lab.command.starts import start_of
from lab.files import write_whole
from lab.settings import UserError

FOLDER = "warm"
"""Below FLWR_HOME, where Flower keeps the code of the runs."""
KEY_BYTES = 32
SUPERNODE, CLIENT = "flower-supernode", "flwr-clientapp"
WATCH_SECONDS = 0.5
"""Pause between two looks for the SuperNode."""
CODE = Path(__file__).resolve().parents[2]
"""The code of this run: Flower installs every version of it into a folder of its own."""


@dataclass(frozen=True)
class Worker:
    """A running worker."""

    pid: int
    created: int
    port: int
    code: str

    @property
    def process(self) -> psutil.Process | None:
        """Its process, None if it has ended."""
        return _process(self.pid, self.created)


@dataclass(frozen=True)
class Place:
    """The files of the worker of one SuperNode."""

    pid: int
    """Number of the SuperNode's process."""
    created: int
    """When that was started (`lab.command.starts.start_of`): the number alone may come again."""
    folder: Path

    @classmethod
    def of_this_process(cls) -> "Place | None":
        """The place of the SuperNode that started this process; None if none did."""
        for process in psutil.Process().parents():
            try:
                if any(Path(word).name == SUPERNODE for word in process.cmdline()[:3]):
                    # By machine: several may share a home, and none can tell whether another's SuperNode still runs.
                    folder = get_flwr_home().absolute() / FOLDER / platform.node()
                    return cls(process.pid, start_of(process), folder)
            except psutil.Error:
                continue
        return None

    @property
    def name(self) -> str:
        """Name of the files."""
        return f"{self.pid}-{self.created}"

    @property
    def key_file(self) -> Path:
        """File with the key that both sides show."""
        return self.folder / f"{self.name}.key"

    @property
    def address_file(self) -> Path:
        """File with the worker's process and port."""
        return self.folder / f"{self.name}.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the client process that starts a worker."""
        return self.folder / f"{self.name}.lock"

    def make(self) -> None:
        """Make folder and key, if they are not there; with a new key, remove files that earlier SuperNodes have left.
        UserError if others can read the folder."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(self.folder)
        if self.key_file.exists():
            return
        self._remove_left()
        # Whole from the first moment: two client processes may come at once, and one may be killed.
        unfinished = self.folder / f".{self.name}.{os.getpid()}"
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(KEY_BYTES) + "\n")
            with suppress(FileExistsError):
                os.link(unfinished, self.key_file)
        finally:
            unfinished.unlink(missing_ok=True)

    def key(self) -> bytes:
        """The key. UserError if others can read or have made its file, and for one that is not whole."""
        require_private(self.folder)
        require_private(self.key_file)
        key = self.key_file.read_bytes().strip()
        if len(key) != 2 * KEY_BYTES:
            rule = f"the key of the warm worker must have {2 * KEY_BYTES} letters"
            raise UserError(f"{rule}, got {len(key)} in {str(self.key_file)!r}: remove the file")
        return key

    def worker(self) -> Worker | None:
        """The worker that announced itself last, if it still runs."""
        try:
            worker = Worker(**json.loads(self.address_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return worker if worker.process is not None else None

    def announce(self, port: int) -> None:
        """Say that this process is the worker."""
        ours = psutil.Process()
        about = {"pid": ours.pid, "created": start_of(ours), "port": port, "code": str(CODE)}
        write_whole(self.address_file, json.dumps(about))

    def is_over(self) -> bool:
        """Whether the SuperNode has ended."""
        return _process(self.pid, self.created) is None

    def follow(self) -> None:
        """When the SuperNode has ended, remove all files, and end its client processes and this one, even in the middle
        of a computation."""
        supernode = _process(self.pid, self.created)
        executors: list[str] = []
        if supernode is not None:
            with suppress(psutil.NoSuchProcess):  # it ends now
                executors = [str(child.pid) for child in supernode.children()]

        def watch() -> None:
            while supernode is not None and _is_running(supernode):
                time.sleep(WATCH_SECONDS)
            try:
                self.remove()
                _end_clients(executors)
            finally:
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

    def remove(self) -> None:
        """Remove all files, once the SuperNode has ended."""
        for file in (self.address_file, self.key_file, self.lock_file, *self.folder.glob(f".{self.name}.*")):
            file.unlink(missing_ok=True)

    def _remove_left(self) -> None:
        """Remove this user's files of SuperNodes that have ended when nobody was left to remove them: after a kill of
        all processes, or a power cut."""
        for file in self.folder.iterdir():
            if (name := re.fullmatch(r"\.?([0-9]+)-([0-9]+)\..+", file.name)) is None:
                continue
            with suppress(OSError, psutil.Error):  # a file that cannot be removed is no reason to fail
                is_ours = os.name != "posix" or file.lstat().st_uid == os.getuid()
                if is_ours and Place(int(name[1]), int(name[2]), self.folder).is_over():
                    file.unlink()


def require_private(path: Path) -> None:
    """UserError if a file or folder is another user's, or can be read by others."""
    if os.name != "posix":
        return
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        rule = "the key of the warm worker must be readable by its owner alone"
        raise UserError(f"{rule}, got {str(path)!r} of user {status.st_uid} with mode {status.st_mode & 0o777:o}")


def _end_clients(executors: Sequence[str]) -> None:
    """End the client processes that these SuperExecs, by their process numbers, have started.

    Flower's own watch does not end one that fetches its message: it asks the SuperNode again and again.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_client = any(Path(word).name == CLIENT for word in words[:3]) and "--parent-pid" in words
        if is_client and words[words.index("--parent-pid") + 1] in executors and process.pid != os.getpid():
            with suppress(psutil.Error):
                process.kill()


def _process(pid: int, created: int) -> psutil.Process | None:
    """The running process of this number that was started then, None if it has ended."""
    try:
        process = psutil.Process(pid)
        is_same = start_of(process) == created
    except psutil.NoSuchProcess:
        return None
    return process if is_same and _is_running(process) else None


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
