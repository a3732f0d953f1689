"""The fault of numbers that are none: NaN or infinity where a model's numbers should be. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.faults import Fault

if TYPE_CHECKING:
    from lab.engine.base import TargetStep


class NotFinite(Fault):
    """Some texts of an `extend` met NaN or infinity. Their sessions are of no use any more, the others have advanced.

    Its text names the first of them: which part of the model, and which position.
    """

    def __init__(self, steps: Sequence[TargetStep]) -> None:
        super().__init__(next(step.fault for step in steps if step.fault))
        self.steps = list(steps)
        """One step for every request, in order; those with a `fault` hold nothing else."""
