"""Verifier and drafter with the shipped policies on a virtual clock: what they decide, without a machine's noise.

Every event of the real thing is here - frames with a delay, groups of guesses, rejections found by a pass or by a late
guess - and no time passes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from speculative.policy import DraftLength, Pacing, PassCosts
from speculative.theory import Acceptance, IsRight, Speeds


def drawn(acceptance: Acceptance, seed: int) -> IsRight:
    """Draft tokens that are right with this probability, independently."""
    rates = [acceptance] if isinstance(acceptance, (int, float)) else list(acceptance)
    draws = random.Random(seed)
    return lambda place, in_epoch: draws.random() < rates[min(in_epoch, len(rates) - 1)]


@dataclass
class Virtual:
    """One text. `rate(place in the text)` is the probability that a guess there is right."""

    speeds: Speeds
    rate: Callable[[int], float]
    draft_length: int | None = None
    window: int = 64
    seed: int = 0
    now: float = 0.0
    passes: int = 0
    rows: int = 0
    frames: int = 0
    drafted: int = 0
    accepted: int = 0
    position: int = 0
    costs: PassCosts = field(default_factory=PassCosts)

    def __post_init__(self) -> None:
        self.pacing = Pacing(self.costs, self.draft_length, 16)
        self.drafter = DraftLength(self.draft_length, self.window)
        self.drafter.rtt_seconds = self.speeds.rtt_seconds
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._random = random.Random(self.seed)
        self._epoch = 0
        self._waiting: list[bool] = []
        self._next_place = 0  # of the guesses that waited or were compared, in this epoch
        self._busy = False
        self._wake = 0
        self._drafter_epoch, self._drafter_place, self._known, self._text_end = 0, 0, 0, 0
        self._held: list[bool] = []  # guesses beyond the verified text, as the drafter holds them: right or not
        self._unsent: list[bool] = []
        self._drafting = False

    def run(self, new_tokens: int) -> float:
        """Tokens per second of a text of so many tokens."""
        self._draft()
        self._go()
        while self.position < new_tokens:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return self.position / self.now

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), happen))

    # the verifier

    def _go(self) -> None:
        self._wake += 1
        if self._busy:
            return
        wait = self.pacing.patience(self.now, len(self._waiting))
        if wait > 0:
            wake = self._wake
            self._at(wait, lambda: self._go() if wake == self._wake else None)
            return
        guesses = self._waiting[: self.pacing.rows(len(self._waiting))]
        self._busy = True
        self.passes += 1
        self.rows += len(guesses)
        seconds = self.speeds.pass_seconds(len(guesses))
        self._at(seconds, lambda: self._judge(guesses, seconds))

    def _judge(self, guesses: list[bool], seconds: float) -> None:
        self._busy = False
        self.costs.add(seconds, len(guesses) + 1, 1)
        right = guesses.index(False) if False in guesses else len(guesses)
        self.accepted += right
        self.position += right + 1
        waiting = self._waiting[len(guesses) :]
        hits, misses = right, int(right < len(guesses))
        if not misses and waiting:  # what waits next is compared with the target's own token
            hits, misses = hits + waiting[0], int(not waiting[0])
            waiting = waiting[1:]
        self._next_place = max(self._next_place, self.position)
        self._compare(hits, misses)
        self._waiting = [] if misses else waiting
        self._send_verdict()
        self._go()

    def _compare(self, right: int, wrong: int) -> None:
        self.pacing.on_compared(right, wrong)
        if wrong:
            self._epoch += 1
            self.pacing.on_rejection(self.now)

    def _receive(self, epoch: int, place: int, guesses: list[bool]) -> None:
        if epoch < self._epoch:
            return
        self.pacing.on_draft(self.now, len(guesses))
        late = guesses[: max(0, self.position - place)]
        wrong = int(False in late)
        self._compare(late.index(False) if wrong else len(late), wrong)
        if not wrong:
            self._waiting += guesses[len(late) :]
        self._go()

    def _send_verdict(self) -> None:
        position = self.position
        self._at(self.speeds.rtt_seconds / 2, lambda: self._hear(position))

    # the drafter

    def _hear(self, position: int) -> None:
        tokens = position - self._known
        overlap = self._held[: min(tokens, len(self._held) - len(self._unsent))]
        wrong = int(False in overlap)
        right = overlap.index(False) if wrong else len(overlap)
        self._known = position
        if len(self._held) < tokens or False in self._held[:tokens]:
            self._held, self._unsent = [], []
            self._drafter_epoch += wrong
        else:
            self._held = self._held[tokens:]
            self._unsent = self._unsent[max(0, len(self._unsent) - len(self._held)) :]
        self.drafter.on_verdict(self.now, right, wrong, tokens)
        self._draft()

    def _draft(self) -> None:
        if self._drafting:
            return
        wanted = self.drafter.next(len(self._held) - len(self._unsent))
        if len(self._unsent) >= max(wanted, 1):
            self._send_draft()
            self._draft()
        elif wanted:
            self._drafting = True
            began = (self._drafter_epoch, self._known, len(self._held))
            self._at(self.speeds.draft_step_seconds, lambda: self._made(began))

    def _made(self, began: tuple[int, int, int]) -> None:
        self._drafting = False
        self.drafted += 1
        self.drafter.on_drafted(1, self.speeds.draft_step_seconds)
        epoch, known, held = began
        still_fits = epoch == self._drafter_epoch and len(self._held) == held - (self._known - known)
        if still_fits:
            place = self._known + len(self._held)
            right = self._random.random() < self.rate(place)
            self._held.append(right)
            self._unsent.append(right)
        self._draft()

    def _send_draft(self) -> None:
        guesses, self._unsent = self._unsent, []
        place = self._known + len(self._held) - len(guesses)
        epoch = self._drafter_epoch
        self.frames += 1
        self._at(self.speeds.rtt_seconds / 2, lambda: self._receive(epoch, place, guesses))
