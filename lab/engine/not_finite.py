"""The fault of a model that gives NaN or infinity. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.faults import Fault

if TYPE_CHECKING:
    from lab.engine.base import TargetStep


class NotFinite(Fault):
    """Some sessions of an `extend` met NaN or infinity and can only be closed; the others have advanced.

    The message names the first of them, with the part of the model and the position.
    """

    def __init__(self, steps: Sequence[TargetStep]) -> None:
        super().__init__(next(step.fault for step in steps if step.fault))
        self.steps = list(steps)
        """One step for every request, in order; a step with a `fault` holds nothing else."""
