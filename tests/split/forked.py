"""Shard processes for tests: forked from one that has imported everything, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from split.chain.address import Address
from split.chain.open import free_port
from tests.split.inference.kills import LAYERS, settings_of

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lab.command.entry", "split.inference.open", "tests.split.inference.kills"])
START_SECONDS = 60.0


class ForkedShards:
    """A process a range of `LAYERS`; one that ends is started again at its address, up to 0.3 s later."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self.addresses: Sequence[Address] = [Address("127.0.0.1", free_port()) for _ in LAYERS]
        self._pauses = random.Random(0)
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def kill(self, place: int) -> None:
        self._processes[place].kill()

    def __enter__(self) -> Self:
        self._processes = [self._start(place) for place in range(len(LAYERS))]
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._watcher.join()
        for process in self._processes:
            process.kill()
            process.join()

    def _watch(self) -> None:
        while not self._stopping.wait(0.01):
            for place, process in enumerate(self._processes):
                if not process.is_alive():
                    time.sleep(self._pauses.uniform(0, 0.3))
                    self._processes[place] = self._start(place)

    def _start(self, place: int) -> multiprocessing.context.ForkServerProcess:
        process = _CONTEXT.Process(target=_serve, args=(self._cache, place, self.addresses[place].port), daemon=True)
        process.start()
        return process


def _serve(cache: str, place: int, port: int) -> None:
    import os
    import sys
    from dataclasses import replace

    from split.inference.open import host

    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process)
    settings = settings_of(cache)
    layers = f"{LAYERS[place].start}:{LAYERS[place].stop}"
    project = replace(settings.project, layers=layers)
    host(replace(settings, project=project, network=replace(settings.network, port=port)))
