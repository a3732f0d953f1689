"""For every test."""

from __future__ import annotations

import signal

# A shell's background job ignores SIGINT, and so would every process that tests start and interrupt there.
signal.signal(signal.SIGINT, signal.default_int_handler)
