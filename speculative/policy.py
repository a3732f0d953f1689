"""How far to guess ahead, and whether to wait for guesses: decisions that follow what was measured.

The verifier asks its `Pacing` before every pass of a text, the drafter its `DraftLength` before every DRAFT. Both keep
a short memory of acceptance and times and take the best `Plan` of `speculative.theory` for them; where the target alone
is as fast, that plan is not to speculate at all. Guesses that arrive all the same are compared with the text for
nothing, so that a verifier notices when they begin to pay; a drafter that gave up tries again later.

Knows no clock, no socket and no thread: whoever measures a time hands it in. Seconds, of one monotonic clock a side.
"""

from __future__ import annotations

from speculative.theory import ALONE, Pace, Plan, Speeds, best_plan, survival

FORGET = 0.98
"""Weight of what was known when something new is: a memory of about 50 observations."""
FORGET_PLACE = 0.97
PLACES = 16
"""Acceptance is told apart by so many places of an epoch; what lies behind is one."""
BELIEF = 8.0
"""Observations that a place needs to weigh as much as all places together."""
ROW_SHARE = 0.02
"""Cost of a further row as a share of the step, until passes of several sizes were seen."""
ROW_BELIEF = 4.0
"""Weight of that, in rows squared."""
LEAST_GAIN = 1.01
"""Speculation pays from this multiple of the target's own speed."""
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
PLAN_EVERY = 24
"""Compared guesses between two plans, at most: a third of all while they are few."""
LONGEST_EPOCH = 64
"""Tokens of an epoch that a plan looks at."""
GROUP_SHARE = 0.3
"""Part of a pass, or of the round trip if that is shorter, for which guesses are gathered before they go."""
LARGEST_GROUP = 16
HOPELESS = 0.03
"""A guess that is right with less than this probability is not worth its bytes."""
PAUSES = (32, 64, 128, 256, 512)
"""Tokens for which a drafter that does not pay stays silent, the first time, the second, ..."""
PROBE = 24
"""Guesses that must have been compared before a drafter gives up, again."""


class Mean:
    """A mean that forgets; None before the first reading."""

    def __init__(self, forget: float = 0.8) -> None:
        self._forget = forget
        self._sum = self._weight = 0.0

    def add(self, reading: float) -> None:
        """One more."""
        self._sum = self._forget * self._sum + reading
        self._weight = self._forget * self._weight + 1

    @property
    def value(self) -> float | None:
        """The mean."""
        return self._sum / self._weight if self._weight else None


class PassCosts:
    """What a pass of the target costs each of the texts that share it: a step, and each further guess.

    A pass over a single row may be another matter than one over several (a vector times a matrix needs no tiles), so
    that the first guess can cost far more than the next ones: a mean is kept of the one, a line through the others.

    A row that one text adds holds up all the others, and they do the same: so a guess costs its row once for each text.
    """

    def __init__(self) -> None:
        self._texts = Mean()
        self._single = Mean(FORGET)
        self._weight = self._rows = self._seconds = self._rows_squared = self._rows_seconds = 0.0

    def passed(self, seconds: float, rows: int, texts: int) -> None:
        """A pass over so many rows, of so many texts together, took so long."""
        self._texts.add(texts)
        if self._single.value is not None if rows == 1 else self._weight >= 1:
            seconds = min(seconds, 4 * self.pass_seconds(rows))  # the machine held it up: that says little of the next
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
        """Whether there was a pass."""
        return self._weight > 0 or self._single.value is not None

    @property
    def row_seconds(self) -> float:
        """Of one guess more in every text."""
        return (self._texts.value or 1.0) * self._slope

    @property
    def first_seconds(self) -> float:
        """What the first guess costs beyond that: nothing where several texts make a pass of several rows anyway."""
        single = self._single.value
        if single is None or not self._weight or (self._texts.value or 1.0) >= 1.5:
            return 0.0
        return max(0.0, self._line(1.0) - single)

    @property
    def step_seconds(self) -> float:
        """Of a pass with one row of every text."""
        return self.pass_seconds(self._texts.value or 1.0)

    def pass_seconds(self, rows: float) -> float:
        """Of a pass over so many rows."""
        single = self._single.value
        if single is not None and (rows < 1.5 or not self._weight):
            return single + (rows - 1) * self._slope
        return self._line(rows) if self._weight else 0.0

    def _line(self, rows: float) -> float:
        mean = self._seconds / self._weight
        return max(mean + (rows - self._rows / self._weight) * self._slope, 0.1 * mean)

    @property
    def _slope(self) -> float:
        """Of each further row: least squares, pulled towards `ROW_SHARE` of a step where all passes were alike."""
        if not self._weight:
            return ROW_SHARE * (self._single.value or 0.0)
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_squared - self._rows * mean_rows
        together = self._rows_seconds - self._rows * mean_seconds
        usual = ROW_SHARE * mean_seconds / (1 + ROW_SHARE * (mean_rows - 1))
        return max(0.0, (together + ROW_BELIEF * usual) / (spread + ROW_BELIEF))


class AcceptanceByPlace:
    """How often guesses were right lately, by their place in the epoch: right ones often come in runs."""

    def __init__(self) -> None:
        self._right, self._seen = 1.0, 2.0
        self._right_at, self._seen_at = [0.0] * PLACES, [0.0] * PLACES
        self.place = 0
        """Guesses of this epoch that were right."""
        self.compared = 0
        """Guesses in all."""

    def add(self, right: int, wrong: int) -> None:
        """So many guesses were right, and then so many (0 or 1) wrong, which ends the epoch."""
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
        """Probability that a guess is right when all before it in its epoch were, by place."""
        overall = self._right / self._seen
        return [(r + BELIEF * overall) / (s + BELIEF) for r, s in zip(self._right_at, self._seen_at)]

    def worth(self, most: int, costs: PassCosts) -> int:
        """How many of so many guesses a pass should take: guess n saves a step when all up to it are right, and costs a
        row when it is not."""
        step, row, rates = costs.step_seconds, costs.row_seconds, self.rates
        chance, gain, best, count = 1.0, -costs.first_seconds, 0.0, 0
        for number in range(most):
            chance *= rates[min(self.place + number, PLACES - 1)]
            gain += chance * step - row
            if gain >= best:
                best, count = gain, number + 1
        return count

    def doubt(self) -> None:
        """Hold on to what was seen less firmly."""
        self._right, self._seen = 0.1 * self._right, 0.1 * self._seen
        self._right_at = [0.1 * right for right in self._right_at]
        self._seen_at = [0.1 * seen for seen in self._seen_at]


class Pacing:
    """When the next pass of a text begins and how many guesses it takes: the verifier's policy, one for each text.

    Args:
        costs: Of the target's passes; whoever runs them adds to it.
        draft_length: Guesses of a pass at most; None: what pays best.
        longest: The verifier's own limit.
    """

    def __init__(self, costs: PassCosts, draft_length: int | None, longest: int) -> None:
        self._costs = costs
        self._longest = longest
        self._is_free = draft_length is None
        self._lengths = [n for n in LENGTHS if n <= longest] if draft_length is None else [min(draft_length, longest)]
        self.acceptance = AcceptanceByPlace()
        self.plan = Plan(self._lengths[-1], 0)
        self._planned_at = 0
        self._answer, self._spacing = Mean(), Mean()
        self._rejected_at: float | None = None
        self._answered_at: float | None = None
        self._arrived_at = 0.0
        self._guesses = 0
        """That arrived in this epoch."""
        self._has_more = True

    def rejected(self, now: float) -> None:
        """A verdict that ends the epoch goes off: guesses of the next one are awaited."""
        self._note_spacing()
        self._rejected_at, self._answered_at, self._guesses, self._has_more = now, None, 0, True

    def arrived(self, now: float, count: int) -> None:
        """A DRAFT of this epoch came, with so many guesses; none: the drafter has nothing to say for now."""
        self._has_more = count > 0
        if not count:
            return
        if self._answered_at is None:
            self._answered_at = now
            if self._rejected_at is not None:
                self._answer.add(now - self._rejected_at)
            self._guesses = 0  # the first frame only starts the clock
        else:
            self._guesses += count
        self._arrived_at = now
        if self._guesses >= PLACES:
            self._note_spacing()

    def compared(self, right: int, wrong: int) -> None:
        """So many guesses, in order, were what the target says; and then so many (0 or 1) were not."""
        self.acceptance.add(right, wrong)
        if self.acceptance.compared - self._planned_at >= min(PLAN_EVERY, self.acceptance.compared / 3):
            self._make_plan()

    def rows(self, waiting: int) -> int:
        """How many of the guesses that wait the next pass takes."""
        most = min(waiting, self.plan.draft_length)
        return self.acceptance.worth(most, self._costs) if self._is_free and self._costs.known else most

    def patience(self, now: float, waiting: int) -> float:
        """Seconds to wait for more guesses before the next pass; 0: go. Never longer than a pass."""
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
        if self._answered_at is not None and self._guesses:
            self._spacing.add((self._arrived_at - self._answered_at) / self._guesses)
            self._answered_at, self._guesses = self._arrived_at, 0


class DraftLength:
    """How many guesses go into the next DRAFT: the drafter's policy, one for each text.

    Over a distance guesses go in groups, since at the verifier they wait for the next pass; the first of an epoch go
    sooner, and near by, where the verifier may wait, each goes alone. What is hardly ever reached is not guessed.

    Args:
        draft_length: Guesses of a DRAFT at most; None: what pays best, which may be none.
        window: The verifier's credit: guesses under way at most.
    """

    def __init__(self, draft_length: int | None, window: int) -> None:
        self.rtt_seconds: float | None = None
        """Whoever measures it sets it."""
        self._draft_length = draft_length
        self._window = window
        self.acceptance = AcceptanceByPlace()
        self._draft_step = Mean()
        self._pass = Mean()
        self._reach = self._worth_making()
        self._verdict_at: float | None = None
        self._silent_for = 0
        """New tokens until the next try."""
        self._pauses = 0
        self._tried_at = 0

    def drafted(self, count: int, seconds: float) -> None:
        """So many guesses took so long."""
        if count:
            self._draft_step.add(seconds / count)

    def verdict(self, now: float, right: int, wrong: int, tokens: int) -> None:
        """A VERDICT came: so many of our guesses were right, then so many (0 or 1) wrong; the text has more tokens."""
        if self._verdict_at is not None:
            self._pass.add(now - self._verdict_at)
        self._verdict_at = now
        self.acceptance.add(right, wrong)
        self._reach = self._worth_making()
        if self._silent_for:
            self._silent_for = max(0, self._silent_for - tokens)
            if not self._silent_for:
                self.acceptance.doubt()
                self._tried_at = self.acceptance.compared
        elif self._draft_length is None and self.acceptance.compared - self._tried_at >= PROBE:
            self._judge()

    def next(self, ahead: int) -> int:
        """Guesses for the next DRAFT when so many are under way beyond the last verdict; 0: wait for the next one."""
        if self._silent_for:
            return 0
        group = self._group if ahead else max(1, self._group // 3)
        return max(0, min(group, self._draft_length or group, self._reach - ahead))

    @property
    def silent(self) -> bool:
        """Whether speculation does not pay at the moment."""
        return self._silent_for > 0

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
        """How far ahead of the verified text a guess is still reached often enough."""
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
    """The best plan; the target alone where the best gains next to nothing and 0 is one of the lengths."""
    plan, speed = best_plan(survival(rates, LONGEST_EPOCH), pace, lengths)
    if 0 in lengths and speed * pace.step_seconds < LEAST_GAIN:
        return ALONE
    return plan
