"""llama.cpp's own HTTP server in a process (the wheel xllamacpp), until its standard input is closed.

python -m serve.bench.llama_cpp FILE.gguf PORT THREADS SLOTS CONTEXT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def serve(file: Path, port: int, threads: int, slots: int, context: int) -> None:
    """Serve a GGUF file on loopback; `context` is that of one slot."""
    import xllamacpp

    own = xllamacpp.CommonParams()
    own.model.path, own.port, own.n_parallel, own.n_ctx = str(file), port, slots, slots * context
    own.cpuparams.n_threads = own.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(own)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    for name in ("port", "threads", "slots", "context"):
        parser.add_argument(name, type=int)
    serve(**vars(parser.parse_args()))
