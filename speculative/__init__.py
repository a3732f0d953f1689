"""Speculative decoding between two machines: draft tokens travel, the text is the target's own."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
