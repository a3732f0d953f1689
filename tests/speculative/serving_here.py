"""A whole verifier on a thread of this process: real sockets, and an engine that a test can look into."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.base import Engine
from lab.models.sources import load_tokenizer_only
from lab.tracking import Tracker
from lab.wire.endpoint import Endpoint
from lab.wire.frame_socket import FrameSocket
from speculative.messages import make_side
from speculative.settings import SpeculativeSettings
from speculative.verifier.server import ServerStats, serve
from speculative.verifier.target import open_target
from speculative.vocabulary import fingerprint, token_texts

Wrap = Callable[[Engine, asyncio.AbstractEventLoop], Engine]
START_SECONDS = END_SECONDS = 60.0


@dataclass
class Here:
    """A verifier that listens."""

    port: int
    settings: SpeculativeSettings
    engine: Engine
    """As it is without what was wrapped around it."""
    served: ServerStats
    """Whole after the end of the block."""


@contextmanager
def serving_here(*words: str, wrap: Wrap = lambda engine, loop: engine) -> Iterator[Here]:
    """A verifier until the end of the block, which raises what ended it before."""
    settings = compose_settings(
        "spec_decoding", " ".join(("tracking=none", "network.port=0", *words)), SpeculativeSettings
    )
    target = open_target(settings, open_device(settings.device))
    tokenizer = load_tokenizer_only(settings.model)
    here = Here(0, settings, target.engine, ServerStats())
    is_ready = threading.Event()
    faults: list[BaseException] = []
    loop = asyncio.new_event_loop()

    def announce(host: str, port: int) -> None:
        here.port = port
        is_ready.set()

    async def run(tracker: Tracker) -> None:
        shown = replace(target, engine=wrap(target.engine, loop))
        await serve(settings, shown, tokenizer, None, tracker, here.served, announce)

    with tempfile.TemporaryDirectory() as folder, Tracker(settings, "verifier", Path(folder)) as tracker:
        task = loop.create_task(run(tracker))

        def work() -> None:
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                faults.append(error)
            finally:
                is_ready.set()
                loop.close()

        thread = threading.Thread(target=work, name="verifier", daemon=True)
        thread.start()
        assert is_ready.wait(START_SECONDS)
        try:
            if not faults:
                yield here
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
            thread.join(END_SECONDS)
            assert not thread.is_alive()
        if faults:
            raise faults[0]


def client_endpoint(settings: SpeculativeSettings, **fingerprints: str) -> Endpoint:
    """A drafter's side of the wire."""
    endpoint = make_side(settings.network, "drafter", fingerprint(token_texts(load_tokenizer_only(settings.model))))
    return replace(endpoint, fingerprints={**endpoint.fingerprints, **fingerprints})


def connected(port: int, endpoint: Endpoint) -> FrameSocket:
    """A drafter's connection, past its WELCOME; whoever asks for it closes it."""
    frames = FrameSocket.connect("127.0.0.1", port, endpoint, tls=None)
    frames.recv()
    return frames


def first_protocol(prompt: str) -> bytes:
    """A request of the first protocol."""
    text = prompt.encode()
    return len(text).to_bytes(4, "big") + text
