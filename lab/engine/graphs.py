"""CUDA graphs: a pass over a few rows as one launch instead of one for each kernel.

A graph is recorded when a pass of the same sizes comes for the second time, and replayed ever after. It reads and
writes the memory that it was recorded with: so its inputs are copied into tensors of its own, and all graphs are
forgotten when the cache moves.

Not run on a GPU yet: what a graph computes at first, of other rows, is compared with what the pass itself computes, and
graphs are given up if that differs or if they cannot be recorded.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST_GRAPHS = 64
"""Sizes that are kept; those that were not used for longest go first."""
WARM_UP = 2
"""Passes before one is recorded: by then kernels are loaded, which must not happen meanwhile."""

Pass = Callable[[Sequence[Tensor]], Tensor]
Recorder = Callable[[Pass, Sequence[Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a pass over tensors that stay where they are. Returns what replays it, and its output, which stays, too."""


def cuda_recorder() -> Recorder:
    """The recorder of CUDA, whose graphs share the memory of what they compute on the way."""
    pools: list[Any] = []

    def record(run: Pass, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
        device = inputs[0].device
        before = torch.cuda.current_stream(device)
        with _ONE_AT_A_TIME, torch.cuda.device(device):
            try:
                aside = torch.cuda.Stream(device)
                aside.wait_stream(before)
                with torch.cuda.stream(aside):
                    for _ in range(WARM_UP):
                        run(inputs)
                before.wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                # What other threads of the process do meanwhile is not this graph's.
                pool = pools[0] if pools else None
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    output = run(inputs)
            finally:
                torch.cuda.set_stream(before)  # torch stays on the stream of a recording that fails
        pools[:] = pools or [graph.pool()]
        return graph.replay, output

    return record


_ONE_AT_A_TIME = threading.Lock()
"""torch has one stream for recordings in a process."""


@dataclass(frozen=True)
class _Recorded:
    inputs: list[Tensor]
    replay: Callable[[], None]
    output: Tensor


class Graphs:
    """Recorded passes.

    Args:
        recorder: What records them.
        most: How many sizes are kept.
    """

    def __init__(self, recorder: Recorder, most: int = MOST_GRAPHS) -> None:
        self._record, self._most = recorder, most
        self._recorded: OrderedDict[tuple[torch.Size, ...], _Recorded | None] = OrderedDict()
        """By the shapes of the inputs; None: a pass of them came once."""
        self._places: list[tuple[int, torch.Size]] = []
        self._works = True

    def run(self, compute: Pass, inputs: Sequence[Tensor], memory: Sequence[Tensor]) -> Tensor:
        """The result of a pass.

        Args:
            compute: The pass. Run twice with the same inputs, it leaves `memory` as it is after running once.
            inputs: All that differs from one pass to the next; the first one are rows of numbers.
            memory: All other tensors that it reads or writes and that may move: the cache.
        """
        if not self._works:
            return compute(inputs)
        if (places := [(tensor.data_ptr(), tensor.shape) for tensor in memory]) != self._places:
            self._recorded.clear()
            self._places = places
        sizes = tuple(tensor.shape for tensor in inputs)
        is_first, recorded = sizes not in self._recorded, self._recorded.get(sizes)
        if recorded is not None:
            self._recorded.move_to_end(sizes)
            for held, given in zip(recorded.inputs, inputs, strict=True):
                held.copy_(given)
            recorded.replay()
            return recorded.output.clone()  # the next replay writes over it
        self._recorded[sizes] = None if is_first else self._try(compute, inputs)
        if len(self._recorded) > self._most:
            self._recorded.popitem(last=False)
        return compute(inputs)  # last, and in any case: a trial leaves other rows in the memory

    def _try(self, compute: Pass, inputs: Sequence[Tensor]) -> _Recorded | None:
        """A recording, tried with other rows: what is left of an earlier pass must not pass for its result, neither in
        its output nor in the memory."""
        try:
            held = [tensor.clone() for tensor in inputs]
            replay, output = self._record(compute, held)
            held[0].copy_(inputs[0].roll(1, -1))
            output.fill_(math.nan)
            replay()
            found, expected = output.clone(), compute(held)
            if torch.equal(found, expected):
                return _Recorded(held, replay, output)
            if not bool(expected.isfinite().all()):
                return None  # nothing is equal to NaN: tried again next time
            reason = "the result of one is not that of the pass that it was recorded from"
        except Exception as error:  # whatever CUDA says of a kernel that cannot be recorded
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("passes run without CUDA graphs: %s", reason)
        self._works = False
        self._recorded.clear()
        return None
