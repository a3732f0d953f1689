"""One text at the verifier: its ids, what the engine has seen of them, and the guesses that wait to be checked.

A text always holds one token that the target has not seen yet, its last. A pass feeds that token and some guesses
behind it, and the target says what it puts after each of them: the longest prefix of the guesses that equals what the
target says is accepted, and what it says next comes behind it. So the text is the target's own, whoever guesses; a
wrong guess costs a rewind, which is an assignment.

Guesses belong to places, and wait until a pass takes them or the text has grown over them; when an epoch ends is told
in `speculative.messages`. Knows nothing about tokenizers, networks or threads, and is told the time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lab.engine.base import Session, TargetStep
from speculative.acceptance import accepted_length, common_length, prefix_hash, until_end
from speculative.messages import Reason
from speculative.policy import Pacing
from speculative.request import Ended, GenerationRequest, Verdict
from speculative.settings import Mode
from speculative.verifier.lookup import Lookup


@dataclass
class SequenceFigures:
    """What happened to one text so far."""

    passes: int = 0
    checked: int = 0
    """Guesses of the drafter that were compared with the text: the right ones, and the first of each epoch that was
    not."""
    right: int = 0
    accepted: int = 0
    """Right ones that were there when the target said the same."""
    stale_drafts: int = 0
    """DRAFT frames of an epoch that was over."""
    looked_up: int = 0
    """Guesses of the verifier's own that were checked."""
    found: int = 0
    """Those that were accepted."""
    resumes: int = 0
    waited_seconds: float = 0.0
    """In line for room in the engine."""
    guess_nll: list[float] = field(default_factory=list)
    least_margin: float = float("inf")


class VerifiedSequence:
    """One text, from its OPEN to its end.

    Args:
        key: Names it in every outcome.
        request: What was asked for.
        window: Most guesses that may wait.
        pacing: When a pass begins and how many guesses it takes (mode async).
        lookup: The verifier's own guesses, for when there are no others, or fewer that are worth it; None: none.
    """

    def __init__(
        self, key: Hashable, request: GenerationRequest, *, window: int, pacing: Pacing, lookup: Lookup | None
    ) -> None:
        self.key = key
        self.request = request
        self._session: Session | None = None
        """None while it waits for room in the engine, and when it has ended."""
        self.ids = [*request.prompt_ids, *request.new_ids]
        self._prefix = prefix_hash(self.ids)
        self.epoch = 0
        self.figures = SequenceFigures()
        self._window = window
        self._pacing = pacing
        self._lookup = lookup
        self._guesses: list[int] = []
        """For the places from `position` on."""
        self._expected = len(self.ids)
        """No guess of this epoch is for a place before it; of those that came it is the end."""
        self._asked = False
        """Whether a DRAFT came since the last pass (mode sync)."""
        self._checks_own = False
        """Whether the pass under way is over our own guesses."""
        self._is_alone = False
        """Whether the next pass checks no guesses: one of them has spoilt the last."""
        self._judged_at = -math.inf
        """When the last VERDICT went off."""
        if lookup is not None:
            lookup.begin(self.ids)

    @property
    def session(self) -> Session:
        """What the engine holds of it."""
        assert self._session is not None, "the text has no room in the engine"
        return self._session

    def enter(self, session: Session) -> None:
        """There is room in the engine: `session` is its own now, and empty."""
        self._session = session

    def go_alone(self) -> None:
        """Make the next token without guesses."""
        self._is_alone = True

    def leave(self) -> None:
        """Give the room back, if it has some; what the engine held is forgotten."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def longest(self) -> int:
        """Tokens of the whole text, if it becomes as long as it may."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def position(self) -> int:
        """Where the next new token will stand."""
        return len(self.ids)

    @property
    def new_tokens(self) -> int:
        """How many tokens there are behind the prompt."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def remaining(self) -> int:
        """New tokens that may still come."""
        return self.request.max_new_tokens - self.new_tokens

    def offer(self, epoch: int, position: int, guesses: Sequence[int], now: float) -> None:
        """Take guesses. Those of an older epoch are dropped; those that are too late are compared with the text.

        `now` is when they arrived.

        Raises:
            ValueError: guesses that the text as it stands has no place for; the two sides differ on what it is.
        """
        if epoch < self.epoch:
            self.figures.stale_drafts += 1
            return
        latest = max(self._expected, self.position)
        if epoch > self.epoch or not (position == self._expected or self._expected < position <= latest):
            raise ValueError(
                f"draft must be for epoch {self.epoch}, position {self._expected} (or up to {latest}), got epoch "
                f"{epoch}, position {position}"
            )
        self._asked = True
        self._expected = position + len(guesses)
        self._pacing.arrived(now, len(guesses))
        decided = self.ids[position:]
        right = common_length(decided, guesses)
        if right < min(len(decided), len(guesses)):
            self._compared(right, wrong=True)
            self._begin_epoch(position + right + 1, max(now, self._judged_at))  # the drafter hears of it by the VERDICT
            return
        self._compared(right, wrong=False)
        self._guesses += guesses[right:]
        if len(self._guesses) > self._window:
            raise ValueError(
                f"guesses that wait must be at most the window of {self._window}, got {len(self._guesses)}"
            )

    @property
    def unseen(self) -> list[int]:
        """The tokens that the engine has not been fed."""
        return self.ids[self.session.position :]

    def prompt_piece(self, longest: int) -> list[int]:
        """What to feed of a prompt that is not through yet; empty when only guesses and their verdict are due.

        A text that waits for guesses keeps its last token for the pass that checks them.
        """
        behind = self.position - self.session.position
        if behind == 1:
            return []
        return self.unseen[: min(longest, behind - 1)] if self.request.mode is Mode.sync else self.unseen[:longest]

    @property
    def is_ready(self) -> bool:
        """Whether a pass may go on with it."""
        return self.request.mode is not Mode.sync or self._asked

    def patience(self, now: float) -> float:
        """Seconds to wait for guesses before the next pass."""
        if self.request.mode is Mode["async"] and self.remaining > 1:
            return self._pacing.patience(now, len(self._guesses))
        return 0.0 if self.is_ready else math.inf

    def guesses(self, most: int) -> list[int]:
        """What to check in the next pass: at most `most` of the guesses that wait, or our own where they are more."""
        most = 0 if self._is_alone else min(most, self.remaining - 1)
        drafted = self._guesses[: self._worth(most)]
        found = self._lookup.guesses(most) if self._lookup and self.request.mode is Mode["async"] else []
        self._checks_own = len(found) > len(drafted)
        if not self._checks_own:
            return drafted
        self.figures.looked_up += len(found)
        return found

    def judge(self, guesses: Sequence[int], step: TargetStep, end_ids: frozenset[int], now: float) -> Verdict:
        """Take what the target says about the last token and the guesses behind it; go on by what is accepted."""
        self._judged_at, self._is_alone = now, False
        rows = len(guesses) + 1
        chosen, margins, nll = step.next_ids[-rows:], step.margin[-rows:], step.nll[-len(guesses) :] if guesses else []
        accepted = accepted_length(guesses, chosen, nll, self.request.threshold)
        new = until_end([*guesses[:accepted], chosen[accepted]], end_ids)
        self.session.position = min(self.session.position, self.position + accepted)
        looked_at = [] if self._checks_own else nll[: min(len(new), len(guesses))]
        if self._checks_own:
            self.figures.found += min(accepted, len(new))
        return self._grow(new, looked_at, margins[: len(new)], now)

    def told(self, position: int) -> Verdict:
        """All that came from `position` on, for a drafter that takes the text up again there; both begin anew."""
        self.epoch, self._guesses, self._expected, self._asked = 0, [], position, False
        self.figures.resumes += 1
        return Verdict(self.key, 0, position, 0, self.ids[position:], self._told_prefix, [], [])

    def ended(self, end_ids: frozenset[int]) -> Ended | None:
        """Why the text ends here, if it does."""
        if self.new_tokens and self.ids[-1] in end_ids:
            return Ended(self.key, Reason.end_token, "")
        return Ended(self.key, Reason.length, "") if self.remaining <= 0 else None

    def _worth(self, most: int) -> int:
        count = min(most, len(self._guesses))
        return min(most, self._pacing.rows(count)) if self.request.mode is Mode["async"] else count

    def _grow(self, new: list[int], guess_nll: list[float], margins: list[float], now: float) -> Verdict:
        """The text goes on with `new`; guesses for these places are used up, and the first wrong one ends the epoch."""
        position = self.position
        self.ids += new
        self._prefix = prefix_hash(new, self._prefix)
        if self._lookup is not None:
            self._lookup.grow(position, new)
        right = common_length(self._guesses, new)
        wrong = right < min(len(self._guesses), len(new))
        self._compared(right, wrong=wrong)
        if wrong:
            self._begin_epoch(position + right + 1, now)
        else:
            del self._guesses[:right]
        self._asked = False
        figures = self.figures
        figures.passes += 1
        figures.accepted += right
        figures.guess_nll += guess_nll
        figures.least_margin = min([figures.least_margin, *margins])
        return Verdict(self.key, self.epoch, position, right, new[right:], self._told_prefix, guess_nll, margins)

    @property
    def _told_prefix(self) -> int | None:
        """In mode sync a DRAFT answers each VERDICT, and its place says as much in a third of the bytes."""
        return None if self.request.mode is Mode.sync else self._prefix

    def _compared(self, right: int, *, wrong: bool) -> None:
        self.figures.right += right
        self.figures.checked += right + wrong
        if right or wrong:
            self._pacing.compared(right, int(wrong))

    def _begin_epoch(self, expected: int, now: float) -> None:
        self._pacing.rejected(now)
        self.epoch += 1
        self._guesses = []
        self._expected = expected
