"""Shard processes on this machine, started and ended by their client."""

import logging
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self

from lab.bench import pinned
from lab.command.processes import NotReady, first_line, last_line, last_said, start
from lab.settings import UserError
from split.chain.address import Address

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""Time for a shard to end by itself; then it is killed."""
WATCH_SECONDS = 0.1


class LocalShards:
    """One process for each range of layers: `with LocalShards(...) as shards: shards.addresses`.

    They end when we do, in any way: they follow their standard input. One that dies is started again at its address.

    Args:
        layers: Layers of each.
        folder: Where they log.
        start_seconds: How long they may take to listen.
        overrides: Their command line, but for their places.
        pin: Whether each gets its own core.
        module: What they run.
        group_port: Where they meet as members of a torch RPC group; they do not listen then, and are not started again.
    """

    def __init__(
        self,
        layers: Sequence[range],
        folder: Path,
        start_seconds: float,
        overrides: Sequence[str],
        *,
        pin: bool = False,
        module: str = "split.serve",
        group_port: int | None = None,
    ) -> None:
        self._overrides, self._pin, self._module = overrides, pin, module
        self._layers, self._folder, self._start_seconds = layers, folder, start_seconds
        self.group_port = group_port
        self.processes: list[subprocess.Popen[str]] = []
        self.addresses: list[Address] = []
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="local shards", daemon=True)

    def __enter__(self) -> Self:
        try:
            for index in range(len(self._layers)):
                self.processes.append(self._start(index, self.group_port or 0))
            deadline = time.monotonic() + self._start_seconds
            self.addresses = [self._address(index, deadline) for index in range(len(self.processes))]
        except BaseException:
            self.stop()
            raise
        if self.group_port is None:
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every shard, and wait until it has ended."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def kill(self, place: int) -> None:
        """SIGKILL one of them, to test its recovery."""
        self.processes[place].kill()

    def _watch(self) -> None:
        """Start dead shards again. The client finds them at their addresses once they listen."""
        while not self._stopping.wait(WATCH_SECONDS):
            for index, process in enumerate(self.processes):
                if process.poll() is not None:
                    log.warning("shard %d has ended with code %s; starting it again", index + 1, process.returncode)
                    self.processes[index] = self._start(index, self.addresses[index].port)

    def _start(self, index: int, port: int) -> subprocess.Popen[str]:
        layers = self._layers[index]
        overrides = [
            *self._overrides,
            f"project.layers={layers.start}:{layers.stop}",
            "project.follow_stdin=true",
            f"network.port={port}",
            *([f"project.rank={index + 1}", f"project.world_size={len(self._layers) + 1}"] if self.group_port else []),
        ]
        with pinned(index) if self._pin else nullcontext():
            # Ctrl+C must reach only us: we end them after we have left them.
            return start(self._module, overrides, self._shard_folder(index), follows_stdin=True, own_session=True)

    def _shard_folder(self, index: int) -> Path:
        return self._folder / f"shard-{index + 1}"

    def _say_waiting(self, index: int) -> None:
        layers, said = self._layers[index], last_said(self._shard_folder(index))
        log.info(
            "waiting for shard %d (layers %d:%d)%s", index + 1, layers.start, layers.stop, f": {said}" * bool(said)
        )

    def _address(self, index: int, deadline: float) -> Address:
        """Wait until a shard reports where it listens, or that it joins its group."""
        try:
            ready = first_line(self.processes[index], deadline - time.monotonic(), lambda: self._say_waiting(index))
        except NotReady as error:
            if error.ended:
                line = f"shard {index + 1} did not start: {last_line(self._shard_folder(index))}"
                is_refused = self.processes[index].wait(self._start_seconds) == 2
                raise (UserError(line) if is_refused else NotReady(line, ended=True)) from None
            raise UserError(
                f"project.start_seconds must be long enough for a shard to load, got {self._start_seconds:g}"
            ) from None
        return Address(ready["host"], ready["port"])
