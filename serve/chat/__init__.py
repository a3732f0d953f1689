"""Chat in a terminal with any server that speaks the OpenAI API. Loads no torch."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
