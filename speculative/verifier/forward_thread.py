"""The one thread that owns the engine: it takes calls, runs passes while there is work, and delivers the outcomes.

Between two passes all calls that have arrived are run, so that sequences whose drafts arrived during a pass share the
next one. Knows nothing about networks; it never blocks the event loop in which outcomes are delivered.
"""

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Self

from speculative.messages import Reason
from speculative.request import Ending, Outcome
from speculative.verifier.scheduler import Scheduler

log = logging.getLogger(__name__)

Call = Callable[[Scheduler], list[Outcome]]
Receive = Callable[[Outcome], None]


END_SECONDS = 5.0
"""Time limit of the last pass; after it the process ends without waiting for the thread."""


class ForwardThread:
    """A context manager: leaving it ends the thread after its current pass.

    Args:
        scheduler: Called in the thread, and nowhere else.
        call_soon: Has a function called with some arguments where outcomes are to be received, in order; does not wait.
    """

    def __init__(self, scheduler: Scheduler, call_soon: Callable[..., object]) -> None:
        self.finished: Future[None] = Future()
        """Done when the thread has ended; holds the exception that ended it, if one did."""
        self.refused = 0
        """Number of requests that were refused."""
        self._scheduler = scheduler
        self._call_soon = call_soon
        self._receivers: dict[Hashable, Receive] = {}
        """Receivers of outcomes, by key."""
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    def open(self, key: Hashable, receive: Receive, call: Call) -> None:
        """Begin or resume a request by `call`; `receive` is called with each of its outcomes."""
        self._receivers[key] = receive
        self.submit(key, call)

    def submit(self, key: Hashable, call: Call) -> None:
        """Run `call` between two passes. If it fails, only the request `key` ends."""

        def do(scheduler: Scheduler) -> list[Outcome]:
            try:
                return call(scheduler)
            except Exception as error:  # one request must not end the thread that serves all
                log.exception("a request ends by a fault of ours")
                return scheduler.fail(key, error)

        self._calls.put(do)

    def close(self, key: Hashable) -> None:
        """Forget a request; nothing more is received for it."""
        self._receivers.pop(key, None)
        self.submit(key, lambda scheduler: scheduler.close(key))

    def leave(self, key: Hashable) -> None:
        """End the connection of a request, which may be resumed; nothing more is received for it."""
        self._receivers.pop(key, None)
        self.submit(key, lambda scheduler: scheduler.leave(key))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._calls.put(None)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._scheduler.shutdown()
        except BaseException as error:  # raised where `finished` is awaited
            self.finished.set_exception(error)
        else:
            self.finished.set_result(None)

    def _turn(self) -> bool:
        """Run all calls that have arrived, then a tick unless waiting pays off; returns whether to continue."""
        outcomes: list[Outcome] = []
        for call in self._take(self._scheduler.patience()):
            if call is None:
                return False
            outcomes += call(self._scheduler)
        if self._scheduler.patience() <= 0:
            outcomes += self._scheduler.tick()
        if outcomes:
            try:
                self._call_soon(self._deliver, outcomes)
            except RuntimeError:  # the event loop has ended, and with it every connection
                log.debug("%d outcomes came after the end", len(outcomes))
        return True

    def _take(self, patience: float) -> list[Call | None]:
        """All calls that have arrived; if there are none, the first that arrives within `patience` seconds."""
        calls: list[Call | None] = []
        with contextlib.suppress(queue.Empty):
            if patience > 0:
                calls.append(self._calls.get(timeout=None if patience == math.inf else patience))
            while True:
                calls.append(self._calls.get_nowait())
        return calls

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            receive = self._receivers.get(outcome.key)
            if isinstance(outcome, Ending):
                self.refused += outcome.reason in (Reason.refused, Reason.full)
                self._receivers.pop(outcome.key, None)
            try:
                if receive is not None:
                    receive(outcome)
            except Exception:  # one failing receiver must not affect the others
                log.exception("a request ends by a fault of ours")
                self.close(outcome.key)
