"""The HTTP server: an OpenAI-compatible endpoint and a chat page over everything that the lab can run."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
