"""Part of the benchmark that loads this server and others with concurrent requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from lab.bench import Row, Sample, judged, ratio
from serve.bench.client import Client
from serve.bench.generators import Generator, Load, open_generator
from serve.bench.peers import LeftOut, serving
from serve.bench.rig import Rig

log = logging.getLogger(__name__)

OURS, PLAIN = "serve", "serve_plain"
"""This server as it is, and without draft tokens of its own, which no peer has."""
LEAST_SPEED = {"llama_cpp": 1.0, "transformers": 3.0}
"""Tokens a second over the peer's."""
MOST_FIRST_TOKEN = 1.0
"""95th percentile of the time to the first token over the peer's, with the most streams."""
ONCE = ("transformers",)
"""Measured in the first turn only: it takes several times as long as all others together."""

Loads = Mapping[str, Sequence[Load]]
"""Readings by server."""


def load(rig: Rig) -> list[Row]:
    """Load each server in turn with the same requests, interleaved."""
    project, most = rig.project, max(rig.project.streams)
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        generator = open_generator(rig)
        servers = {OURS: stack.enter_context(rig.server(rig.words(rig.settings, most), connections=most))}
        servers[PLAIN] = servers[OURS]
        for name in project.peers:
            try:
                servers[name] = stack.enter_context(serving(name, rig, most))
            except LeftOut as reason:
                log.warning("%s is left out: %s", name, reason)
                left_out[name] = str(reason)
        found = _measure(generator, servers, project.streams, project.load_repeats)
    about = {"generator": generator.name, "left_out": left_out}
    return [_row(streams, found[streams], about, has_most=streams == most) for streams in project.streams]


def _measure(
    generator: Generator, servers: Mapping[str, Client], streams: Sequence[int], repeats: int
) -> Mapping[int, Loads]:
    """Readings by number of streams."""
    found: dict[int, dict[str, list[Load]]] = {count: {name: [] for name in servers} for count in streams}
    for client in servers.values():
        client.complete("The sea", 2)  # what is made at the first request does not count
    for turn in range(repeats):
        for count in streams:
            for place, (name, client) in enumerate(servers.items()):
                if turn == 0 or name not in ONCE:
                    # One server is measured in two ways: its prefix cache must not know the prompts.
                    number = turn * len(servers) + (place if name == PLAIN else 0)
                    found[count][name].append(generator.load(client, count, number, speculative=name != PLAIN))
                    log.info("%s, %d streams: %s", name, count, found[count][name][-1])
    return found


def _row(streams: int, found: Loads, about: Mapping[str, object], *, has_most: bool) -> Row:
    speeds = {name: [one.tokens_per_second for one in own] for name, own in found.items()}
    firsts = {name: [one.first_token_p95_seconds for one in own] for name, own in found.items()}
    row: Row = {"streams": streams, **about}
    row["tokens_per_second"] = {name: Sample.of(own) for name, own in speeds.items()}
    row["first_token_p95_seconds"] = {name: Sample.of(own) for name, own in firsts.items()}
    targets, holds = [], True
    for name in (peer for peer in found if peer not in (OURS, PLAIN)):
        turns = len(found[name])
        over, first = ratio(speeds[OURS][:turns], speeds[name]), ratio(firsts[OURS][:turns], firsts[name])
        row |= {f"over_{name}": over, f"first_token_over_{name}": first}
        targets.append(f"over_{name} at least {LEAST_SPEED[name]}")
        holds = holds and over.median >= LEAST_SPEED[name]
        if has_most:
            targets.append(f"first_token_over_{name} at most {MOST_FIRST_TOKEN}")
            holds = holds and first.median <= MOST_FIRST_TOKEN
    return judged("load", row, ", ".join(targets), holds) if targets else row
