"""A writer over a verifier on another machine: this process drafts, and the verifier's model owns the text."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from typing_extensions import override

from lab.device import read_memory
from lab.engine.base import check_schema
from lab.faults import Fault
from lab.models.fingerprints import changes
from lab.settings import UserError
from lab.text.generation import grammars_of
from serve.models.writer import Counts, Ended, Event, InLine, NewTokens, Place, Receive, Writer
from serve.settings import ServeSettings
from speculative.drafter.loop import RequestCrowded, RequestRefused, Round, speculate
from speculative.drafter.sources import open_drafts
from speculative.drafter.target import RemoteTarget, Ticket, join_verifier
from speculative.drafts import Drafts, NoDrafts
from speculative.request import GenerationRequest
from speculative.settings import Mode
from speculative.verifier.line import in_turn

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Text:
    """A text that waits or runs."""

    key: Hashable
    request: GenerationRequest
    client: Hashable
    user: str
    receive: Receive
    left: threading.Event = field(default_factory=threading.Event)
    """Set when nobody wants it any more."""


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
        self._running: dict[Hashable, _Text] = {}
        """Texts that have a place, until their threads have ended."""
        self._line: list[_Text] = []
        """Those that wait for one, in the order of arrival."""
        self._grammars = grammars_of(settings.model)
        self._lock = threading.Lock()
        self._counts = Counts()
        self._sessions = settings.project.sessions

    @override
    def start(self) -> None:
        return

    @override
    def begin(self, key: Hashable, request: GenerationRequest, client: str, user: str, receive: Receive) -> None:
        text = _Text(key, request, client, user, receive)
        self._line.append(text)
        self._admit()
        if text in self._line:
            receive(InLine(1 + self._in_turn().index(text)))

    def _admit(self) -> None:
        """Give free places."""
        while self._line and len(self._running) < self._sessions:
            text = self._in_turn()[0]
            self._line.remove(text)
            self._running[text.key] = text
            threading.Thread(target=self._write, args=(text,), name="drafter", daemon=True).start()

    def _in_turn(self) -> list[_Text]:
        return in_turn(self._line, self._running.values())

    def _tell(self, text: _Text, event: Event) -> None:
        """Called in the thread of a text."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._call_soon(self._deliver, text, event)

    def _deliver(self, text: _Text, event: Event) -> None:
        if isinstance(event, Ended):
            del self._running[text.key]
            self._admit()
        if not text.left.is_set():
            text.receive(event)

    @override
    def check_schema(self, schema: str) -> None:
        check_schema(self._grammars, schema)

    @override
    def leave(self, key: Hashable) -> None:
        self._line = [text for text in self._line if text.key != key]
        if key in self._running:
            self._running[key].left.set()

    @override
    def counts(self) -> Counts:
        with self._lock:
            return replace(self._counts, running=len(self._running), waiting=len(self._line))

    @override
    def places(self) -> Sequence[Place]:
        network, memory = self._settings.network, read_memory(torch.device("cpu"))
        return [
            Place(role="drafter", name="this server", device="cpu", rss_bytes=memory.rss_bytes),
            Place(role="verifier", name=f"{network.host}:{network.port}", hop_seconds=self._last.rtt_seconds),
        ]

    @override
    def close(self) -> None:
        for text in list(self._running.values()):
            text.left.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for target in idle:
            target.close()
        if not self.finished.done():
            self.finished.set_result(None)

    def _write(self, text: _Text) -> None:
        """Continue one text, in a thread of its own."""
        end = Ended()
        try:
            self._speculate(text)
        except RequestCrowded as crowded:
            end = Ended(str(crowded), is_full=True)
        except RequestRefused as refusal:
            end = Ended(str(refusal), is_refused=True)
        except (Fault, UserError) as fault:
            log.warning("%s", fault)
            end = Ended(str(fault))
        except Exception as error:  # one text must not end the others
            log.exception("a text ends by a fault of ours")
            end = Ended(f"{type(error).__name__}: {error}")
        finally:
            self._tell(text, end)

    def _speculate(self, text: _Text) -> None:
        if text.left.is_set():
            return
        request, drafts = text.request, self._drafts(text.request)
        target = self._target()
        if request.new_ids:
            target.set_next_ticket(Ticket.new(target.welcome.target), again=True)
        try:
            rounds, cached = speculate(target, drafts, request, self.end_ids), 0
            with contextlib.closing(rounds):
                for done in rounds:
                    if text.left.is_set():
                        break
                    cached = done.cached_tokens
                    self._count(done)
                    self._tell(text, NewTokens(done.tokens, done.accepted, done.nll, done.top, cached))
        except BaseException:
            target.close()  # whatever it holds is not for another text
            raise
        finally:
            drafts.close()
        with self._lock:
            self._idle.append(target)
            self._counts.prefix_asked += len(request.prompt_ids)
            self._counts.prefix_found += cached

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
