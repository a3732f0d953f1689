"""Keeps the signals of a process that uses Ray in our hands."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_leaves_signals_alone() -> Iterator[None]:
    """Within the block, `ray.init` leaves our signal handlers in place. It has two handlers of SIGTERM: a Python one,
    which exits from any point, and a C++ one, set when it connects, which prints the stack and aborts.
    """
    from ray._private import utils, worker  # there is no public API

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    worker._post_init_hooks.append(take_back)
    try:
        yield
    finally:
        worker._post_init_hooks.remove(take_back)
        utils.set_sigterm_handler = before


def take_back() -> None:
    """Make the operating system call Python's handler again; Python itself still knows the handler."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
