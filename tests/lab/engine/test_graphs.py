"""Recorded passes, with a recorder that stands in for CUDA's: it replays over the tensors that it was given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.engine import graphs
from lab.engine.graphs import Graphs, Pass, cuda_recorder


@dataclass
class Recorder:
    """What it did."""

    recorded: int = 0
    replayed: int = 0
    shift: float = 0.0
    """What is added to each result: a recording that is wrong."""
    breaks: bool = False
    """Whether a replay fails when it has written to the memory."""
    is_empty: bool = False
    """Whether nothing was recorded."""
    fault: Exception | None = None

    def __call__(self, run: Pass, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fault is not None:
            raise self.fault
        self.recorded += 1
        output = run(inputs)

        def replay() -> None:
            self.replayed += 1
            if self.breaks:
                run(inputs)
                raise RuntimeError("a launch that failed")
            if not self.is_empty:
                output.copy_(run(inputs) + self.shift)

        return replay, output


def _sum_of(memory: list[Tensor]) -> Pass:
    """Writes its rows into a memory, and returns what is there: as a layer does with a cache."""
    held = memory[0]

    def run(inputs: Sequence[Tensor]) -> Tensor:
        rows, places = inputs
        held[places] = rows
        return rows + held.sum(0)

    return run


def test_a_pass_is_recorded_at_its_second_time_and_replayed_from_the_third() -> None:
    recorder, memory = Recorder(), [torch.zeros(8, 4)]
    found, plain, expected_memory = Graphs(recorder), _sum_of(memory), [torch.zeros(8, 4)]
    oracle = _sum_of(expected_memory)
    for turn in range(6):
        inputs = (torch.full((2, 4), float(turn)), torch.tensor([turn, turn + 1]))
        expected = oracle(inputs)
        result = found.run(plain, inputs, memory)
        assert torch.equal(result, expected)
        assert torch.equal(memory[0], expected_memory[0])
        assert recorder.recorded == min(turn, 1)
        assert recorder.replayed == turn, "the first replay of a recording is a trial"
    kept = found.run(plain, inputs, memory)
    found.run(plain, (torch.zeros(2, 4), torch.tensor([0, 1])), memory)
    assert torch.equal(kept, expected), "a result is not written over by the next one"


def test_a_cache_that_moved_is_not_written_to_where_it_was() -> None:
    recorder, memory = Recorder(), [torch.zeros(8, 4)]
    found, inputs = Graphs(recorder), (torch.ones(2, 4), torch.tensor([0, 1]))
    for _ in range(3):
        found.run(_sum_of(memory), inputs, memory)
    larger = [torch.zeros(16, 4)]
    assert torch.equal(found.run(_sum_of(larger), inputs, larger), _sum_of([torch.zeros(16, 4)])(inputs))
    assert larger[0].sum() == 8
    same_place = [larger[0][:8]]
    found.run(_sum_of(larger), inputs, larger)
    found.run(_sum_of(same_place), inputs, same_place)
    assert recorder.recorded == 2, "the same place in another shape is another cache"
    stale = Graphs(recorder)
    for held in (memory, memory, larger):
        stale.run(_sum_of(held), inputs, [])  # the negative control: nobody says that it moved
    larger[0].zero_()
    stale.run(_sum_of(larger), inputs, [])
    assert larger[0].sum() == 0


def test_a_pass_without_finite_results_says_nothing_about_graphs(caplog: pytest.LogCaptureFixture) -> None:
    recorder, memory = Recorder(), [torch.zeros(8, 4)]
    found, run = Graphs(recorder), _sum_of(memory)
    for value in (1.0, float("nan"), 2.0, 3.0):
        found.run(run, (torch.full((2, 4), value), torch.tensor([0, 1])), memory)
    assert (recorder.recorded, recorder.replayed) == (2, 3), "two trials, and the last pass"
    assert caplog.records == []


def test_few_sizes_are_kept() -> None:
    recorder, memory = Recorder(), [torch.zeros(8, 4)]
    found, run = Graphs(recorder, most=2), _sum_of(memory)
    for count in (1, 1, 2, 2, 1, 3, 3, 2):  # the last was not used for longest
        found.run(run, (torch.ones(count, 4), torch.arange(count)), memory)
    assert recorder.recorded == 3
    replayed = recorder.replayed
    found.run(run, (torch.ones(1, 4), torch.arange(1)), memory)
    assert recorder.replayed == replayed, "it was dropped"


WRONG = "the result of one is not that of the pass that it was recorded from"


@pytest.mark.parametrize(
    ("recorder", "said"),
    [
        (Recorder(fault=RuntimeError("CUDA error: operation not permitted\nwhen capturing")), "not permitted when"),
        (Recorder(shift=1e-6), WRONG),
        (Recorder(is_empty=True), WRONG),
        (Recorder(breaks=True), "RuntimeError: a launch that failed"),
    ],
)
def test_graphs_are_given_up_where_they_fail(recorder: Recorder, said: str, caplog: pytest.LogCaptureFixture) -> None:
    memory = [torch.zeros(8, 4)]
    found, run = Graphs(recorder), _sum_of(memory)
    for turn in range(5):
        inputs = (torch.arange(8.0).view(2, 4) + turn, torch.tensor([turn, turn + 1]))
        oracle = [memory[0].clone()]
        expected = _sum_of(oracle)(inputs)
        assert torch.equal(found.run(run, inputs, memory), expected)
        assert torch.equal(memory[0], oracle[0])
    [line] = [record.message for record in caplog.records]
    assert line.startswith("passes run without CUDA graphs: ")
    assert said in line
    assert recorder.replayed <= 1


def test_cudas_recorder_warms_up_aside_and_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: its calls, in order, against a stand-in for torch.cuda."""
    calls: list[Any] = []
    numbers = itertools.count()

    class Stream:
        def wait_stream(self, other: object) -> None:
            calls.append("wait")

    class Within:
        def __init__(self, name: str, **options: Any) -> None:
            self.name, self.options = name, options

        def __enter__(self) -> None:
            calls.append((f"begin {self.name}", *self.options.values()))

        def __exit__(self, *error: object) -> None:
            calls.append(f"end {self.name}")

    class Graph:
        def __init__(self) -> None:
            self.number = next(numbers)

        def pool(self) -> tuple[int, int]:
            return (self.number, 7)

        def replay(self) -> None:
            calls.append("replay")

    class Cuda:
        Stream = staticmethod(lambda device: Stream())
        current_stream = staticmethod(lambda device: Stream())
        set_stream = staticmethod(lambda stream: calls.append("stream as before"))
        device = staticmethod(lambda device: nullcontext())
        stream = staticmethod(lambda stream: Within("aside"))
        CUDAGraph = Graph
        graph = staticmethod(lambda graph, pool, capture_error_mode: Within("graph", pool=pool))

    monkeypatch.setattr(graphs.torch, "cuda", Cuda)
    record = cuda_recorder()

    def run(inputs: Sequence[Tensor]) -> Tensor:
        calls.append("pass")
        return inputs[0] + 1

    replay, output = record(run, [torch.zeros(2)])
    replay()
    assert output.tolist() == [1.0, 1.0]
    aside = ["wait", ("begin aside",), "pass", "pass", "end aside", "wait"]
    assert calls == [*aside, ("begin graph", None), "pass", "end graph", "stream as before", "replay"]
    calls.clear()
    record(run, [torch.zeros(2)])
    assert ("begin graph", (0, 7)) in calls, "the memory of the first"
    calls.clear()

    def failing(inputs: Sequence[Tensor]) -> Tensor:
        raise RuntimeError("not while a graph is recorded")

    with pytest.raises(RuntimeError, match="not while"):
        record(failing, [torch.zeros(2)])
    assert calls[-1] == "stream as before"
