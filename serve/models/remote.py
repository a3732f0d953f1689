"""A writer over a verifier on another machine: this process drafts, and the verifier's model owns the text."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from typing_extensions import override

from lab.device import read_memory
from lab.engine.base import check_schema
from lab.faults import Fault
from lab.models.fingerprints import changes
from lab.settings import UserError
from lab.text.generation import grammars_of
from serve.models.writer import Counts, Ended, Event, NewTokens, Place, Receive, Writer
from serve.settings import ServeSettings
from speculative.drafter.loop import RequestRefused, Round, speculate
from speculative.drafter.sources import open_drafts
from speculative.drafter.target import RemoteTarget, Ticket, join_verifier
from speculative.drafts import Drafts, NoDrafts
from speculative.request import GenerationRequest
from speculative.settings import Mode

log = logging.getLogger(__name__)


class RemoteWriter(Writer):
    """One connection to the verifier for each text that runs; connections are kept for later texts.

    Args:
        settings: The server's; `project.verifier` is the address.
        token_texts: Text of each id of the tokenizer.
        call_soon: Runs a function in the event loop's thread (`call_soon_threadsafe`).

    Raises:
        UserError: a verifier with another tokenizer.
        WireError: no verifier there.
    """

    scores_prompts = False

    def __init__(self, settings: ServeSettings, token_texts: list[str], call_soon: Callable[..., object]) -> None:
        verifier = settings.project.verifier
        network = replace(settings.network, host=verifier.host, port=verifier.port, tls_certificate=None)
        self._settings = replace(settings, network=network)
        self._texts, self._call_soon = token_texts, call_soon
        self._idle: list[RemoteTarget] = [join_verifier(self._settings, token_texts, report=False)]
        self._last = self._idle[0]
        """The connection that was taken last, for its round-trip time."""
        self.welcome = self._last.welcome
        self.vocabulary_size, self.context = self.welcome.vocabulary_size, self.welcome.context
        self.end_ids: Sequence[int] = self.welcome.end_ids
        self.fingerprints = dict(self.welcome.target)
        self.finished: Future[None] = Future()
        self._left: dict[Hashable, threading.Event] = {}
        """Texts that run, each with the event that stops it."""
        self._grammars = grammars_of(settings.model)
        self._lock = threading.Lock()
        self._counts = Counts()
        self._places = threading.BoundedSemaphore(settings.project.sessions)

    @override
    def start(self) -> None:
        return

    @override
    def begin(self, key: Hashable, request: GenerationRequest, client: Hashable, receive: Receive) -> None:
        left = self._left[key] = threading.Event()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._call_soon(deliver, event)

        def deliver(event: Event) -> None:
            if not left.is_set():
                receive(event)
            if isinstance(event, Ended):
                self._left.pop(key, None)

        threading.Thread(target=self._write, args=(request, left, tell), name="drafter", daemon=True).start()

    @override
    def check_schema(self, schema: str) -> None:
        check_schema(self._grammars, schema)

    @override
    def leave(self, key: Hashable) -> None:
        left = self._left.pop(key, None)
        if left is not None:
            left.set()

    @override
    def counts(self) -> Counts:
        with self._lock:
            return replace(self._counts, running=len(self._left))

    @override
    def places(self) -> Sequence[Place]:
        network, memory = self._settings.network, read_memory(torch.device("cpu"))
        return [
            Place(role="drafter", name="this server", device="cpu", rss_bytes=memory.rss_bytes),
            Place(role="verifier", name=f"{network.host}:{network.port}", hop_seconds=self._last.rtt_seconds),
        ]

    @override
    def close(self) -> None:
        for left in list(self._left.values()):
            left.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for target in idle:
            target.close()
        if not self.finished.done():
            self.finished.set_result(None)

    def _write(self, request: GenerationRequest, left: threading.Event, tell: Callable[[Event], None]) -> None:
        """Continue one text, in a thread of its own."""
        try:
            with self._places:
                self._speculate(request, left, tell)
        except RequestRefused as refusal:
            tell(Ended(str(refusal), is_refused=True))
        except (Fault, UserError) as fault:
            log.warning("%s", fault)
            tell(Ended(str(fault)))
        except Exception as error:  # one text must not end the others
            log.exception("a text ends by a fault of ours")
            tell(Ended(f"{type(error).__name__}: {error}"))
        else:
            tell(Ended())

    def _speculate(self, request: GenerationRequest, left: threading.Event, tell: Callable[[Event], None]) -> None:
        if left.is_set():
            return
        target = self._target()
        drafts = self._drafts(request)
        if request.new_ids:
            target.set_next_ticket(Ticket.new(target.welcome.target), again=True)
        try:
            rounds = speculate(target, drafts, request, self.end_ids)
            with contextlib.closing(rounds):
                for done in rounds:
                    if left.is_set():
                        break
                    self._count(done)
                    tell(NewTokens(done.tokens, done.accepted, done.nll, done.top, done.cached_tokens))
        except BaseException:
            target.close()  # whatever it holds is not for another text
            raise
        finally:
            drafts.close()
        with self._lock:
            self._idle.append(target)

    def _target(self) -> RemoteTarget:
        """A connection without a text."""
        with self._lock:
            target = self._idle.pop() if self._idle else None
            self._last = target or self._last
        if target is None:  # one whose connection has ended meanwhile connects again by itself
            target = self._last = join_verifier(self._settings, self._texts, report=False)
        if target.welcome.target != self.fingerprints:
            target.close()
            changed = changes(self.fingerprints, target.welcome.target)
            raise Fault(f"the verifier has another target than when this server began: {changed}")
        return target

    def _drafts(self, request: GenerationRequest) -> Drafts:
        if request.mode is Mode.target_only:
            return NoDrafts()
        cpu = torch.device("cpu")  # n-grams need no device
        return open_drafts(self._settings, cpu, request.sampling, self._texts, self.vocabulary_size, self._grammars)

    def _count(self, done: Round) -> None:
        with self._lock:
            self._counts.passes += 1
            self._counts.new_tokens += len(done.tokens)
            self._counts.drafts_checked += done.checked
            self._counts.drafts_accepted += done.right
