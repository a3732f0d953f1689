"""The measurements of `split.bench`: shard processes, links, and the whole model in this process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lab.bench import Sample, interleaved, ratio
from lab.device import open_device
from lab.engine import Engine, LocalEngine, Session
from lab.entry import compose_settings
from lab.link import Link, LinkSettings, OneWay
from lab.models import load_model
from lab.sampling import Sampling
from split.bench_settings import SplitBenchSettings
from split.joining import join_shards
from split.local_shards import LocalShards, own_words
from split.opening import load_stage, ranges
from split.plan import architecture_of
from split.planning import Node, Work, make_plan_with_cuts
from split.settings import SplitSettings
from split.sharded_model import ShardedModel
from split.transport.inproc import InProcess

LINK_BUFFER_BYTES = 2**24
WARM_UP = 2
TEXTS = 4


class Bench:
    """Everything that several measurements share. Close it: it ends the processes."""

    def __init__(self, settings: SplitBenchSettings, folder: Path) -> None:
        project = settings.project
        self._project, self._model, self._folder = project, settings.model, folder
        self._device = open_device(settings.device)
        inference = compose_settings("split_inf", "", SplitSettings)
        self._settings = replace(
            inference,
            model=settings.model,
            device=settings.device,
            project=replace(
                inference.project,
                context=project.context,
                cache_limit_bytes=project.cache_limit_bytes,
                cuts=[project.cut],
                max_connections=64,
            ),
        )
        self._stack = ExitStack()
        self._layers = ranges(self._settings, 2)
        model_words = [word for word in own_words() if word.startswith(("model", "device."))]
        words = [
            *model_words,
            f"project.context={project.context}",
            f"project.cache_limit_bytes={project.cache_limit_bytes}",
            "project.max_connections=64",
        ]
        shards = LocalShards(self._layers, folder, project.start_seconds, extra=words)
        self._addresses = [str(address) for address in self._stack.enter_context(shards).addresses]

    def close(self) -> None:
        """End the shards."""
        self._stack.close()

    def added(self) -> dict[str, Any]:
        """Two shards over tcp beside the same slices in this process, and beside the whole model."""
        project = self._project
        with ExitStack() as stack:
            engines: dict[str, Engine] = {
                "tcp": stack.enter_context(_closing(self._join(self._addresses))),
                "inproc": self._inproc(),
                "whole": self._whole(),
            }
            sessions = {name: engine.open(self._prompt(16), Sampling.greedy()) for name, engine in engines.items()}
            cases: dict[str, Callable[[], float | None]] = {
                name: lambda name=name: _token_seconds(engines[name], sessions[name], project.new_tokens)  # type: ignore[misc]
                for name in engines
            }
            found = interleaved(cases, WARM_UP, project.repeats)
            over = {name: [a - b for a, b in zip(found["tcp"], found[name])] for name in ("inproc", "whole")}
        return {
            "tokens_a_reading": project.new_tokens,
            **{f"{name}_token_seconds": Sample.of(readings) for name, readings in found.items()},
            "added_over_inproc_seconds": Sample.of(over["inproc"]),
            "added_over_whole_seconds": Sample.of(over["whole"]),
        }

    def link(self) -> dict[str, Any]:
        """Token time at each round trip; least-squares slope."""
        project = self._project
        with ExitStack() as stack:
            engines = {rtt: stack.enter_context(_closing(self._linked(stack, rtt))) for rtt in project.rtt_seconds}
            sessions = {rtt: engine.open(self._prompt(16), Sampling.greedy()) for rtt, engine in engines.items()}
            cases: dict[str, Callable[[], float | None]] = {
                str(rtt): lambda rtt=rtt: _token_seconds(engines[rtt], sessions[rtt], project.new_tokens)  # type: ignore[misc]
                for rtt in engines
            }
            found = interleaved(cases, WARM_UP, project.repeats)
        medians = [statistics.median(found[str(rtt)]) for rtt in project.rtt_seconds]
        return {
            "rtt_seconds": project.rtt_seconds,
            "token_seconds": medians,
            "slope": statistics.linear_regression(project.rtt_seconds, medians).slope,
        }

    def prefill(self) -> dict[str, Any]:
        """A long prompt in chunks over the same in one pass."""
        project = self._project
        ids = self._prompt(project.prompt_tokens)
        with ExitStack() as stack:
            chunks = {"chunked": project.prefill_chunk, "unchunked": project.prompt_tokens}
            engines = {
                name: stack.enter_context(_closing(self._join(self._addresses, chunk)))
                for name, chunk in chunks.items()
            }
            cases: dict[str, Callable[[], float | None]] = {
                name: lambda name=name: _prefill_seconds(engines[name], ids)  # type: ignore[misc]
                for name in engines
            }
            found = interleaved(cases, 1, project.repeats)
        return {
            "prompt_tokens": project.prompt_tokens,
            "prefill_chunk": project.prefill_chunk,
            **{f"{name}_seconds": Sample.of(readings) for name, readings in found.items()},
            "chunked_over_unchunked": ratio(found["chunked"], found["unchunked"]),
        }

    def batch(self) -> dict[str, Any]:
        """Four texts in one batch over one text."""
        project = self._project
        with _closing(self._join(self._addresses)) as engine:
            sessions = [engine.open(self._prompt(16, seed), Sampling.greedy()) for seed in range(TEXTS)]
            cases: dict[str, Callable[[], float | None]] = {
                "one": lambda: 1 / _token_seconds(engine, sessions[0], project.new_tokens),
                "four": lambda: TEXTS / _tokens_seconds(engine, sessions, project.new_tokens),
            }
            found = interleaved(cases, WARM_UP, project.repeats)
        return {
            **{f"{name}_tokens_per_second": Sample.of(readings) for name, readings in found.items()},
            "four_over_one": ratio(found["four"], found["one"]),
        }

    def plan(self) -> dict[str, Any]:
        """The planner's time of a token, from slices timed alone in this process, over the measured one."""
        project = self._project
        architecture = architecture_of(self._model)
        stages = [load_stage(self._settings, self._device, layers) for layers in self._layers]
        alone = [_slice_seconds(self._settings, index, stages, project.new_tokens) for index in (0, 1)]
        layer_seconds = alone[0] / len(self._layers[0])
        head_seconds = max(0.0, alone[1] - layer_seconds * len(self._layers[1]))
        node = Node(
            name="here",
            memory_bytes=10**12,
            weights_bytes_per_second=1e10,
            layer_seconds=layer_seconds,
            head_seconds=head_seconds,
            delay_seconds=0.0,
            link_bytes_per_second=1e9,
        )
        work = Work(
            context=project.context,
            sessions=1,
            prefill_chunk=project.prefill_chunk,
            boundary_row_bytes=4 * architecture.hidden_size,
            overhead_bytes=0,
            hop_seconds=0.0003,
        )
        cuts = [0, project.cut, architecture.layers]
        predicted = make_plan_with_cuts(architecture, [node, node], cuts, work).token_seconds
        with _closing(self._join(self._addresses)) as engine:
            session = engine.open(self._prompt(16), Sampling.greedy())
            measured = [_token_seconds(engine, session, project.new_tokens) for _ in range(project.repeats)]
        return {
            "layer_seconds": layer_seconds,
            "head_seconds": head_seconds,
            "predicted_token_seconds": predicted,
            "measured_token_seconds": Sample.of(measured),
            "predicted_over_measured": predicted / statistics.median(measured),
        }

    def _join(self, addresses: Sequence[str], prefill_chunk: int | None = None) -> ShardedModel:
        project = self._settings.project
        return join_shards(
            self._model,
            self._settings.network,
            shards=addresses,
            spares=[],
            boundary=project.boundary.name,
            context=project.context,
            prefill_chunk=prefill_chunk or self._project.prefill_chunk,
            start_seconds=project.start_seconds,
            recovery_seconds=0.0,
        )

    def _linked(self, stack: ExitStack, rtt: float) -> ShardedModel:
        """The client beside shard 1; shard 2 behind a link, for both of them."""
        host, _, port = self._addresses[1].rpartition(":")
        way = OneWay(delay_seconds=rtt / 2)
        settings = LinkSettings(up=way, down=way, buffer_bytes=LINK_BUFFER_BYTES, seed=0)
        link = stack.enter_context(Link((host, int(port)), settings, host="127.0.0.1", port=0))
        return self._join([self._addresses[0], f"127.0.0.1:{link.port}"])

    def _inproc(self) -> ShardedModel:
        stages = [load_stage(self._settings, self._device, layers) for layers in self._layers]
        return ShardedModel(
            InProcess(stages),
            vocabulary_size=stages[0].shard.vocabulary_size,
            context=self._project.context,
            prefill_chunk=self._project.prefill_chunk,
            recovery_seconds=0.0,
        )

    def _whole(self) -> LocalEngine:
        return LocalEngine(
            load_model(self._model, self._device).model,
            sessions=self._settings.project.sessions,
            context=self._project.context,
            bucket=self._settings.project.cache_bucket,
            kv_limit_bytes=2 * self._project.cache_limit_bytes,
            prefill_chunk=self._project.prefill_chunk,
            exact_rows=None,
        )

    def _prompt(self, count: int, seed: int = 0) -> list[int]:
        generator = random.Random(seed)
        return [generator.randrange(self._model.architecture.vocabulary) for _ in range(count)]


class _closing:
    """Leaves the shards behind an engine."""

    def __init__(self, engine: ShardedModel) -> None:
        self._engine = engine

    def __enter__(self) -> ShardedModel:
        return self._engine

    def __exit__(self, *error: object) -> None:
        self._engine.shutdown()


def _token_seconds(engine: Engine, session: Session, count: int) -> float:
    """Median time of a token; the text is rewound afterwards, so that every reading is of the same ones."""
    return _tokens_seconds(engine, [session], count)


def _tokens_seconds(engine: Engine, sessions: Sequence[Session], count: int) -> float:
    seconds = []
    ids = {id(session): session.step.next_ids[-1:] for session in sessions if session.step}
    starts = [session.position for session in sessions]
    for _ in range(count):
        began = time.perf_counter()
        steps = engine.extend([(session, ids[id(session)]) for session in sessions], "last")
        seconds.append(time.perf_counter() - began)
        ids = {id(session): step.next_ids for session, step in zip(sessions, steps, strict=True)}
    for session, start in zip(sessions, starts, strict=True):
        session.position = start
    return statistics.median(seconds)


def _prefill_seconds(engine: Engine, ids: Sequence[int]) -> float:
    began = time.perf_counter()
    with engine.open(ids, Sampling.greedy()):
        return time.perf_counter() - began


def _slice_seconds(settings: SplitSettings, index: int, stages: Sequence[Any], count: int) -> float:
    """Median time of one token in one slice alone."""
    transport = InProcess(stages)
    engine = ShardedModel(
        transport,
        vocabulary_size=stages[0].shard.vocabulary_size,
        context=settings.project.context,
        prefill_chunk=settings.project.prefill_chunk,
        recovery_seconds=0.0,
    )
    with torch.inference_mode(), engine.open(range(16), Sampling.greedy()) as session:
        for token in range(count):
            engine.extend([(session, [token])], "last")
        hops = transport.reports()[index].hops
    return statistics.median(hop.computed - hop.began for hop in list(hops.values())[-count:])
