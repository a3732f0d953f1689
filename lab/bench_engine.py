"""Speed and truth of the engine on this machine: `python -m lab.bench_engine`; sizes in conf/engine_bench.yaml.

decode      tokens a second of one sequence: int4, int8, bfloat16 with compiled layers and without, and llama.cpp
prompt      tokens a second of prompts, int4 and llama.cpp
texts       tokens a second of several sequences at once, int4 and llama.cpp with as many slots, prompts included
check       time of a pass that checks draft tokens, over that of a decoding step
identity    tokens of sequences that are checked in pieces, among others, that differ from the sequence alone
perplexity  of held-out text, over that of the same model in float32
memory      peak memory of an int4 process over that of one with a tiny model, in bytes of the packed weights
start       seconds from a verifier's command to `listening`, with compiled layers and without, once they are compiled

All readings of a part are interleaved. llama.cpp is the wheel `xllamacpp` in a process of its own, with the GGUF file
that the model comes from; without it, or where the model is no GGUF file, its figures are left out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.bench import Row, Sample, interleaved, judged, ratio, run_parts
from lab.command import entry
from lab.command.overrides import override
from lab.command.processes import listening, own_overrides, run_to_end
from lab.settings import (
    Dtype,
    LabSettings,
    ModelSettings,
    ModelSource,
    Quantization,
    register,
    require,
    require_at_least,
    user_errors,
)

if TYPE_CHECKING:
    from lab.engine.local import LocalEngine
    from lab.llama_cpp import LlamaCpp

LEAST_OVER_LLAMA_CPP = {1: 1.0, 2: 1.25}
"""By threads: the least speed of int4 over llama.cpp's."""
LEAST_OVER_EAGER, LEAST_PROMPT, LEAST_TEXTS = 1.6, 2.0, 1.0
MOST_LOSS = {"int4": 0.001, "int8": 0.002}
"""Largest growth of the perplexity. The numbers of int4 are those of the GGUF file."""
PERPLEXITY_WINDOW = 512
MOST_MEMORY = 1.3
MOST_ADDED = 5.0
"""Most seconds that compiled layers add to a later start."""


@dataclass(kw_only=True)
class EngineBenchProjectSettings:
    """Sizes of the benchmark."""

    parts: list[str]
    """Names of the rows to measure, from `PARTS`."""
    context: int
    prompt_tokens: int
    """Tokens before those that part decode times."""
    new_tokens: int
    repeats: int
    """Interleaved readings that count."""
    prompts: list[int]
    """Lengths of the prompts of part prompt."""
    prefill_chunk: int
    texts: list[int]
    """Numbers of sequences at once."""
    checked_rows: list[int]
    identity_tokens: int
    """Tokens of part identity, for each engine."""
    perplexity_tokens: int
    start_seconds: float
    """Time limit of a process of parts memory and start."""
    report: str | None
    """File of the report; rows of other parts that it holds stay. null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "prompt_tokens", "repeats", "prefill_chunk", "identity_tokens")
        require_at_least(2, self, "new_tokens", "perplexity_tokens")
        longest = max([self.prompt_tokens, *self.prompts]) + self.new_tokens
        require(self.context >= longest, f"context must be at least {longest}, the longest text", self.context)


@register("engine_bench")
@dataclass(kw_only=True)
class EngineBenchSettings(LabSettings):
    """Everything `python -m lab.bench_engine` reads."""

    project: EngineBenchProjectSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.model.quantization
        require(kind is Quantization.none, "model.quantization must be none here: each part has its own", kind.name)


class EngineRig(ExitStack):
    """Engines of one model, opened when a part asks for them."""

    def __init__(self, settings: EngineBenchSettings, folder: Path) -> None:
        super().__init__()
        self.settings, self.project, self.folder = settings, settings.project, folder
        self.engine = cache(self._engine)
        self.llama_cpp = cache(self._llama_cpp)

    def _engine(self, quantization: Quantization, compiles: bool, sessions: int, dtype: Dtype | None) -> LocalEngine:
        model = replace(self.settings.model, quantization=quantization, dtype=dtype or self.settings.model.dtype)
        return self._open(model, compiles=compiles, sessions=sessions)

    def _open(self, model: ModelSettings, *, compiles: bool, sessions: int) -> LocalEngine:
        from lab.device import open_device
        from lab.engine.compiled import Compiler
        from lab.engine.local import LocalEngine
        from lab.models.layers import load_proved

        device = open_device(self.settings.device)
        compiler = Compiler.of(model, replace(self.settings.device, compile=compiles), lasts=True)
        with user_errors("project."):
            return LocalEngine(
                load_proved(model, device).model,
                sessions=sessions,
                context=self.project.context,
                bucket=64,
                kv_limit_bytes=2**33,
                prefill_chunk=self.project.prefill_chunk,
                exact_rows=None,
                compiler=compiler,
            )

    @property
    def model_overrides(self) -> list[str]:
        """Overrides that give another process our model, but for its precision."""
        theirs = ("model.dtype=", "model.quantization=")
        own = own_overrides()
        return [word for word in own if word.startswith(("--config-dir", "model")) and not word.startswith(theirs)]

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor has instructions for it; layers in bfloat16 are compiled only there."""
        from lab.device import best_dtype, open_device

        return best_dtype(open_device(self.settings.device)) is Dtype.bfloat16

    def packed(self, bits: str, sessions: int = 1) -> LocalEngine:
        """The compiled engine of these bits."""
        return self.engine(Quantization[bits], True, sessions, None)

    def packed_from_floats(self, bits: str) -> LocalEngine:
        """The same, but packed from the model's floats: blocks of a GGUF file are not found in its conversion."""
        from lab.models.sources import prepare_checkpoint

        model = self.settings.model
        folder = prepare_checkpoint(replace(model, dtype=Dtype.float32)).folder
        converted = replace(model, source=ModelSource.path, path=str(folder))
        return self._open(replace(converted, quantization=Quantization[bits]), compiles=True, sessions=1)

    def plain(self, compiles: bool, dtype: Dtype | None = None) -> LocalEngine:
        """The engine of the model as it is."""
        return self.engine(Quantization.none, compiles, 1, dtype)

    def _llama_cpp(self, slots: int) -> LlamaCpp | None:
        from lab.llama_cpp import open_llama_cpp

        peer = open_llama_cpp(self.settings.model, self.settings.device.threads, slots, self.project.context)
        return peer and self.enter_context(closing(peer))

    def ids(self, count: int, seed: int) -> list[int]:
        """Random ids."""
        draw, size = random.Random(seed), self.settings.model.architecture.vocabulary
        return [draw.randrange(size) for _ in range(count)]


def _continue(engine: LocalEngine, prompts: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
    """Greedy sequences in step. Returns the seconds of all tokens but the first, and the tokens."""
    from lab.engine.sampling import Sampling

    with ExitStack() as stack:
        most = len(prompts[0]) + count
        sessions = [stack.enter_context(engine.open(prompt, Sampling.greedy(), most)) for prompt in prompts]
        texts = [[session.step.next_ids[-1]] for session in sessions if session.step is not None]
        began = time.perf_counter()
        for _ in range(count - 1):
            requests = [(session, text[-1:]) for session, text in zip(sessions, texts, strict=True)]
            for text, step in zip(texts, engine.extend(requests, "last"), strict=True):
                text += step.next_ids
        return time.perf_counter() - began, texts


def decode(rig: EngineRig) -> Row:
    """Time one sequence in every engine."""
    project, threads = rig.project, rig.settings.device.threads
    ids, count = rig.ids(project.prompt_tokens, 0), project.new_tokens

    def speed(engine: LocalEngine) -> float:
        return (count - 1) / _continue(engine, [ids], count)[0]

    cases: dict[str, Callable[[], float | None]] = {
        "int4": partial(speed, rig.packed("int4")),
        "int8": partial(speed, rig.packed("int8")),
        "bfloat16_eager": partial(speed, rig.plain(False)),
    }
    if rig.has_bfloat16:
        cases["bfloat16"] = partial(speed, rig.plain(True))
    if (peer := rig.llama_cpp(1)) is not None:
        cases["llama_cpp"] = lambda: peer.complete(ids, count)["predicted_per_second"]
    found = interleaved(cases, 1, project.repeats)
    row: Row = {"threads": threads, "tokens_per_second": {name: Sample.of(own) for name, own in found.items()}}
    holds, targets = True, []
    if rig.has_bfloat16:
        row["bfloat16_over_eager"] = over_eager = ratio(found["bfloat16"], found["bfloat16_eager"])
        holds = over_eager.median >= LEAST_OVER_EAGER
        targets.append(f"bfloat16_over_eager at least {LEAST_OVER_EAGER}")
    if peer is not None:
        row["int4_over_llama_cpp"] = over = ratio(found["int4"], found["llama_cpp"])
        least = LEAST_OVER_LLAMA_CPP.get(threads, 1.0)
        holds = holds and over.median >= least
        targets.append(f"int4_over_llama_cpp at least {least}")
    return judged("decode", row, ", ".join(targets), holds) if targets else row


def prompt(rig: EngineRig) -> list[Row]:
    """Time prompts of several lengths."""
    from lab.engine.sampling import Sampling

    engine, peer, rows = rig.packed("int4"), rig.llama_cpp(1), []
    for length in rig.project.prompts:
        ids = rig.ids(length, length)

        def ours(ids: list[int] = ids) -> float:
            began = time.perf_counter()
            engine.open(ids, Sampling.greedy()).close()
            return len(ids) / (time.perf_counter() - began)

        cases: dict[str, Callable[[], float | None]] = {"int4": ours}
        if peer is not None:
            cases["llama_cpp"] = partial(peer.prompt_speed, ids)
        found = interleaved(cases, 1, min(3, rig.project.repeats))
        row: Row = {"prompt_tokens": length, "tokens_per_second": {name: Sample.of(own) for name, own in found.items()}}
        rows.append(_against_peer("prompt", row, found, LEAST_PROMPT))
    return rows


def texts(rig: EngineRig) -> list[Row]:
    """Time several sequences at once, from their prompts to their last tokens."""
    rows = []
    for count in rig.project.texts:
        engine, peer, new = rig.packed("int4", count), rig.llama_cpp(count), rig.project.new_tokens // 2
        prompts = [rig.ids(16, seed) for seed in range(count)]

        def ours(engine: LocalEngine = engine, prompts: list[list[int]] = prompts, new: int = new) -> float:
            began = time.perf_counter()
            _continue(engine, prompts, new)
            return len(prompts) * new / (time.perf_counter() - began)

        def theirs(peer: LlamaCpp | None = peer, prompts: list[list[int]] = prompts, new: int = new) -> float:
            assert peer is not None
            began = time.perf_counter()
            with ThreadPoolExecutor(len(prompts)) as pool:
                list(pool.map(lambda ids: peer.complete(ids, new), prompts))
            return len(prompts) * new / (time.perf_counter() - began)

        cases: dict[str, Callable[[], float | None]] = {"int4": ours} | ({"llama_cpp": theirs} if peer else {})
        found = interleaved(cases, 1, min(3, rig.project.repeats))
        row: Row = {"texts": count, "tokens_per_second": {name: Sample.of(own) for name, own in found.items()}}
        rows.append(_against_peer("texts", row, found, LEAST_TEXTS))
    return rows


def _against_peer(name: str, row: Row, found: Mapping[str, Sequence[float]], least: float) -> Row:
    if "llama_cpp" not in found:
        return row
    over = ratio(found["int4"], found["llama_cpp"])
    target = f"int4_over_llama_cpp at least {least}"
    return judged(name, {**row, "int4_over_llama_cpp": over}, target, over.median >= least)


def check(rig: EngineRig) -> Row:
    """Time passes of several rows of one sequence."""
    from lab.engine.sampling import Sampling

    engine = rig.packed("int4")
    with engine.open(rig.ids(rig.project.prompt_tokens, 0), Sampling.greedy()) as text:

        def rows(count: int) -> None:
            engine.extend([(text, rig.ids(count, count))], "all")
            text.position -= count

        cases = {str(count): partial(rows, count) for count in (1, *rig.project.checked_rows)}
        found = interleaved(cases, 3, 10 * rig.project.repeats)
    over = {f"{count}_rows": ratio(found[str(count)], found["1"]) for count in rig.project.checked_rows}
    return {"step_seconds": Sample.of(found["1"]), "over_a_step": over}


def identity(rig: EngineRig) -> Row:
    """Check sequences in pieces of random length among three others: every piece says what the sequence alone says."""
    from lab.engine.sampling import Sampling

    wrong: dict[str, int] = {}
    invariant: dict[str, bool] = {}
    length = 200
    for name in ("int4", "int8", *(["bfloat16"] if rig.has_bfloat16 else [])):
        engine = rig.engine(Quantization.none if name == "bfloat16" else Quantization[name], True, 4, None)
        draw, done, wrong[name], invariant[name] = random.Random(0), 0, 0, engine.row_invariant
        while done < rig.project.identity_tokens:
            prompts = [rig.ids(draw.randint(4, 40), done + seed) for seed in range(4)]
            alone = [_continue(engine, [ids], length)[1][0] for ids in prompts]
            sessions = [engine.open(ids, Sampling.greedy()) for ids in prompts]
            places = [0] * 4
            while min(places) < length - 1:
                counts = [min(draw.randint(1, 17), length - 1 - place) for place in places]
                requests = [
                    (session, text[place : place + count])
                    for session, text, place, count in zip(sessions, alone, places, counts, strict=True)
                    if count
                ]
                steps = iter(engine.extend(requests, "all"))
                for number, count in enumerate(counts):
                    if count:
                        expected = alone[number][places[number] + 1 : places[number] + count + 1]
                        wrong[name] += sum(a != b for a, b in zip(next(steps).next_ids, expected, strict=True))
                        places[number] += count
            for session in sessions:
                session.close()
            done += 4 * length
    row = {"tokens": rig.project.identity_tokens, "differing": wrong, "row_invariant": invariant}
    holds = all(invariant[name] and not wrong[name] for name in ("int4", "int8"))
    holds = holds and not any(wrong[name] for name, is_so in invariant.items() if is_so)
    return judged("identity", row, "int4 and int8 are row-invariant, and where an engine is no token differs", holds)


def perplexity(rig: EngineRig) -> Row:
    """Measure held-out text: Python's own help topics."""
    from pydoc_data.topics import topics

    from lab.models.sources import load_tokenizer_only

    tokenizer: Any = load_tokenizer_only(rig.settings.model)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 8 * rig.project.perplexity_tokens]).input_ids[: rig.project.perplexity_tokens]
    engines = {
        "float32": rig.plain(False, Dtype.float32),
        "bfloat16": rig.plain(False),
        "int8": rig.packed("int8"),
        "int4": rig.packed("int4"),
    }
    # Packed weights are widened for the chunks of a prompt; what follows it meets them in their kernel.
    found = {name: _perplexity(engine, ids, as_prompt=True) for name, engine in engines.items()}
    found |= {f"{name}_by_rows": _perplexity(engines[name], ids, as_prompt=False) for name in ("int8", "int4")}
    found["int4_of_floats"] = _perplexity(rig.packed_from_floats("int4"), ids, as_prompt=False)
    growth = {name: value / found["float32"] - 1 for name, value in found.items()}
    row = {"tokens": len(ids), "perplexity": found, "growth": growth, "most": MOST_LOSS}
    target = ", ".join(f"{name} and {name}_by_rows at most +{most:.1%}" for name, most in MOST_LOSS.items())
    holds = all(growth[name] <= most and growth[f"{name}_by_rows"] <= most for name, most in MOST_LOSS.items())
    return judged("perplexity", row, target, holds)


def _perplexity(engine: LocalEngine, ids: Sequence[int], *, as_prompt: bool) -> float:
    """In windows, each of which starts anew; computed in chunks like a prompt, or row by row like what follows it. The
    first two tokens of a window are not counted."""
    from lab.engine.sampling import Sampling

    known: list[float] = []
    for start in range(0, len(ids) - 1, PERPLEXITY_WINDOW):
        window = ids[start : start + PERPLEXITY_WINDOW]
        first = 0 if as_prompt else 1
        with engine.open(window[:first], Sampling.greedy()) as text:
            known += engine.extend([(text, window[first:])], "all")[0].nll[2 - first :]
    return math.exp(sum(known) / len(known))


def memory(rig: EngineRig) -> Row:
    """Measure processes that decode."""
    overrides = [
        "tracking=none",
        "model.dtype=bfloat16",
        "model.quantization=int4",
        f"device.threads={rig.settings.device.threads}",
    ]
    overrides += ["project.context=64"]
    tiny = ["model=random", override("model.cache_dir", rig.settings.model.cache_dir)]
    peaks = {}
    for name, own in {"large": rig.model_overrides, "tiny": tiny}.items():
        for _ in range(2):  # the first one packs and compiles
            _, figures = run_to_end("lab.decode", [*own, *overrides], rig.folder / name, rig.project.start_seconds)
            peaks[name] = figures["peak_rss_bytes"]
    packed = rig.packed("int4").weights_bytes
    over = (peaks["large"] - peaks["tiny"]) / packed
    row = {"peak_bytes": peaks["large"], "tiny_peak_bytes": peaks["tiny"], "weights_bytes": packed, "over": over}
    return judged("memory", row, f"over at most {MOST_MEMORY}", over <= MOST_MEMORY)


def start(rig: EngineRig) -> Row:
    """Time verifiers from their command to `listening`, with compiled layers and without."""
    overrides = [
        "tracking=none",
        "network.port=0",
        "model.quantization=int4",
        "model.dtype=bfloat16",
        "device.threads=1",
        *rig.model_overrides,
    ]

    def seconds(compiles: bool) -> float:
        began = time.perf_counter()
        own = [*overrides, f"device.compile={compiles}"]
        with listening("speculative.verifier", own, rig.folder / f"start-{compiles}", rig.project.start_seconds):
            return time.perf_counter() - began

    # The first turn, which does not count, packs and compiles.
    cases: dict[str, Callable[[], float | None]] = {"eager": lambda: seconds(False), "compiled": lambda: seconds(True)}
    found = interleaved(cases, 1, min(3, rig.project.repeats))
    added = Sample.of([one - other for one, other in zip(found["compiled"], found["eager"], strict=True)])
    row = {"seconds": {name: Sample.of(own) for name, own in found.items()}, "added_seconds": added}
    return judged("start", row, f"added_seconds at most {MOST_ADDED:g}", added.median <= MOST_ADDED)


PARTS: dict[str, Callable[[EngineRig], Row | list[Row]]] = {
    part.__name__: part for part in (decode, prompt, texts, check, identity, perplexity, memory, start)
}


def run(settings: EngineBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the chosen parts; return the figures of the last line."""
    report = Path(settings.project.report or place.folder / "bench.json")
    with EngineRig(settings, place.folder) as rig:
        return run_parts("engine", PARTS, settings.project.parts, rig, settings=settings, place=place, report=report)


main = entry.command("engine_bench", EngineBenchSettings, run)

if __name__ == "__main__":
    main()
