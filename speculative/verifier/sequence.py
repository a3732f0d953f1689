"""One sequence at the verifier: the token ids of a request, and the draft tokens that wait to be checked.

A sequence always holds one token that the target has not seen yet, its last. A forward pass feeds that token and some
draft tokens after it, and the target chooses a token after each of them. The longest prefix of the draft tokens that
equals these choices is accepted, and the next choice is appended. So the text is the target's own, whatever the drafts;
a wrong draft token costs a rewind, which is an assignment.

Draft tokens have positions, and wait until a pass takes them or the sequence has grown past them; when an epoch ends is
defined in `speculative.messages`. Knows nothing about tokenizers, networks or threads, and reads no clock.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lab.engine.base import Session, TargetStep
from speculative.acceptance import accepted_length, common_length, prefix_hash, until_end
from speculative.messages import Reason
from speculative.policy import Pacing
from speculative.request import Ending, GenerationRequest, Verdict
from speculative.settings import Mode
from speculative.verifier.lookup import Lookup


@dataclass
class DraftCounts:
    """Counts of draft tokens and passes, of one sequence or of all that a verifier has served."""

    passes: int = 0
    """Passes of each sequence: a pass over three sequences counts three times."""
    drafts_checked: int = 0
    """Draft tokens that were compared with the text: the right ones, and the first wrong one of each epoch."""
    drafts_right: int = 0
    drafts_accepted: int = 0
    """Right draft tokens that arrived in time."""
    lookups_checked: int = 0
    """Draft tokens of the verifier's own prompt lookup."""
    lookups_accepted: int = 0
    resumes: int = 0

    @property
    def alpha(self) -> float | None:
        """Acceptance; None before the first draft token was checked."""
        return self.drafts_right / self.drafts_checked if self.drafts_checked else None


@dataclass
class SequenceFigures(DraftCounts):
    """Figures of one sequence so far."""

    drafts_stale: int = 0
    """DRAFT frames of an epoch that had ended."""
    cached_tokens: int = 0
    """Tokens of the prompt that were taken from a kept session when it last got room."""
    waited_seconds: float = 0.0
    """Time spent waiting in line for room in the engine."""
    draft_nll: list[float] = field(default_factory=list)
    least_margin: float | None = None

    def row(self) -> dict[str, Any]:
        """All figures, by their names in metrics."""
        row = vars(self).copy()
        row["guess_cross_entropy"] = [round(value, 4) for value in row.pop("draft_nll")]
        return row


class VerifiedSequence:
    """One sequence, from its OPEN to its end.

    One request has six identities, each with its own scope:

        session   a connection    number in the header of each frame; the drafter counts its requests
        key       a verifier      a new one with each OPEN or RESUME; names the sequence to the scheduler, in outcomes
        client    a verifier      the connection, or the address; limits are counted by it
        user      a client        a name that the client gives; clients of an HTTP server do
        name      everywhere      64 random bits of OPEN; how RESUME finds the sequence, on whatever connection
        owner     everywhere      128 random bits of OPEN, secret: proves that RESUME comes from the sender of OPEN

    Args:
        request: Its request.
        window: Most draft tokens that may wait.
        pacing: When a pass begins and how many draft tokens it takes (mode async).
        lookup: Draft tokens of the verifier's own, for when there are no others or too few; None: none.
        key, client, user, name, owner: As above; without a name it ends with its connection.
    """

    def __init__(
        self,
        key: Hashable,
        request: GenerationRequest,
        *,
        window: int,
        pacing: Pacing,
        lookup: Lookup | None,
        client: Hashable,
        user: str,
        name: int | None,
        owner: bytes,
    ) -> None:
        self.key, self.client, self.user, self.name, self.owner = key, client, user, name, owner
        self.request = request
        self.ids = request.ids
        self.epoch = 0
        self.figures = SequenceFigures()
        # For the scheduler
        self.is_left = False
        """Whether its connection has ended; it is kept for a while in case it is resumed."""
        self.ended: Ending | None = None
        self.heard_at = 0.0
        """When its client last sent or was sent something."""
        self.queued_at = 0.0
        """When it began to wait for room."""
        self.place = 0
        """The last place in line that was reported to its client; 0: none."""
        self._session: Session | None = None
        """None while it waits for room in the engine, and after its end."""
        self._prefix = prefix_hash(self.ids)
        self._window, self._pacing, self._lookup = window, pacing, lookup
        self._waiting: list[int] = []
        """Draft tokens for the positions from `position` on."""
        self._expected = len(self.ids)
        """Position of the next draft token: no DRAFT of this epoch is for one before it."""
        self._has_draft = False
        """Whether a DRAFT arrived since the last pass (mode sync)."""
        self._checks_lookup = False
        """Whether the current pass checks draft tokens of `lookup`."""
        self._skips_drafts = False
        """Whether the next pass checks no draft tokens, because one of them spoilt the last pass."""
        self._verdict_at = -math.inf
        """When the last VERDICT was sent."""
        if lookup is not None:
            lookup.begin(self.ids)

    @property
    def session(self) -> Session:
        """Its session in the engine."""
        assert self._session is not None, "the sequence has no room in the engine"
        return self._session

    def enter(self, session: Session) -> None:
        """Take a session of the engine, which it owns from now on: an empty one, or one with the first tokens of its
        prompt."""
        self._session = session
        self.figures.cached_tokens = session.position

    def hand_over(self) -> Session | None:
        """Its session, if there is one, which it owns no longer."""
        session, self._session = self._session, None
        return session

    def release(self) -> None:
        """Close the session, if there is one, and with it what the engine holds."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def skip_drafts(self) -> None:
        """Make the next token without draft tokens."""
        self._skips_drafts = True

    @property
    def is_kept(self) -> bool:
        """Whether it is only kept in case it is resumed."""
        return self.is_left or self.ended is not None

    @property
    def longest(self) -> int:
        """Number of tokens at its full length."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def position(self) -> int:
        """Position of the next new token."""
        return len(self.ids)

    @property
    def new_tokens(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def remaining(self) -> int:
        """Number of new tokens still to come, at most."""
        return self.request.max_new_tokens - self.new_tokens

    def offer(self, epoch: int, position: int, draft_ids: Sequence[int], now: float) -> None:
        """Take the draft tokens of a DRAFT that arrived at `now`. Those of an older epoch are dropped; those for
        positions decided in the meantime are compared with the text.

        Raises:
            ValueError: the sequence has no place for them; the two sides differ on what it is.
        """
        if epoch < self.epoch:
            self.figures.drafts_stale += 1
            return
        latest = max(self._expected, self.position)
        if epoch > self.epoch or not (position == self._expected or self._expected < position <= latest):
            raise ValueError(
                f"draft must be for epoch {self.epoch}, position {self._expected} (or up to {latest}), got epoch "
                f"{epoch}, position {position}"
            )
        self._has_draft = True
        self._expected = position + len(draft_ids)
        self._pacing.on_draft(now, len(draft_ids))
        decided = self.ids[position:]
        right = common_length(decided, draft_ids)
        is_wrong = right < min(len(decided), len(draft_ids))
        self._count(right, is_wrong)
        if is_wrong:  # the next VERDICT tells the drafter
            self._begin_epoch(position + right + 1, max(now, self._verdict_at))
            return
        self._waiting += draft_ids[right:]
        if len(self._waiting) > self._window:
            raise ValueError(
                f"draft tokens that wait must be at most the window of {self._window}, got {len(self._waiting)}"
            )

    @property
    def unseen(self) -> list[int]:
        """Tokens that the engine has not been fed yet."""
        return self.ids[self.session.position :]

    def prompt_piece(self, longest: int) -> list[int]:
        """The next piece of a prompt that the engine has not been fed completely; empty if only draft tokens are left.

        A sequence that waits for draft tokens keeps its last token for the pass that checks them.
        """
        behind = self.position - self.session.position
        if behind == 1:
            return []
        return self.unseen[: min(longest, behind - 1)] if self.request.mode is Mode.sync else self.unseen[:longest]

    @property
    def is_ready(self) -> bool:
        """Whether a pass may continue it."""
        return self.request.mode is not Mode.sync or self._has_draft

    def patience(self, now: float) -> float:
        """Seconds to wait for draft tokens before the next pass."""
        if self.request.mode is Mode["async"] and self.remaining > 1:
            return self._pacing.patience(now, len(self._waiting))
        return 0.0 if self.is_ready else math.inf

    def next_draft(self, most: int) -> list[int]:
        """Draft tokens for the next pass: at most `most` of the waiting ones, or those of `lookup` if it has more."""
        is_async = self.request.mode is Mode["async"]
        most = 0 if self._skips_drafts else min(most, self.remaining - 1)
        count = min(most, len(self._waiting))
        drafted = self._waiting[: self._pacing.rows(count) if is_async else count]
        found = self._lookup.propose(most) if self._lookup and is_async else []
        self._checks_lookup = len(found) > len(drafted)
        if not self._checks_lookup:
            return drafted
        self.figures.lookups_checked += len(found)
        return found

    def judge(self, draft_ids: Sequence[int], step: TargetStep, end_ids: frozenset[int], now: float) -> Verdict:
        """Extend the sequence by the result of a pass over its last token and `draft_ids`."""
        self._verdict_at, self._skips_drafts = now, False
        rows = len(draft_ids) + 1
        chosen, margins = step.next_ids[-rows:], step.margin[-rows:]
        nll = step.nll[-len(draft_ids) :] if draft_ids else []
        accepted = accepted_length(draft_ids, chosen, nll, self.request.threshold)
        new = until_end([*draft_ids[:accepted], chosen[accepted]], end_ids)
        # An accepted token need not be the target's choice (rule cross_entropy): its own number is that of its row.
        own_nll = [*nll[:accepted], step.next_nll[-rows:][accepted]]
        self.session.position = min(self.session.position, self.position + accepted)
        if self._checks_lookup:
            self.figures.lookups_accepted += min(accepted, len(new))
            nll = []
        verdict = self._extend(new, nll[: len(new)], margins[: len(new)], now)
        if not self.request.logprobs:
            return verdict
        return replace(verdict, nll=own_nll[: len(new)], top=step.top[-rows:][: len(new)])

    def verdict_since(self, position: int) -> Verdict:
        """All tokens from `position` on, for a drafter that resumes there; both sides begin at epoch 0."""
        self.epoch, self._waiting, self._expected, self._has_draft = 0, [], position, False
        self.figures.resumes += 1
        return self._verdict(position, 0, self.ids[position:], [], [])

    def end(self, end_ids: frozenset[int]) -> Ending | None:
        """The end of the sequence, if it has been reached."""
        if self.new_tokens and self.ids[-1] in end_ids:
            return Ending(self.key, Reason.end_token, "")
        return Ending(self.key, Reason.length, "") if self.remaining <= 0 else None

    def _extend(self, new: list[int], draft_nll: list[float], margins: list[float], now: float) -> Verdict:
        """Append `new`; draft tokens for these positions are used up, and the first wrong one ends the epoch."""
        position = self.position
        self.ids += new
        self._prefix = prefix_hash(new, self._prefix)
        if self._lookup is not None:
            self._lookup.extend(position, new)
        right = common_length(self._waiting, new)
        is_wrong = right < min(len(self._waiting), len(new))
        self._count(right, is_wrong)
        if is_wrong:
            self._begin_epoch(position + right + 1, now)
        else:
            del self._waiting[:right]
        self._has_draft = False
        figures = self.figures
        figures.passes += 1
        figures.drafts_accepted += right
        figures.draft_nll += draft_nll
        known = [] if figures.least_margin is None else [figures.least_margin]
        figures.least_margin = min([*known, *margins])
        return self._verdict(position, right, new[right:], draft_nll, margins)

    def _verdict(
        self, position: int, accepted: int, ids: list[int], draft_nll: list[float], margins: list[float]
    ) -> Verdict:
        prefix, cached = self._prefix_to_send, self.figures.cached_tokens
        return Verdict(self.key, self.epoch, position, accepted, ids, prefix, draft_nll, margins, cached_tokens=cached)

    @property
    def _prefix_to_send(self) -> int | None:
        """None in mode sync: there a DRAFT answers each VERDICT, and its position serves the same purpose in a third of
        the bytes."""
        return None if self.request.mode is Mode.sync else self._prefix

    def _count(self, right: int, is_wrong: bool) -> None:
        self.figures.drafts_right += right
        self.figures.drafts_checked += right + is_wrong
        if right or is_wrong:
            self._pacing.on_compared(right, int(is_wrong))

    def _begin_epoch(self, expected: int, now: float) -> None:
        self._pacing.on_rejection(now)
        self.epoch += 1
        self._waiting = []
        self._expected = expected
