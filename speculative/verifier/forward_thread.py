"""The one thread that owns the engine: it takes calls, runs passes while there is work, and hands out what came of it.

Between two passes every call that has arrived is taken, so that texts whose guesses came during a pass share the next.
Knows nothing about networks; an event loop is never blocked by it.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from speculative.request import Outcome
from speculative.verifier.scheduler import Scheduler

Call = Callable[[Scheduler], list[Outcome]]
Deliver = Callable[[list[Outcome]], None]


END_SECONDS = 5.0
"""A pass that takes longer is left to itself: the process ends, and what its thread holds with it."""


class ForwardThread:
    """A context manager: leaving it ends the thread after its current pass.

    `deliver` is called in the thread, with outcomes in the order of the text; it must not wait.
    """

    def __init__(self, verifier: Scheduler, deliver: Deliver) -> None:
        self.finished: Future[None] = Future()
        """Done when the thread has ended; holds the exception that ended it, if one did."""
        self._verifier = verifier
        self._deliver = deliver
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    def submit(self, call: Call) -> None:
        """Have `call` done between two passes. Any thread; does not wait."""
        self._calls.put(call)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.put(None)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._verifier.shutdown()
        except BaseException as error:  # whoever waits for `finished` raises it
            self.finished.set_exception(error)
        else:
            self.finished.set_result(None)

    def _turn(self) -> bool:
        """Do every call that is there, then a tick unless it is worth waiting for more; returns whether to go on."""
        outcomes: list[Outcome] = []
        for call in self._take(self._verifier.patience()):
            if call is None:
                return False
            outcomes += call(self._verifier)
        if self._verifier.patience() <= 0:
            outcomes += self._verifier.tick()
        if outcomes:
            self._deliver(outcomes)
        return True

    def _take(self, patience: float) -> list[Call | None]:
        """Every call that is there; without one, the first that comes within `patience` seconds."""
        calls: list[Call | None] = []
        with contextlib.suppress(queue.Empty):
            if patience > 0:
                calls.append(self._calls.get(timeout=None if patience == math.inf else patience))
            while True:
                calls.append(self._calls.get_nowait())
        return calls
