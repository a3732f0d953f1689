"""A verifier over the wire, as a drafter's `Target`: one request at a time, over any number of connections."""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from typing_extensions import override

from lab.engine.sampling_head import sampling_fields
from lab.models.fingerprints import changes
from lab.network import client_side_tls
from lab.settings import UserError
from lab.wire.faults import PeerFull, PeerGone, PeerMismatch, PeerSilent, Unreachable, WireError
from lab.wire.frames import Frame
from lab.wire.tokens import pack_tokens
from speculative.drafter.connection import VerifierConnection
from speculative.drafter.loop import Target, TargetLost
from speculative.messages import (
    OWNER_BYTES,
    TABLE,
    TOKENIZER,
    CachedFrame,
    CloseFrame,
    DraftFrame,
    MessageType,
    OpenFrame,
    Reason,
    ResumeFrame,
    ScoresFrame,
    VerdictFrame,
    WaitingFrame,
    WelcomeFrame,
    make_side,
)
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.scores import with_scores
from speculative.settings import DraftSettings, SpeculativeSettings, TargetRoleSettings
from speculative.vocabulary import fingerprint, first_difference

log = logging.getLogger(__name__)

Connect = Callable[[], VerifierConnection]
_LOST = (Unreachable, PeerFull, PeerGone, PeerSilent)
"""Faults after which the drafter tries to connect again, to resume a request."""


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name of a request, the secret that proves its owner (both in hex), and the target where it began."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
    owner: Annotated[str, msgspec.Meta(pattern=rf"^[0-9a-f]{{{2 * OWNER_BYTES}}}\Z")]
    target: dict[str, str]

    @classmethod
    def new(cls, target: dict[str, str]) -> Self:
        """Draw a new ticket."""
        return cls(secrets.token_hex(8), secrets.token_hex(OWNER_BYTES), target)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a ticket file. Raises `ValueError` for any other file."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ValueError(f"must be the text.json of a drafter's run folder, got {path} ({error})") from None

    def write(self, path: Path) -> None:
        """Write it, for a later process that resumes the request; readable by this user only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self))


class RemoteTarget(Target):
    """A context manager: leaving it closes the connection.

    Args:
        connect: Makes a connection; one attempt.
        connect_seconds: How long to try at first, while nobody listens or there is no place for one more.
        resume_seconds: How long to try when a connection was lost; 0: its loss ends the request.
        window: Most draft tokens beyond the last verdict; no more than the verifier gives.
        report: Whether to ask for cross-entropies and margins.
    """

    def __init__(
        self, connect: Connect, *, connect_seconds: float, resume_seconds: float, window: int, report: bool
    ) -> None:
        self._connect = connect
        self._resume_seconds = resume_seconds
        self._window = window
        self._report = report
        self._expects_scores = report
        """Whether SCORES follow each VERDICT of the current request."""
        self._cached_tokens = 0
        self.connection = with_retries(connect, connect_seconds, (Unreachable, PeerFull))
        """Replaced by a new connection when it is lost."""
        self._session = 0
        self._ticket: Ticket | None = None
        self._next_ticket: tuple[Ticket, bool] | None = None
        self._lost: WireError | None = None
        self._bytes_sent = self._bytes_received = 0
        self.ended: Ending | None = None
        """End of the last request; None before the first."""
        self.resumes = 0
        """Number of times that requests were resumed."""
        self._waited_seconds = 0.0
        self._waits_since: float | None = None

    @property
    def welcome(self) -> WelcomeFrame:
        """The verifier's first frame."""
        return self.connection.welcome

    @property
    @override
    def longest_draft(self) -> int:
        return self.welcome.max_draft_length

    @property
    @override
    def window(self) -> int:
        return self._window

    @property
    @override
    def rtt_seconds(self) -> float | None:
        return self.connection.frames.rtt_seconds

    @property
    def waited_seconds(self) -> float:
        """Time that requests have waited in line for room at the verifier."""
        now = time.monotonic()
        return self._waited_seconds + (0.0 if self._waits_since is None else now - self._waits_since)

    @property
    def bytes_sent(self) -> int:
        """All bytes so far, headers, handshakes and heartbeats included."""
        return self._bytes_sent + self.connection.frames.bytes_sent

    @property
    def bytes_received(self) -> int:
        """All bytes so far, as in `bytes_sent`."""
        return self._bytes_received + self.connection.frames.bytes_received

    @override
    def open(self, request: GenerationRequest) -> None:
        assert self._ticket is None, "one request at a time"
        self._ticket, again = self._next_ticket or (Ticket.new(self.welcome.target), False)
        self._next_ticket = None
        with contextlib.suppress(TargetLost):  # `next` raises it, too
            self._begin(request, self._ticket, again=again)

    def set_next_ticket(self, ticket: Ticket, *, again: bool) -> None:
        """Give the next request this ticket; `again`: another process has opened the request."""
        self._next_ticket = ticket, again

    @override
    def resume(self, request: GenerationRequest) -> None:
        assert self._ticket is not None, "no request is open"
        lost, self._lost = self._lost, None
        if lost is not None:
            self._connect_again(lost)
        self.resumes += 1
        with contextlib.suppress(TargetLost):
            self._begin(request, self._ticket, again=True)

    @override
    def draft(self, epoch: int, position: int, draft_ids: Sequence[int]) -> None:
        state = f"epoch {epoch}, position {position}"
        self._send(MessageType.draft, DraftFrame(epoch=epoch, position=position), draft_ids, state)

    @override
    def has_news(self) -> bool:
        return self._lost is not None or self.connection.has_news()

    @override
    def next(self) -> Outcome:
        if self._lost is not None:
            raise TargetLost
        try:
            return self._read()
        except (PeerGone, PeerSilent) as error:
            raise self._lose(error) from None

    @override
    def leave(self) -> None:
        if self._ticket is None:
            return
        self._ticket = self._lost = None
        try:
            self.connection.send(MessageType.close, self._session, CloseFrame(reason=Reason.left, text=""))
        except WireError:  # the verifier notices by itself
            return

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, request: GenerationRequest, ticket: Ticket, *, again: bool) -> None:
        self._session += 1
        fields: dict[str, Any] = {
            **sampling_fields(request.sampling),
            "name": int(ticket.name, 16),
            "owner": bytes.fromhex(ticket.owner),
            "max_new_tokens": request.max_new_tokens,
            "mode": request.mode,
            "draft_length": request.draft_length,
            "threshold": request.threshold,
            "report": self._report,
            "logprobs": request.logprobs,
        }
        self._expects_scores = self._report or request.logprobs
        self._cached_tokens = 0
        if again:
            head = ResumeFrame(**fields, new_tokens=len(request.new_ids), target=ticket.target)
            self._send(MessageType.resume, head, request.ids)
        else:
            self._send(MessageType.open, OpenFrame(**fields), request.prompt_ids)

    def _send(self, number: MessageType, head: OpenFrame | DraftFrame, ids: Sequence[int], state: str = "") -> None:
        try:
            self.connection.send(number, self._session, head, pack_tokens(ids), state=state)
        except (PeerGone, PeerSilent) as error:
            raise self._lose(error) from None

    def _lose(self, error: WireError) -> TargetLost:
        self._lost = error
        return TargetLost(str(error))

    def _connect_again(self, lost: WireError) -> None:
        if self._resume_seconds <= 0:
            raise lost
        log.warning("%s; trying for %g s to resume the request", lost, self._resume_seconds)
        began = time.monotonic()
        self._replace_connection(lost)
        log.warning("connected again after %.1f s", time.monotonic() - began)

    def _replace_connection(self, lost: WireError) -> None:
        old = self.connection
        old.close()
        try:
            self.connection = with_retries(self._connect, self._resume_seconds, _LOST)
        except _LOST as error:
            what = f"{lost.what}, and was not there again within {self._resume_seconds:g} s: it {error.what}"
            raise PeerGone(old.frames.peer, what) from None
        self._bytes_sent += old.frames.bytes_sent
        self._bytes_received += old.frames.bytes_received
        if self.welcome != old.welcome:
            changed = changes(old.welcome.target, self.welcome.target) or "its limits for a request have changed"
            raise PeerMismatch(self.connection.frames.peer, f"is another target than before: {changed}")

    def _read(self) -> Outcome:
        frame = self._next_frame()
        if isinstance(frame.head, WaitingFrame):
            return self._wait_in_line(frame.head.place)
        self._leave_line()
        if isinstance(frame.head, CachedFrame):
            self._cached_tokens = frame.head.tokens
            frame = self._next_frame()
        if isinstance(frame.head, CloseFrame):
            head = frame.head
            self.ended = Ending(self._session, head.reason, head.text, head.step_seconds, head.row_seconds)
            return self.ended
        head = frame.head
        if not isinstance(head, VerdictFrame):
            raise self.connection.bad(f"sent {TABLE.name(frame.type)} where VERDICT was expected")
        ids = self.connection.ids(frame)
        bare = Verdict(self._session, head.epoch, head.position, head.accepted, ids, head.prefix, [], [])
        verdict = replace(bare, cached_tokens=self._cached_tokens)
        return self._with_scores(verdict) if self._expects_scores else verdict

    def _wait_in_line(self, place: int) -> Waiting:
        if self._waits_since is None:
            self._waits_since = time.monotonic()
        log.info("the verifier has no room for this request now: it waits, place %d in line", place)
        return Waiting(self._session, place)

    def _leave_line(self) -> None:
        if self._waits_since is not None:
            self._waited_seconds = self.waited_seconds
            self._waits_since = None
            log.info("the request has its room after %.1f s", self._waited_seconds)

    def _next_frame(self) -> Frame:
        """The next frame of this request; those of earlier ones are dropped. A request in line waits as long as the
        connection lives, since the verifier has already replied."""
        while True:
            frame = self.connection.wait(patiently=self._waits_since is not None)
            if frame.session == self._session:
                return frame

    def _with_scores(self, verdict: Verdict) -> Verdict:
        frame = self._next_frame()
        if not isinstance(frame.head, ScoresFrame):
            raise self.connection.bad("sent no SCORES where they were expected")
        try:
            return with_scores(verdict, frame.head, frame.body)
        except ValueError as error:
            raise self.connection.bad(f"sent SCORES whose {error}") from None


def join(settings: SpeculativeSettings, token_texts: Sequence[str]) -> RemoteTarget:
    """Connect a drafter to the verifier at `network.host` and `network.port`: `join_verifier`."""
    return join_verifier(settings, token_texts, report=settings.project.report or settings.project.check)


def join_verifier(settings: TargetRoleSettings, token_texts: Sequence[str], *, report: bool) -> RemoteTarget:
    """Connect to the verifier at `network.host` and `network.port`.

    Args:
        settings: The drafter's.
        token_texts: Text of each id of its tokenizer.
        report: Whether to ask for cross-entropies and margins.

    Raises:
        WireError: nothing listens there, another key, ...
        UserError: another tokenizer, with the first id that differs; a draft length that this verifier does not take.
    """
    network, ours = settings.network, fingerprint(token_texts)
    endpoint = make_side(network, "drafter", ours)
    tls = client_side_tls(network)

    def connect() -> VerifierConnection:
        seconds = network.request_timeout_seconds
        return VerifierConnection(network.host, network.port, endpoint, tls, request_seconds=seconds)

    target = RemoteTarget(
        connect,
        connect_seconds=network.connect_timeout_seconds,
        resume_seconds=settings.project.resume_seconds,
        window=settings.project.draft.window,
        report=report,
    )
    try:
        if target.connection.fingerprints.get(TOKENIZER) != ours:
            difference = first_difference(token_texts, target.connection.vocabulary())
            raise UserError(f"model {settings.model.name} must have the verifier's tokenizer: {difference}")
        _check_credit(settings.project.draft, target.welcome)
    except BaseException:
        target.close()
        raise
    return target


def _check_credit(draft: DraftSettings, welcome: WelcomeFrame) -> None:
    for name, wanted, most, theirs in (
        ("length", draft.fixed_length, welcome.max_draft_length, "project.max_draft_length"),
        ("window", draft.window, welcome.window, "project.draft.window"),
    ):
        if wanted > most:
            raise UserError(
                f"project.draft.{name} must be in [1, {most}] for this verifier (its {theirs}), got {wanted}"
            )


def with_retries(connect: Connect, seconds: float, faults: tuple[type[WireError], ...]) -> VerifierConnection:
    """Connect, trying again after these `faults` until `seconds` have passed.

    Raises:
        WireError: the last of them, with the time and the number of attempts; any other fault at once.
    """
    began, attempts, is_told = time.monotonic(), 0, False
    while True:
        attempts += 1
        try:
            return connect()
        except faults as error:
            waited = time.monotonic() - began
            if waited >= seconds:
                error.what += f"; gave up after {waited:.1f} s, attempt {attempts}"
                error.args = (f"{error.role} {error.address} {error.what}",)
                raise
            if isinstance(error, PeerFull) and not is_told:
                is_told = True
                log.warning("%s; waiting for one to end, %g s at most", error, seconds)
        time.sleep(min(0.05 * attempts, 0.25))
