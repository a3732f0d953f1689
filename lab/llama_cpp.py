"""llama.cpp, the peer of benchmarks, in a process of its own: its HTTP server, out of the wheel `xllamacpp`.

    python -m lab.llama_cpp FILE.gguf THREADS SLOTS CONTEXT [--port PORT] [--speculation METHOD]

In one process the thread pools of llama.cpp and torch slow each other down: two threads of torch took three times as
long for a token.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from lab.command.processes import first_line, say_ready, start
from lab.settings import ModelSettings, ModelSource

log = logging.getLogger(__name__)

START_SECONDS = 120.0
REQUEST_SECONDS = 600.0
MODULE = "lab.llama_cpp"


class LlamaCpp:
    """A llama.cpp process, until `close` or our own end.

    Args:
        file: A GGUF file.
        threads: Of its passes.
        slots: Sequences at once.
        context: Positions of a slot.
        speculation: None, or the method by which it drafts from n-grams of its text: NGRAM_SIMPLE, NGRAM_MAP_K,
            NGRAM_MAP_K4V, NGRAM_MOD or NGRAM_CACHE.
    """

    def __init__(self, file: Path, threads: int, slots: int, context: int, speculation: str | None = None) -> None:
        arguments = [str(file), *map(str, (threads, slots, context))]
        if speculation is not None:
            arguments += ["--speculation", speculation]
        self._process: subprocess.Popen[str] = start(MODULE, arguments, None, follows_stdin=True)
        try:
            ready = first_line(self._process, START_SECONDS)
        except BaseException:
            self._end()
            raise
        address = f"http://{ready['host']}:{ready['port']}"
        self._client = httpx.Client(base_url=address, timeout=REQUEST_SECONDS, trust_env=False)  # never by a proxy

    def complete(self, ids: Sequence[int], new_tokens: int, *, ignore_end: bool = True) -> Mapping[str, float]:
        """Greedy continuation of so many tokens, fewer if the model may end it sooner; its own timings."""
        request = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0.0, "cache_prompt": False}
        answer = self._client.post("/completion", json=request | {"ignore_eos": ignore_end}).raise_for_status()
        timings: Mapping[str, float] = answer.json()["timings"]
        return timings

    def prompt_speed(self, ids: Sequence[int]) -> float:
        """Tokens a second of a prompt."""
        return self.complete(ids, 1)["prompt_per_second"]

    def close(self) -> None:
        """End the process."""
        self._client.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def open_llama_cpp(
    model: ModelSettings, threads: int, slots: int, context: int, speculation: str | None = None
) -> LlamaCpp | None:
    """llama.cpp with the GGUF file of a model; None where the model has none, or the wheel is not installed."""
    from lab.models.gguf.file import gguf_file

    if model.source is not ModelSource.gguf:
        return None
    if find_spec("xllamacpp") is None:
        log.warning("llama.cpp is left out: pip install '.[peers]' brings it")
        return None
    return LlamaCpp(gguf_file(model), threads, slots, context, speculation)


def serve(file: Path, threads: int, slots: int, context: int, port: int, speculation: str | None) -> None:
    """Serve on loopback until standard input is closed; says where on standard output."""
    import xllamacpp

    own = xllamacpp.CommonParams()
    own.model.path, own.port, own.n_parallel, own.n_ctx = str(file), port, slots, slots * context
    own.verbosity = 1  # errors
    own.cpuparams.n_threads = own.cpuparams_batch.n_threads = threads
    if speculation is not None:
        kinds = xllamacpp.common_speculative_type
        own.speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{speculation}")]
    server = xllamacpp.Server(own)
    address = urlsplit(server.listening_address)
    say_ready("listening", "llama_cpp", str(address.hostname), int(address.port or port))
    sys.stdin.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    for name in ("threads", "slots", "context"):
        parser.add_argument(name, type=int)
    parser.add_argument("--port", type=int, default=0, help="0: a free port")
    parser.add_argument("--speculation", help="method by which it drafts from n-grams of its text")
    serve(**vars(parser.parse_args()))
