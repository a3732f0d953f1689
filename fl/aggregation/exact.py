"""Exact weighted means: the same replies in any order give the same bytes.

Knows nothing about models, messages or Flower: float32 vectors, whole-number weights, and named Python numbers.

Why any order gives the same bytes
    A float sum depends on its order because every addition rounds. Here nothing rounds until the end. For a float32 `x`
    (24 significant bits) and a weight `w <= 2**29`, the product `w * x` is exact in float64. It is cut into four whole
    numbers of fixed units `UNITS` (2**-17, 2**-64, 2**-111, 2**-158; the last is finer than the smallest float32), and
    each whole number is added to an int64. Integer addition is associative and commutative, so the integers are a
    function of the *set* of replies, and the mean is a function of the integers.

    The cut is the old trick of adding a large constant: `t = y + 1.5 * 2**52 * u` has `round(y / u)` in its low bits,
    so the bit pattern of `t`, added as an integer, adds `round(y / u)` plus a constant that `mean` takes off once.
    (Rump, Ogita, Oishi: Accurate floating-point summation, SIAM J. Sci. Comput. 31(1), 2008; Demmel and Nguyen: Fast
    reproducible floating-point summation, ARITH 2013.) Adapters as they are trained fill the first two units only; the
    other two exist just where a value is smaller than about 4.5e-13.

Range
    `1 <= w <= 2**29`, `abs(w * x) <= 2**29`, at most 65,536 replies. Then a whole number is at most 2**46 and a sum at
    most 2**62: an int64 cannot wrap. What lies outside is refused, and the reply alone decides that, never its place in
    the queue (the count is no property of a reply: exceeding it is a `TooManyReplies`, which ends the round).

Error
    `mean` is the exact `sum(w * x) / sum(w)` rounded once to float32, to nearest, ties to even: within half an ulp of
    the result, so within `2**-24 * sum(w * abs(x)) / sum(w)` (plus 2**-150 among the denormals).

Cost
    16 bytes of state per element, whatever the number of replies; ten passes over blocks that stay in the L2 cache.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

MAX_WEIGHT = 2**29
MAX_PRODUCT = 2.0**29
"""Largest `abs(weight * value)` of one element of one reply."""
MAX_REPLIES = 2**16

UNIT_BITS = 47  # from one unit to the next; a remainder is at most half a unit, so at most 2**46 of the next
UNITS = tuple(2.0 ** -(17 + UNIT_BITS * k) for k in range(4))
SHIFTS = tuple(1.5 * 2.0**52 * unit for unit in UNITS)
SHIFT_BITS = tuple(int(np.float64(shift).view(np.int64)) for shift in SHIFTS)
COARSE = 2  # the units that every element has; the finer ones are kept for the few tiles that need them

BLOCK = 65_536
"""Elements: two float64 scratch blocks are 1 MiB, about one L2 cache; 16 Ki is 20 % slower, 96 Ki 5 % faster."""
TILE = 1_024

LARGEST = float(np.finfo(np.float64).max)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class TooManyReplies(RuntimeError):
    """More replies than the integers are guaranteed to hold; ask fewer clients."""


def check_weight(weight: object) -> int:
    """The weight as an int, or ValueError: it must be a whole number (bool is none) in [1, MAX_WEIGHT]."""
    if isinstance(weight, bool) or not isinstance(weight, int):
        raise ValueError(f"weight must be a positive whole number, got {weight!r}")
    if not 1 <= weight <= MAX_WEIGHT:
        raise ValueError(f"weight must be in [1, {MAX_WEIGHT}], got {weight}")
    return weight


class ExactMean:
    """The weighted mean of float32 vectors, folded in one by one and then discarded; see the module for how.

    size: number of elements of each vector. `count` and `total_weight` say what has been folded in.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self.count = 0
        self.total_weight = 0
        self._block = min(BLOCK, -(-size // TILE) * TILE)
        # Both coarse sums of a block lie side by side, so that one block is one stretch of memory.
        self._coarse: Int64 = np.zeros((-(-size // self._block), COARSE, self._block), np.int64)
        self._fine: dict[int, Int64] = {}
        self._product: Float64 = np.empty(self._block, np.float64)
        self._shifted: Float64 = np.empty(self._block, np.float64)
        self._inexact: npt.NDArray[np.bool_] = np.empty(self._block, np.bool_)

    def fold(self, values: Float32, weight: int) -> None:
        """Add one reply: a float32 vector of `size` elements, native byte order, contiguous.

        Raises ValueError and leaves every sum untouched when type, size, weight, finiteness or range are wrong;
        TooManyReplies after MAX_REPLIES.
        """
        weight = check_weight(weight)
        self._check(values, weight)
        if self.count >= MAX_REPLIES:
            raise TooManyReplies(f"an exact mean holds at most {MAX_REPLIES} replies")
        for number, start in enumerate(range(0, self.size, self._block)):
            self._fold_block(number, values[start : start + self._block], float(weight))
        self.count += 1
        self.total_weight += weight

    def mean(self) -> Float32:
        """The correctly rounded weighted mean of the replies, float32; ValueError if there were none."""
        if self.count == 0:
            raise ValueError("mean must be taken of at least 1 reply, got 0")
        result: Float32 = np.empty(self.size, np.float32)
        for number, start in enumerate(range(0, self.size, self._block)):
            width = min(self._block, self.size - start)
            result[start : start + width] = _divide(self._limbs(number, width), self.total_weight)
        return result

    def _check(self, values: Float32, weight: int) -> None:
        if values.dtype != np.float32 or values.shape != (self.size,) or not values.flags.c_contiguous:
            raise ValueError(
                f"values must be a contiguous float32 vector of {self.size}, got {values.dtype} {values.shape}"
            )
        with np.errstate(invalid="ignore"):  # a NaN is checked for below
            high, low = float(values.max()), float(values.min())
        if not (math.isfinite(high) and math.isfinite(low)):
            raise ValueError(f"values must be finite, got a range of [{low}, {high}]")
        if (peak := max(high, -low) * weight) > MAX_PRODUCT:  # exact: 24 + 29 bits
            raise ValueError(f"abs(weight * value) must be at most 2**29, got {peak:g}")

    def _fold_block(self, number: int, values: Float32, weight: float) -> None:
        width = len(values)
        rest, shifted, inexact = self._product[:width], self._shifted[:width], self._inexact[:width]
        np.copyto(rest, values)  # convert, then multiply: twice as fast as a mixed-type multiply
        np.multiply(rest, weight, out=rest)
        for unit, limb in enumerate(self._coarse[number, :, :width]):
            if unit:
                np.subtract(rest, shifted, out=rest)
            np.add(rest, SHIFTS[unit], out=shifted)
            np.add(limb, shifted.view(np.int64), out=limb)  # wraps; the shifts' own bits come off in _limbs
            np.subtract(shifted, SHIFTS[unit], out=shifted)
        np.not_equal(rest, shifted, out=inexact)
        if inexact.any():
            self._fold_fine(number * self._block, rest - shifted, inexact)

    def _fold_fine(self, start: int, rest: Float64, nonzero: npt.NDArray[np.bool_]) -> None:
        for first in np.unique(np.flatnonzero(nonzero) // TILE) * TILE:
            part = rest[first : first + TILE]
            limbs = self._fine.setdefault(start + int(first), np.zeros((len(UNITS) - COARSE, TILE), np.int64))
            for limb, shift, bits in zip(limbs, SHIFTS[COARSE:], SHIFT_BITS[COARSE:]):
                shifted = part + shift
                limb[: len(part)] += shifted.view(np.int64) - bits
                part = part - (shifted - shift)

    def _limbs(self, number: int, width: int) -> Int64:
        """The four sums of a block as digits: [4, width] int64, all but the first in [-2**46, 2**46)."""
        limbs: Int64 = np.zeros((len(UNITS), width), np.int64)
        for unit in range(COARSE):
            offset = np.array(self.count * SHIFT_BITS[unit] % 2**64, np.uint64).view(np.int64)
            np.subtract(self._coarse[number, unit, :width], offset, out=limbs[unit])
        for first in range(0, width, TILE):
            if (fine := self._fine.get(number * self._block + first)) is not None:
                part = limbs[COARSE:, first : first + TILE]
                part += fine[:, : part.shape[1]]
        return _carry(limbs)


def _carry(limbs: Int64) -> Int64:
    """Carry in place, finest unit first, until every digit but the first is in [-2**46, 2**46)."""
    for unit in range(len(UNITS) - 1, 0, -1):
        carry = (limbs[unit] + 2 ** (UNIT_BITS - 1)) >> UNIT_BITS
        limbs[unit] -= carry << UNIT_BITS
        limbs[unit - 1] += carry
    return limbs


def _divide(limbs: Int64, total_weight: int) -> Float32:
    """Carried limbs [4, N] over the total weight, rounded once to float32 [N].

    A float64 quotient is right to about 2**-50, and rounds to the right float32 unless it lies that close to the middle
    of two: there the exact sign of `sum - middle * total_weight` decides.
    """
    total = sum(limbs[unit].astype(np.float64) * UNITS[unit] for unit in range(len(UNITS) - 1, -1, -1))
    quotient: Float64 = total / np.float64(total_weight)
    nearest = quotient.astype(np.float32)
    beyond = np.nextafter(nearest, np.where(quotient > nearest, np.inf, -np.inf).astype(np.float32))
    middle: Float64 = (nearest.astype(np.float64) + beyond.astype(np.float64)) / 2
    close = np.flatnonzero(np.abs(quotient - middle) <= 2.0**-48 * np.abs(middle))
    if len(close):
        side = _side(limbs[:, close], middle[close], total_weight)
        nudged = np.nextafter(middle[close], np.where(side > 0, np.inf, -np.inf))
        nearest[close] = np.where(side == 0, middle[close], nudged).astype(np.float32)
    return nearest


def _side(limbs: Int64, middle: Float64, total_weight: int) -> Int64:
    """The exact sign of `sum - middle * total_weight`, [N] in {-1, 0, 1}; `middle` has at most 25 significant bits."""
    for part in (total_weight >> 23 << 23, total_weight % 2**23):  # 25 + 23 bits: each product is exact in float64
        product = middle * np.float64(part)
        for limb, unit in zip(limbs, UNITS):
            digit = np.rint(product / unit)
            limb -= digit.astype(np.int64)
            product -= digit * unit
    signs = np.sign(_carry(limbs))
    leading = np.argmax(signs != 0, axis=0)
    side: Int64 = np.take_along_axis(signs, leading[None], axis=0)[0]
    return side


class MetricMean:
    """Weighted means of named numbers, exact (fractions) until they are read; any order gives the same floats.

    A name is averaged over the replies that have it: extra figures of one client do no harm.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Fraction, int]] = {}

    @staticmethod
    def check(metrics: Mapping[str, object]) -> dict[str, float]:
        """The metrics as floats, or ValueError naming the first that is not one finite number."""
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
                raise ValueError(f"{name} must be one finite number, got {value!r}")
        return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}

    def fold(self, metrics: Mapping[str, object], weight: int) -> None:
        """Add one reply's numbers; ValueError, and nothing added, when one is not finite or the weight is no weight."""
        weight = check_weight(weight)
        for name, value in self.check(metrics).items():
            total, total_weight = self._sums.get(name, (Fraction(), 0))
            self._sums[name] = (total + weight * Fraction(value), total_weight + weight)

    def means(self) -> dict[str, float]:
        """Weighted mean of every name, correctly rounded, sorted by name."""
        return {name: float(total / weight) for name, (total, weight) in sorted(self._sums.items())}
