"""Signals of a process that uses Ray: they stay ours."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_leaves_signals_alone() -> Iterator[None]:
    """Within the block `ray.init` takes no signal from us. It has two handlers of SIGTERM: one in Python, which exits
    wherever it is, and one in C++, which prints the stack and aborts, and comes with the connection to the cluster.
    """
    from ray._private import utils, worker  # there is no public way

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    worker._post_init_hooks.append(take_back)
    try:
        yield
    finally:
        worker._post_init_hooks.remove(take_back)
        utils.set_sigterm_handler = before


def take_back() -> None:
    """Have the system call Python's handler again, of which alone Python knows."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
