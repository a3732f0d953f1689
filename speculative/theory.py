"""Theory of speculation: the speed to expect from measured figures.

Notation: S(n) the probability that the first n draft tokens of an epoch are all right (a^n if each is right with
probability a, independently), k draft tokens per pass, t_T the target's pass over one token, c the cost of each further
row of a pass, t_D the drafter's step, R the round-trip time. The target alone streams a token every t_T, for any R.

Synchronous. A round yields the draft tokens before the first wrong one, then one of the target's own tokens:
E(k) = S(0) + S(1) + ... + S(k) tokens, which is (1 - a^(k+1)) / (1 - a) (Leviathan et al., arXiv 2211.17192,
equation 1). Nothing overlaps: drafting, sending, the check and the reply take k t_D + (t_T + c k) + R.

Asynchronous. The drafter never stops, and the verifier decodes by itself when no draft token has arrived (AMUSD, arXiv
2410.17375, over a network). An epoch lasts from one rejection to the next. Whatever the verifier does, it yields the
right draft tokens and the token that corrects the first wrong one, E = S(0) + S(1) + ... tokens: a policy changes only
the time that takes. And that time is known beforehand: the verdict reaches the drafter after R / 2, on average in the
middle of a useless step, and the n-th draft token of the new epoch reaches the verifier

    A(n) = R + t_D / 2 + n t_D

after the verdict. So the i-th pass of an epoch, whatever is right, begins and ends at known times and covers a known
number of tokens; it is needed with probability S(tokens covered before it). With ends e_i and tokens c_i covered,

    E[seconds] = sum over i of (e_i - e_(i-1)) S(c_(i-1)),     tokens per second = E / E[seconds]     (renewal theorem).

A pass takes at most k of the draft tokens that have arrived. It begins as soon as the one before it ends, or once m of
them have arrived (`Plan`). k = 0 is the target alone, and m = k without a delay almost the synchronous loop, so the
best of all plans is never worse than the better of the two. What the formula leaves out (a credit window, a drafter
slower than the target, unequal delays) is in `simulate`, which plays every draft token and every verdict.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Acceptance = float | Sequence[float]
"""Probability that a draft token is right if all before it in its epoch were: one for all, or one by position in the
epoch (the last one for all later positions)."""

LEAST_SURVIVAL = 1e-3
"""Epochs are cut off at a length that they reach with less than this probability."""

LONGEST_WAIT = 6


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The two machines and the network between them, in seconds."""

    step_seconds: float
    """The target's pass over one token."""
    row_seconds: float
    """Each further token of a pass."""
    draft_step_seconds: float
    """The drafter's step for one draft token."""
    rtt_seconds: float

    def pass_seconds(self, draft_tokens: int) -> float:
        """A pass over the last token and its draft tokens."""
        return self.step_seconds + self.row_seconds * draft_tokens

    def pace(self) -> "Pace":
        """These speeds as the verifier sees them."""
        return Pace(
            step_seconds=self.step_seconds,
            row_seconds=self.row_seconds,
            answer_seconds=self.rtt_seconds + 1.5 * self.draft_step_seconds,
            draft_step_seconds=self.draft_step_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Passes and arrivals of draft tokens at the verifier, in seconds."""

    step_seconds: float
    row_seconds: float
    answer_seconds: float
    """Time from a verdict that rejects to the first draft token of the new epoch."""
    draft_step_seconds: float
    """Time from one draft token to the next."""
    first_seconds: float = 0.0
    """Extra cost of a pass with draft tokens, beyond their rows."""

    def arrival(self, count: int) -> float:
        """Time from the verdict before an epoch until `count` of its draft tokens have arrived: A(n)."""
        return self.answer_seconds + (count - 1) * self.draft_step_seconds if count > 0 else 0.0

    def arrived(self, seconds: float, most: int) -> int:
        """Number of draft tokens of an epoch, up to `most`, that have arrived `seconds` after the verdict before it."""
        if seconds < self.answer_seconds:
            return 0
        if self.draft_step_seconds * most <= seconds - self.answer_seconds:
            return most
        return int((seconds - self.answer_seconds) / self.draft_step_seconds + 1e-9) + 1


@dataclass(frozen=True)
class Plan:
    """When a pass begins, and how many draft tokens it checks."""

    draft_length: int
    """Most draft tokens of a pass (k); 0: the target alone."""
    wait_for: int
    """Draft tokens that must have arrived when it begins (m); 0: it begins as soon as the pass before it ends."""


ALONE = Plan(0, 0)


def survival(acceptance: Acceptance, longest: int) -> list[float]:
    """S(0), S(1), ...: at most `longest` of them, and none below `LEAST_SURVIVAL`."""
    rates = [acceptance] if isinstance(acceptance, (int, float)) else list(acceptance) or [0.0]
    chances = [1.0]
    while len(chances) < longest:
        chance = chances[-1] * rates[min(len(chances), len(rates)) - 1]
        if chance < LEAST_SURVIVAL:
            break
        chances.append(chance)
    return chances


def expected_tokens(alpha: float, draft_length: int) -> float:
    """Tokens of a synchronous round, E(k)."""
    if alpha == 1:
        return draft_length + 1.0
    return float((1 - alpha ** (draft_length + 1)) / (1 - alpha))


def sync_round_seconds(draft_length: int, speeds: Speeds) -> float:
    """One round of the synchronous loop."""
    drafting = draft_length * speeds.draft_step_seconds
    return drafting + speeds.pass_seconds(draft_length) + speeds.rtt_seconds


def sync_tokens_per_second(alpha: float, draft_length: int, speeds: Speeds) -> float:
    """Speed of the synchronous loop."""
    return expected_tokens(alpha, draft_length) / sync_round_seconds(draft_length, speeds)


def async_tokens_per_second(chances: Sequence[float], pace: Pace, plan: Plan) -> float:
    """Speed of the asynchronous loop: the renewal formula above, S(n) in `chances`."""
    seconds = end = 0.0
    covered, most = 0, len(chances)
    while covered < most:
        begin = max(end, pace.arrival(covered + plan.wait_for)) if plan.wait_for else end
        there = pace.arrived(begin, covered + plan.draft_length) - covered if plan.draft_length else 0
        drafted = min(max(there, 0), plan.draft_length)
        after = begin + pace.step_seconds + (pace.first_seconds + pace.row_seconds * drafted if drafted else 0.0)
        seconds += (after - end) * chances[covered]
        covered += drafted + 1
        end = after
    return sum(chances) / seconds


def best_plan(chances: Sequence[float], pace: Pace, draft_lengths: Sequence[int]) -> tuple[Plan, float]:
    """The best plan with one of these draft lengths, and its tokens per second.

    Waiting for up to `LONGEST_WAIT` draft tokens is tried if the first one arrives before a pass could have ended.
    """
    longest_wait = LONGEST_WAIT if pace.answer_seconds < pace.step_seconds else 0
    plans = [Plan(length, wait) for length in draft_lengths for wait in range(min(length, longest_wait) + 1)]
    return max(((plan, async_tokens_per_second(chances, pace, plan)) for plan in plans), key=lambda pair: pair[1])


def predicted_async_tokens_per_second(
    acceptance: Acceptance, speeds: Speeds, *, longest: int, draft_length: int | None, new_tokens: int
) -> float:
    """Predicted speed of the asynchronous loop for measured figures.

    Args:
        acceptance: Measured, one for all draft tokens or by their place in the epoch.
        speeds: Measured.
        longest: Most draft tokens of a pass.
        draft_length: None: the best one.
        new_tokens: Length of the text: no epoch is longer.
    """
    lengths = range(longest + 1) if draft_length is None else [min(draft_length, longest)]
    return best_plan(survival(acceptance, new_tokens), speeds.pace(), lengths)[1]


IsRight = Callable[[int, int], bool]
"""Whether a draft token is right if all before it in its epoch were, by position in the text and in the epoch."""


@dataclass(frozen=True)
class SimulatedRun:
    """Counts from `simulate`."""

    tokens_per_second: float
    passes: int
    drafted: int
    """Number of all draft tokens."""
    epochs: int


def simulated_optimum(
    is_right: IsRight, acceptance: Acceptance, speeds: Speeds, *, longest: int, new_tokens: int
) -> SimulatedRun:
    """Simulate the best plan for these figures over one text whose draft tokens are not known beforehand."""
    plan, _ = best_plan(survival(acceptance, new_tokens), speeds.pace(), range(longest + 1))
    runs = (simulate(is_right, speeds, plan, window=window, new_tokens=new_tokens) for window in (16, 64))
    return max(runs, key=lambda run: run.tokens_per_second)


def simulate(
    is_right: IsRight,
    speeds: Speeds,
    plan: Plan,
    *,
    window: int,
    new_tokens: int,
    up_seconds: float | None = None,
) -> SimulatedRun:
    """Play the asynchronous loop, token by token.

    Args:
        is_right: Which draft tokens are right.
        speeds: The two sides' speeds.
        plan: The verifier's.
        window: Most tokens that the drafter is ahead of the last verdict it knows.
        new_tokens: Length of the text.
        up_seconds: The way from the drafter to the verifier; half the round trip unless given.
    """
    up = speeds.rtt_seconds / 2 if up_seconds is None else up_seconds
    down = speeds.rtt_seconds - up
    drafter = _SimulatedDrafter(is_right, speeds.draft_step_seconds, window)
    now, position, passes = 0.0, 0, 0
    while position < new_tokens:
        if plan.wait_for:
            ready = drafter.ready_at(position, plan.wait_for)
            now = max(now, ready + up) if ready is not None else now
        drafter.draft_until(now - up)
        checked = drafter.valid(position, min(plan.draft_length, new_tokens - position - 1), now - up)
        right = drafter.right(position, checked)
        now += speeds.pass_seconds(checked)
        position, passes = position + right + 1, passes + 1
        drafter.verdicts.append((now + down, position))
    return SimulatedRun(position / now, passes, drafter.drafted, drafter.epochs)


@dataclass
class _SimulatedDrafter:
    """Drafts all the time, and restarts when a verdict rejects. Positions count the new tokens of the text."""

    is_right: IsRight
    step_seconds: float
    window: int
    drafted: int = 0
    epochs: int = 1
    _free_at: float = 0.0
    _known: int = 0
    """Number of verified tokens that the drafter knows."""
    _first: int = 0
    """Position where the epoch began."""
    _made_at: list[float] = field(default_factory=list)
    """Time at which each draft token of the epoch was made, from `_first` on."""
    _wrong: float = math.inf
    """Position of the first wrong draft token of the epoch."""
    verdicts: deque[tuple[float, int]] = field(default_factory=deque)
    """Verdicts in transit: arrival time, and length of the text."""

    def draft_until(self, until: float) -> None:
        """Draft until then; a step that would end later is not started."""
        while True:
            if self.verdicts and self.verdicts[0][0] <= self._free_at:
                self._on_verdict(self.verdicts.popleft()[1])
            elif self._first + len(self._made_at) - self._known >= self.window:
                if not self.verdicts or self.verdicts[0][0] > until:
                    return
                self._free_at = self.verdicts[0][0]
            elif self._free_at + self.step_seconds > until:
                return
            else:
                self._draft()

    def ready_at(self, position: int, count: int) -> float | None:
        """Draft until there are `count` draft tokens from `position` on; the time, or None if the window forbids it."""
        while not self._is_live(position) or self._first + len(self._made_at) < position + count:
            before = (self.drafted, len(self.verdicts))
            self.draft_until(self._free_at + self.step_seconds)
            if before == (self.drafted, len(self.verdicts)):
                if not self.verdicts:
                    return None
                self.draft_until(self.verdicts[0][0])
        return self._made_at[position + count - 1 - self._first]

    def valid(self, position: int, most: int, made_by: float) -> int:
        """Number of draft tokens from `position` on that were made by then, in an epoch not rejected yet."""
        if not self._is_live(position):
            return 0
        count = 0
        while count < most and position + count - self._first < len(self._made_at):
            if self._made_at[position + count - self._first] > made_by:
                break
            count += 1
        return count

    def right(self, position: int, count: int) -> int:
        """Number of right ones among the `count` draft tokens from `position` on."""
        return int(min(count, max(0, self._wrong - position)))

    def _is_live(self, position: int) -> bool:
        return self._first <= position <= self._wrong

    def _draft(self) -> None:
        place = len(self._made_at)
        if self._wrong == math.inf and not self.is_right(self._first + place, place):
            self._wrong = self._first + place
        self._free_at += self.step_seconds
        self._made_at.append(self._free_at)
        self.drafted += 1

    def _on_verdict(self, length: int) -> None:
        self._known = length
        rejected = self._wrong < length
        if rejected or self._first + len(self._made_at) < length:
            self.epochs += rejected
            self._first, self._made_at, self._wrong = length, [], math.inf
