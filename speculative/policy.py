"""Policies of draft length and waiting: decisions based on measured times and acceptance.

The verifier asks its `Pacing` before every pass of a sequence, the drafter its `DraftLength` before every DRAFT. Both
have a short memory of acceptance and times, and take the best `Plan` of `speculative.theory` for them; if the target
alone is as fast, that plan is not to speculate. The verifier still compares arriving draft tokens with the text, to
notice when they begin to pay off; a drafter that gave up tries again later.

Knows no clock, no socket and no thread: every time is an argument, in seconds of each side's own monotonic clock.
"""

from speculative.theory import ALONE, Pace, Plan, Speeds, best_plan, survival

FORGET = 0.98
"""Factor on the weight of older observations when one is added: a memory of about 50 observations."""
FORGET_PLACE = 0.97
PLACES = 16
"""Positions in an epoch whose acceptance is measured separately; all later ones count as the last of them."""
BELIEF = 8.0
"""Number of observations at which a position weighs as much as all positions together."""
ROW_SHARE = 0.02
"""Assumed time of a further row as a share of the step, until passes of several sizes were measured."""
ROW_BELIEF = 4.0
"""Weight of that assumption, in rows squared."""
LEAST_GAIN = 1.01
"""Speculation pays off from this multiple of the target's own speed."""
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
PLAN_EVERY = 24
"""Most draft tokens that are compared between two plans; a third of all while they are few."""
LONGEST_EPOCH = 64
"""Longest epoch that a plan considers, in tokens."""
GROUP_SHARE = 0.3
"""Share of a pass, or of a shorter round trip, for which draft tokens are collected before they are sent."""
LARGEST_GROUP = 16
HOPELESS = 0.03
"""Probability of being right below which a draft token is not worth its bytes."""
PAUSES = (32, 64, 128, 256, 512)
"""New tokens for which a drafter that does not pay off stays silent: the first time, the second, ..."""
PROBE = 24
"""Draft tokens that must have been compared before a drafter gives up, each time."""


class Mean:
    """A mean with exponentially decaying weights; None before the first reading."""

    def __init__(self, forget: float = 0.8) -> None:
        self._forget = forget
        self._sum = self._weight = 0.0

    def add(self, reading: float) -> None:
        """Add a reading."""
        self._sum = self._forget * self._sum + reading
        self._weight = self._forget * self._weight + 1

    @property
    def value(self) -> float | None:
        """The mean."""
        return self._sum / self._weight if self._weight else None


class PassCosts:
    """Seconds of the target's passes, as each of the sequences that share them sees them: per step and draft token.

    A pass over a single row may differ from one over several (a vector times a matrix needs no tiles), so the first
    draft token can cost far more than the next ones: passes of one row have a mean, all others a fitted line.

    A row of one sequence delays all others, and theirs delay it: so a draft token costs its row once for each
    sequence.
    """

    def __init__(self) -> None:
        self._sequences = Mean()
        self._single = Mean(FORGET)
        self._weight = self._rows = self._seconds = self._rows_squared = self._rows_seconds = 0.0

    def add(self, seconds: float, rows: int, sequences: int) -> None:
        """Add a pass over `rows` rows of `sequences` sequences."""
        self._sequences.add(sequences)
        if self._single.value is not None if rows == 1 else self._weight >= 1:
            seconds = min(seconds, 4 * self.pass_seconds(rows))  # an outlier says little about the next pass
        if rows == 1:
            self._single.add(seconds)
            return
        self._weight = FORGET * self._weight + 1
        self._rows = FORGET * self._rows + rows
        self._seconds = FORGET * self._seconds + seconds
        self._rows_squared = FORGET * self._rows_squared + rows * rows
        self._rows_seconds = FORGET * self._rows_seconds + rows * seconds

    @property
    def known(self) -> bool:
        """Whether a pass was measured."""
        return self._weight > 0 or self._single.value is not None

    @property
    def row_seconds(self) -> float:
        """Seconds for one more draft token in every sequence."""
        return (self._sequences.value or 1.0) * self._slope

    @property
    def first_seconds(self) -> float:
        """Extra seconds of the first draft token; 0 if several sequences make a pass of several rows anyway."""
        single = self._single.value
        if single is None or not self._weight or (self._sequences.value or 1.0) >= 1.5:
            return 0.0
        return max(0.0, self._line(1.0) - single)

    @property
    def step_seconds(self) -> float:
        """Seconds of a pass with one row of every sequence."""
        return self.pass_seconds(self._sequences.value or 1.0)

    def pass_seconds(self, rows: float) -> float:
        """Seconds of a pass over `rows` rows."""
        single = self._single.value
        if single is not None and (rows < 1.5 or not self._weight):
            return single + (rows - 1) * self._slope
        return self._line(rows) if self._weight else 0.0

    def _line(self, rows: float) -> float:
        mean = self._seconds / self._weight
        return max(mean + (rows - self._rows / self._weight) * self._slope, 0.1 * mean)

    @property
    def _slope(self) -> float:
        """Seconds of each further row: least squares, near `ROW_SHARE` of a step if all passes had equal sizes."""
        if not self._weight:
            return ROW_SHARE * (self._single.value or 0.0)
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_squared - self._rows * mean_rows
        together = self._rows_seconds - self._rows * mean_seconds
        usual = ROW_SHARE * mean_seconds / (1 + ROW_SHARE * (mean_rows - 1))
        return max(0.0, (together + ROW_BELIEF * usual) / (spread + ROW_BELIEF))


class AcceptanceByPosition:
    """Recent acceptance of draft tokens by position in the epoch: right ones often come in runs."""

    def __init__(self) -> None:
        self._right, self._seen = 1.0, 2.0
        self._right_at, self._seen_at = [0.0] * PLACES, [0.0] * PLACES
        self.place = 0
        """Right draft tokens of this epoch so far: the position of the next one."""
        self.compared = 0
        """Number of all draft tokens."""

    def add(self, right: int, wrong: int) -> None:
        """Record `right` correct draft tokens followed by `wrong` (0 or 1) incorrect ones, which end the epoch."""
        for hit in [1] * right + [0] * wrong:
            place = min(self.place, PLACES - 1)
            self._right = FORGET * self._right + hit
            self._seen = FORGET * self._seen + 1
            self._right_at[place] = FORGET_PLACE * self._right_at[place] + hit
            self._seen_at[place] = FORGET_PLACE * self._seen_at[place] + 1
            self.place = self.place + 1 if hit else 0
        self.compared += right + wrong

    @property
    def rates(self) -> list[float]:
        """Probability that a draft token is right if all before it in its epoch were, by position."""
        overall = self._right / self._seen
        return [(r + BELIEF * overall) / (s + BELIEF) for r, s in zip(self._right_at, self._seen_at)]

    def worth(self, most: int, costs: PassCosts) -> int:
        """Number of draft tokens, of `most` available ones, that a pass should take: the n-th saves a step if all up to
        it are right, and costs a row if not."""
        step, row, rates = costs.step_seconds, costs.row_seconds, self.rates
        chance, gain, best, count = 1.0, -costs.first_seconds, 0.0, 0
        for number in range(most):
            chance *= rates[min(self.place + number, PLACES - 1)]
            gain += chance * step - row
            if gain >= best:
                best, count = gain, number + 1
        return count

    def discount(self) -> None:
        """Reduce the weight of all observations so far to a tenth."""
        self._right, self._seen = 0.1 * self._right, 0.1 * self._seen
        self._right_at = [0.1 * right for right in self._right_at]
        self._seen_at = [0.1 * seen for seen in self._seen_at]


class Pacing:
    """The verifier's policy: when the next pass of a sequence begins, and how many draft tokens it takes.

    Args:
        costs: Measured passes of the target; the scheduler adds to them.
        draft_length: Most draft tokens of a pass; None: what pays best.
        longest: The verifier's own limit.
    """

    def __init__(self, costs: PassCosts, draft_length: int | None, longest: int) -> None:
        self._costs = costs
        self._longest = longest
        self._is_free = draft_length is None
        self._lengths = [n for n in LENGTHS if n <= longest] if draft_length is None else [min(draft_length, longest)]
        self.acceptance = AcceptanceByPosition()
        self.plan = Plan(self._lengths[-1], 0)
        self._planned_at = 0
        self._answer, self._spacing = Mean(), Mean()
        self._rejected_at: float | None = None
        self._answered_at: float | None = None
        self._arrived_at = 0.0
        self._arrivals = 0
        """Draft tokens that have arrived since the clock was started."""
        self._has_more = True

    def on_rejection(self, now: float) -> None:
        """A verdict that ends the epoch was sent; draft tokens of the next epoch are awaited."""
        self._note_spacing()
        self._rejected_at, self._answered_at, self._arrivals, self._has_more = now, None, 0, True

    def on_draft(self, now: float, count: int) -> None:
        """A DRAFT of this epoch arrived with `count` draft tokens; 0: the drafter has none for now."""
        self._has_more = count > 0
        if not count:
            return
        if self._answered_at is None:
            self._answered_at = now
            if self._rejected_at is not None:
                self._answer.add(now - self._rejected_at)
            self._arrivals = 0  # the first frame only starts the clock
        else:
            self._arrivals += count
        self._arrived_at = now
        if self._arrivals >= PLACES:
            self._note_spacing()

    def on_compared(self, right: int, wrong: int) -> None:
        """`right` draft tokens equalled the target's choices; after them `wrong` (0 or 1) did not."""
        self.acceptance.add(right, wrong)
        if self.acceptance.compared - self._planned_at >= min(PLAN_EVERY, self.acceptance.compared / 3):
            self._make_plan()

    def rows(self, waiting: int) -> int:
        """Number of draft tokens, of `waiting` available ones, that the next pass takes."""
        most = min(waiting, self.plan.draft_length)
        return self.acceptance.worth(most, self._costs) if self._is_free and self._costs.known else most

    def patience(self, now: float, waiting: int) -> float:
        """Seconds to wait for more draft tokens before the next pass; 0: start it. Never longer than a pass."""
        missing = self.plan.wait_for - waiting
        answer, spacing = self._answer.value, self._spacing.value or 0.0
        if missing <= 0 or not self._has_more or answer is None or self._rejected_at is None:
            return 0.0
        if self._answered_at is None:
            due = self._rejected_at + answer + (missing - 1) * spacing
        else:
            due = self._arrived_at + missing * spacing
        slack = max(2 * spacing, 0.25 * answer)
        return min(max(0.0, due + slack - now), self._costs.step_seconds)

    def _make_plan(self) -> None:
        answer, costs = self._answer.value, self._costs
        self._planned_at = self.acceptance.compared
        if answer is None or not costs.step_seconds:
            return
        pace = Pace(
            step_seconds=costs.step_seconds,
            row_seconds=costs.row_seconds,
            first_seconds=costs.first_seconds,
            answer_seconds=answer,
            draft_step_seconds=self._spacing.value or 0.0,
        )
        self.plan = _paying_plan(self.acceptance.rates, pace, self._lengths)

    def _note_spacing(self) -> None:
        if self._answered_at is not None and self._arrivals:
            self._spacing.add((self._arrived_at - self._answered_at) / self._arrivals)
            self._answered_at, self._arrivals = self._arrived_at, 0


class DraftLength:
    """The drafter's policy: the number of draft tokens in the next DRAFT, for one request.

    Over a distance draft tokens are sent in groups, since they wait at the verifier for the next pass; the first of an
    epoch are sent sooner. Near by, where the verifier may wait, each is sent alone. Tokens that are hardly ever reached
    are not drafted.

    Args:
        draft_length: Most draft tokens of a DRAFT; None: what pays best, which may be none.
        window: The verifier's credit: most draft tokens beyond the last verdict.
    """

    def __init__(self, draft_length: int | None, window: int) -> None:
        self.rtt_seconds: float | None = None
        """Round-trip time, set by the drafter's loop when measured."""
        self._draft_length = draft_length
        self._window = window
        self.acceptance = AcceptanceByPosition()
        self._draft_step = Mean()
        self._pass = Mean()
        self._reach = self._worth_making()
        self._verdict_at: float | None = None
        self._silent_for = 0
        """New tokens until the next attempt."""
        self._pauses = 0
        self._tried_at = 0

    def on_drafted(self, count: int, seconds: float) -> None:
        """`count` draft tokens were made in `seconds`."""
        if count:
            self._draft_step.add(seconds / count)

    def on_verdict(self, now: float, right: int, wrong: int, tokens: int) -> None:
        """A VERDICT of `tokens` new tokens arrived: `right` draft tokens equalled them, `wrong` (0 or 1) did not."""
        if self._verdict_at is not None:
            self._pass.add(now - self._verdict_at)
        self._verdict_at = now
        self.acceptance.add(right, wrong)
        self._reach = self._worth_making()
        if self._silent_for:
            self._silent_for = max(0, self._silent_for - tokens)
            if not self._silent_for:
                self.acceptance.discount()
                self._tried_at = self.acceptance.compared
        elif self._draft_length is None and self.acceptance.compared - self._tried_at >= PROBE:
            self._judge()

    def next(self, ahead: int) -> int:
        """Draft tokens of the next DRAFT when `ahead` were sent beyond the last verdict; 0: wait for a verdict."""
        if self._silent_for:
            return 0
        group = self._group if ahead else max(1, self._group // 3)
        return max(0, min(group, self._draft_length or group, self._reach - ahead))

    @property
    def _group(self) -> int:
        step, draft_step = self._pass.value, self._draft_step.value
        if step is None or draft_step is None or self.rtt_seconds is None:
            return 1
        gathering = GROUP_SHARE * min(step, self.rtt_seconds)
        if gathering >= LARGEST_GROUP * draft_step:
            return LARGEST_GROUP
        return max(1, int(gathering / draft_step))

    def _worth_making(self) -> int:
        """Most draft tokens beyond the verified text that are still reached often enough."""
        rates, place = self.acceptance.rates, self.acceptance.place
        chance, count = 1.0, 0
        while count < self._window and chance >= HOPELESS:
            chance *= rates[min(place + count, PLACES - 1)]
            count += 1
        return max(count, 1)

    def _judge(self) -> None:
        self._tried_at = self.acceptance.compared
        step, draft_step = self._pass.value, self._draft_step.value
        if self.rtt_seconds is None or step is None or draft_step is None:
            return
        speeds = Speeds(
            step_seconds=step,
            row_seconds=ROW_SHARE * step,
            draft_step_seconds=draft_step,
            rtt_seconds=self.rtt_seconds,
        )
        lengths = [length for length in LENGTHS if length <= self._window]
        if _paying_plan(self.acceptance.rates, speeds.pace(), lengths) == ALONE:
            self._silent_for = PAUSES[min(self._pauses, len(PAUSES) - 1)]
            self._pauses += 1
        else:
            self._pauses = 0


def _paying_plan(rates: list[float], pace: Pace, lengths: list[int]) -> Plan:
    """The best plan; the target alone if the best gains almost nothing and 0 is one of the lengths."""
    plan, speed = best_plan(survival(rates, LONGEST_EPOCH), pace, lengths)
    if 0 in lengths and speed * pace.step_seconds < LEAST_GAIN:
        return ALONE
    return plan
