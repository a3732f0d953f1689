"""The parts of `split.bench`: each measures with the processes of a `Rig` and gives a row of figures."""

import argparse
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lab.bench import Row, Sample, interleaved, judged, ratio
from lab.command.entry import compose_settings
from lab.command.overrides import override
from lab.command.processes import listening, run_to_end
from lab.engine.base import Engine, Session
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only, prepare_checkpoint
from lab.ping_pong import measure
from lab.settings import Quantization
from split.bench.rig import OnCore, Rig
from split.chain.boundary import Boundary
from split.chain.local_shards import LocalShards
from split.chain.open import cut_layers
from split.inference.messages import Report
from split.inference.stage import InferenceStage
from split.inference.times import take_apart
from split.plan import sized_architecture
from split.planner import Node, Work, make_plan_with_cuts
from split.settings import SplitSettings
from split.transport.base import ShardReport

WARM_UP = 2
TEXTS = 4
ADDED_TCP_SECONDS, ADDED_RPC_SECONDS = 0.001, 0.002
ADDED_INT4_SECONDS = 0.0015
HEADER_BYTES, ANSWER_BYTES = 64, 48
ADDED_MEMORY_BYTES = 64 * 2**20
PING_ROUNDS = 200


def added_tcp(rig: Rig) -> Row:
    """Compare a token's time over two shards, with one boundary, with that of the whole model."""
    with rig.tcp() as engine:
        on_cores = [OnCore(stage, core) for core, stage in enumerate(rig.stages())]
        engines: dict[str, Engine] = {
            "tcp": engine,
            "two_cores": rig.inproc(on_cores),
            "inproc": rig.inproc(rig.stages()),
            "whole": rig.whole(),
        }
        is_int4 = rig.model.quantization is Quantization.int4
        return _added(rig, "tcp", engines, ADDED_INT4_SECONDS if is_int4 else ADDED_TCP_SECONDS)


def added_rpc(rig: Rig) -> Row:
    """Compare a token's time over torch.distributed.rpc with that of the whole model."""
    with rig.rpc() as engine:
        return _added(rig, "rpc", {"rpc": engine, "whole": rig.whole()}, ADDED_RPC_SECONDS)


def _added(rig: Rig, name: str, engines: Mapping[str, Engine], most_seconds: float) -> Row:
    found = _token_seconds(rig, engines, tokens=rig.project.added_tokens, repeats=rig.project.added_repeats)
    over = {other: Sample.of([a - b for a, b in zip(found[name], found[other])]) for other in engines if other != name}
    return judged(
        f"added_{name}",
        {
            **{f"{case}_token_seconds": Sample.of(readings) for case, readings in found.items()},
            **{f"added_over_{other}_seconds": sample for other, sample in over.items()},
        },
        f"added_over_whole_seconds at most {most_seconds}",
        over["whole"].median <= most_seconds,
    )


def link(rig: Rig) -> Row:
    """Measure token times over a link of several round-trip times; their least-squares slope."""
    rtts = rig.project.rtt_seconds
    with ExitStack() as stack:
        engines = {str(rtt): stack.enter_context(rig.tcp(stack.enter_context(rig.linked(rtt)))) for rtt in rtts}
        found = _token_seconds(rig, engines)
    medians = [statistics.median(found[str(rtt)]) for rtt in rtts]
    slope = statistics.linear_regression(rtts, medians).slope
    return judged(
        "link",
        {"rtt_seconds": rtts, "token_seconds": medians, "slope": slope},
        "slope 1.00 within 0.05",
        abs(slope - 1) <= 0.05,
    )


def prefill(rig: Rig) -> Row:
    """Compare a long prompt in chunks with the same prompt in one pass."""
    project = rig.project
    ids = rig.prompt(project.prompt_tokens)
    chunks = {"chunked": project.prefill_chunk, "unchunked": project.prompt_tokens}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(rig.tcp(prefill_chunk=chunk)) for name, chunk in chunks.items()}
        cases: dict[str, Callable[[], float | None]] = {
            name: lambda engine=engine: _prefill_seconds(engine, ids)  # type: ignore[misc]
            for name, engine in engines.items()
        }
        found = interleaved(cases, 1, project.repeats)
    over = ratio(found["chunked"], found["unchunked"])
    return judged(
        "prefill",
        {
            "prompt_tokens": project.prompt_tokens,
            "prefill_chunk": project.prefill_chunk,
            **{f"{name}_seconds": Sample.of(readings) for name, readings in found.items()},
            "chunked_over_unchunked": over,
        },
        "chunked_over_unchunked at most 0.7",
        over.median <= 0.7,
    )


def batch(rig: Rig) -> Row:
    """Compare four texts in one batch with one text, in speed and in tokens."""
    count = rig.project.new_tokens
    with rig.tcp() as engine:
        sessions = [engine.open(rig.prompt(16, seed), Sampling.greedy()) for seed in range(TEXTS)]
        alone = [_continue(engine, [session], count)[1][0] for session in sessions]
        at_once = _continue(engine, sessions, count)[1]
        cases: dict[str, Callable[[], float | None]] = {
            "one": lambda: 1 / statistics.median(_continue(engine, sessions[:1], count)[0]),
            "four": lambda: TEXTS / statistics.median(_continue(engine, sessions, count)[0]),
        }
        found = interleaved(cases, WARM_UP, rig.project.repeats)
    over = ratio(found["four"], found["one"])
    return judged(
        "batch",
        {
            **{f"{name}_tokens_per_second": Sample.of(readings) for name, readings in found.items()},
            "four_over_one": over,
            "texts_identical": alone == at_once,
        },
        "four_over_one at least 1.6, texts identical to solo",
        over.median >= 1.6 and alone == at_once,
    )


def plan(rig: Rig) -> Row:
    """Compare the planner's token time with the measured one, at every cut of `project.placements`. It plans with the
    times of the two slices of `project.cut` alone in this process; all are measured interleaved."""
    project, architecture = rig.project, sized_architecture(rig.model)
    stages = rig.stages()
    slices = rig.ranges(project.cut)
    with ExitStack() as stack:
        engines = {str(cut): stack.enter_context(rig.tcp(rig.addresses(cut))) for cut in project.placements}
        alone = rig.inproc(stages)
        session = alone.open(rig.prompt(16), Sampling.greedy())
        computed: list[list[float]] = [[], []]

        def time_slices() -> None:
            _continue(alone, [session], project.new_tokens)
            for place, report in enumerate(alone.reports()):
                hops = list(report.hops.values())[-project.new_tokens :]
                computed[place].append(statistics.median(hop.computed - hop.began for hop in hops))

        found = _token_seconds(rig, engines, {"slices": time_slices})
    first, last = (statistics.median(seconds[WARM_UP:]) for seconds in computed)
    layer_seconds = first / len(slices[0])
    node = Node(
        name="here",
        memory_bytes=10**12,
        weights_bytes_per_second=1e10,
        layer_seconds=layer_seconds,
        head_seconds=max(0.0, last - layer_seconds * len(slices[1])),
        delay_seconds=0.0,
        link_bytes_per_second=1e9,
    )
    work = Work(
        context=project.context,
        sessions=1,
        prefill_chunk=project.prefill_chunk,
        boundary_row_bytes=rig.settings.project.boundary.row_bytes(architecture.hidden_size),
        overhead_bytes=0,
        hop_seconds=measure(body_bytes=64, rounds=PING_ROUNDS, warm_up_rounds=PING_ROUNDS // 10).frame_seconds / 2,
    )
    placements: list[Row] = []
    for cut in project.placements:
        predicted = make_plan_with_cuts(architecture, [node, node], [0, cut, architecture.layers], work).token_seconds
        measured = Sample.of(found[str(cut)])
        placements.append(
            {
                "cut": cut,
                "predicted_token_seconds": predicted,
                "measured_token_seconds": measured,
                "predicted_over_measured": predicted / measured.median,
            }
        )
    return judged(
        "plan",
        {
            "layer_seconds": layer_seconds,
            "head_seconds": node.head_seconds,
            "hop_seconds": work.hop_seconds,
            "placements": placements,
        },
        "predicted_over_measured within 0.8 to 1.2 at each placement",
        all(0.8 <= placement["predicted_over_measured"] <= 1.2 for placement in placements),
    )


def boundary(rig: Rig) -> Row:
    """Measure a token's bytes there and back over tcp, and bytes and perplexity in each encoding."""
    hidden_size = rig.model.architecture.hidden_size
    with rig.tcp() as engine, engine.open(rig.prompt(16), Sampling.greedy()) as session:
        for _ in range(3):
            engine.extend([(session, [1])], "last")
        forward, back = (list(report.hops.values())[-1].sent_bytes for report in engine.reports())
    shards = [stage.shard for stage in rig.stages()]
    ids = list(load_tokenizer_only(rig.model)(Path(argparse.__file__).read_text())["input_ids"])
    encodings = {}
    for kind in Boundary:
        engine = rig.inproc([InferenceStage(shard, kind) for shard in shards])
        perplexity = _perplexity(engine, ids[: rig.project.perplexity_tokens])
        with engine.open([1], Sampling.greedy()) as session:
            engine.extend([(session, [1])], "last")
            token_bytes = list(engine.reports()[0].hops.values())[-1].sent_bytes
        encodings[kind.name] = {"token_bytes": token_bytes, "perplexity": perplexity}
    changes = {name: found["perplexity"] / encodings["float32"]["perplexity"] - 1 for name, found in encodings.items()}
    int8, bfloat16 = encodings["int8"]["token_bytes"], encodings["bfloat16"]["token_bytes"]
    return judged(
        "boundary",
        {
            "forward_bytes_per_token": forward,
            "return_bytes_per_token": back,
            "encodings": encodings,
            "perplexity_change": changes,
            "perplexity_tokens": rig.project.perplexity_tokens,
        },
        f"forward at most {4 * hidden_size + HEADER_BYTES}, return at most {ANSWER_BYTES}, int8 = bfloat16 / 2 + 4",
        forward <= 4 * hidden_size + HEADER_BYTES and back <= ANSWER_BYTES and int8 == bfloat16 / 2 + 4,
    )


def times(rig: Rig) -> Row:
    """Compare the sum of the parts of each token's time with its wall time at the client."""
    count = rig.project.new_tokens * rig.project.repeats
    with rig.tcp() as engine, engine.open(rig.prompt(16), Sampling.greedy()) as session:
        walls = _continue(engine, [session], count)[0]
        reports = engine.reports()
        apart = take_apart(list(engine.passes), reports)[-count:]
    ratios = [parts.total_seconds / wall for parts, wall in zip(apart, walls, strict=True)]
    means = {
        f"shard{place + 1}_{part}_seconds": statistics.fmean(getattr(parts.hops[place], part) for parts in apart)
        for place in range(len(reports))
        for part in ("compute", "serialise", "queue", "wire", "wait")
    }
    return judged(
        "times",
        {
            **means,
            "answer_wire_seconds": statistics.fmean(parts.answer_wire for parts in apart),
            "wall_seconds": statistics.fmean(walls),
            "parts_over_wall": Sample.of(ratios),
        },
        "parts_over_wall within 0.95 to 1.05",
        min(ratios) >= 0.95 and max(ratios) <= 1.05,
    )


def memory(rig: Rig) -> Row:
    """Compare the peak memory of three shards of a large random model with that of a tiny model's, for the imports."""
    with tempfile.TemporaryDirectory(dir=rig.folder) as cache:
        sizes = [f"model.architecture.{name}={size}" for name, size in rig.project.memory_model.items()]
        [tiny], _ = _peaks(rig, "tiny", 1, [f"model.cache_dir={cache}"])
        large, stored_bytes = _peaks(rig, "large", 3, [f"model.cache_dir={cache}", *sizes])
    shards: list[Row] = [
        {
            "layers": f"{report.layers.start}:{report.layers.stop}",
            "weights_bytes": report.figures.weights_bytes,
            "peak_rss_bytes": report.figures.peak_rss_bytes,
            "over_imports_bytes": report.figures.peak_rss_bytes - tiny.figures.peak_rss_bytes,
            "limit_bytes": round(1.25 * report.figures.weights_bytes) + ADDED_MEMORY_BYTES,
        }
        for report in large
    ]
    return judged(
        "memory",
        {"model_bytes": stored_bytes, "imports_peak_rss_bytes": tiny.figures.peak_rss_bytes, "shards": shards},
        "over_imports_bytes at most 1.25 x weights_bytes + 64 MiB at each shard",
        all(shard["over_imports_bytes"] <= shard["limit_bytes"] for shard in shards),
    )


def _peaks(rig: Rig, name: str, count: int, overrides: Sequence[str]) -> tuple[list[ShardReport[Report]], int]:
    """Reports of `count` shards of a random model after some tokens, and the model's bytes on disk."""
    overrides = ["model=random", "project.context=64", "tracking=none", "device.threads=1", *overrides]
    settings = compose_settings("split_inf", overrides, SplitSettings)
    folder = prepare_checkpoint(settings.model).folder
    layers = cut_layers(settings.model, [], count)
    with (
        LocalShards(layers, rig.folder / f"memory-{name}", rig.project.start_seconds, overrides) as shards,
        rig.tcp([str(address) for address in shards.addresses], model=settings.model) as engine,
        engine.open(list(range(8)), Sampling.greedy()) as session,
    ):
        for token in range(4):
            engine.extend([(session, [token])], "last")
        reports = engine.reports()
    return reports, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def speculation(rig: Rig) -> Row:
    """Compare a verifier over two shards with a link between them, with and without a drafter of known acceptance."""
    project = rig.project
    overrides = [*rig.model_overrides, "tracking=none", "device.threads=1", "network.port=0", "project.engine=split"]
    with rig.linked(project.speculation_rtt_seconds) as shards:
        overrides += [override("project.split.shards", shards), f"project.context={project.context}"]
        with listening("speculative.verifier", overrides, rig.folder / "verifier", project.start_seconds) as port:
            alone = _drafted(rig, port, "alone", ["project.mode=target_only"])
            recorded = rig.folder / "alone" / "result.json"
            guessing = [
                "project.draft.source=recorded",
                override("project.draft.file", recorded),
                f"project.draft.length={project.draft_length}",
                f"project.synthetic.agreement={project.acceptance}",
            ]
            drafted = _drafted(rig, port, "drafted", guessing)
    over = drafted["tokens_per_second"] / alone["tokens_per_second"]
    identical = drafted["token_ids"] == alone["token_ids"]
    return judged(
        "speculation",
        {
            "rtt_seconds": project.speculation_rtt_seconds,
            "draft_length": project.draft_length,
            "acceptance": project.acceptance,
            "alpha": drafted["alpha"],
            "tokens": len(alone["token_ids"]),
            "alone_tokens_per_second": alone["tokens_per_second"],
            "drafted_tokens_per_second": drafted["tokens_per_second"],
            "drafted_over_alone": over,
            "texts_identical": identical,
        },
        "drafted_over_alone at least 2, texts identical",
        over >= 2 and identical,
    )


def _drafted(rig: Rig, port: int, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The figures of a drafter's process."""
    overrides = [
        *(*rig.model_overrides, "tracking=none", "device.threads=1", f"network.port={port}", *overrides),
        f"project.max_new_tokens={rig.project.speculation_tokens}",
        "prompt=Tell a long story about a lighthouse.",
    ]
    return run_to_end("speculative.drafter", overrides, rig.folder / name, rig.project.start_seconds + 600)[1]


def _token_seconds(
    rig: Rig,
    engines: Mapping[str, Engine],
    beside: Mapping[str, Callable[[], None]] | None = None,
    *,
    tokens: int | None = None,
    repeats: int | None = None,
) -> dict[str, list[float]]:
    """Median token time of each reading, the engines interleaved with each other and with `beside`."""
    sessions = {name: engine.open(rig.prompt(16), Sampling.greedy()) for name, engine in engines.items()}

    def reading(engine: Engine, session: Session) -> float:
        time.sleep(rig.settings.project.awake_seconds)  # shards of the reading before share no core with this one
        return statistics.median(_continue(engine, [session], tokens or rig.project.new_tokens)[0])

    cases: dict[str, Callable[[], float | None]] = {
        name: functools.partial(reading, engine, sessions[name]) for name, engine in engines.items()
    }
    return interleaved(cases | dict(beside or {}), WARM_UP, repeats or rig.project.repeats)


def _continue(engine: Engine, sessions: Sequence[Session], count: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of each pass, and each text's tokens; rewound afterwards, so that all readings are of the same tokens."""
    begins = [(session.position, session.step) for session in sessions]
    seconds, said = [], [session.step.next_ids[-1:] for session in sessions if session.step]
    for _ in range(count):
        requests = [(session, ids[-1:]) for session, ids in zip(sessions, said, strict=True)]
        began = time.perf_counter()
        steps = engine.extend(requests, "last")
        seconds.append(time.perf_counter() - began)
        for ids, step in zip(said, steps, strict=True):
            ids += step.next_ids
    for session, (position, first) in zip(sessions, begins, strict=True):
        session.position, session.step = position, first
    return seconds, said


def _prefill_seconds(engine: Engine, ids: Sequence[int]) -> float:
    began = time.perf_counter()
    with engine.open(ids, Sampling.greedy()):
        return time.perf_counter() - began


def _perplexity(engine: Engine, ids: Sequence[int]) -> float:
    with engine.open([], Sampling.greedy()) as session:
        [step] = engine.extend([(session, ids)], "all")
    return math.exp(statistics.fmean(step.nll[1:]))


PARTS: dict[str, Callable[[Rig], Row]] = {
    part.__name__: part
    for part in (added_tcp, added_rpc, link, prefill, batch, plan, boundary, times, speculation, memory)
}
