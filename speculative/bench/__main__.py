"""Speed of speculation over a link, compared with its formulas and with the target alone.

    python -m speculative.bench project.bench.engine=synthetic
    python -m speculative.bench project.bench.engine=real project.draft.source=ngram

Verifier and links are separate processes, the drafter is this one (`speculative.bench.rig`): on Linux the verifier has
one core, drafter and links the other, and every process computes with one thread. Compared cases run interleaved in one
run, and are compared by ratios of the same turn: `n` readings, median with the smallest and the largest. `target` is
what a row must reach, `holds` whether it does.

Engine synthetic: passes take the times of `project.synthetic`, and draft tokens are right with its probability, so that
a figure depends on the loops, not on the models.

    loops       the target alone, the synchronous loop and the asynchronous one at every delay. `over_optimum`: speed
                relative to the best policy for the measured acceptance, in a simulation of this text, token by token.
                `formula_over_measured`: time of the rounds of a text by the formula, relative to the measured one.
    lengths     the automatic draft length compared with fixed ones
    near        no delay and low acceptance, where the synchronous loop is at its best
    useless     a drafter that is never right
    neighbours  token times of three clients next to a fourth that is like them, stalled, or hostile
    frame       the round trip of one frame, relative to as many raw bytes
    busy        a picture of when each side was busy

Engine real: `model` as the target, `project.draft` as the draft source.

    sources     prompt lookup and the target's first layers as drafters, on every text, without a delay
    texts       every text at every delay: alone (B0), sync (B2), async (B3), and transformers' own assisted generation
                with the same drafter on the target's machine (B1), which has no delay
    llama_cpp   prompt lookup without a delay, compared with llama.cpp (the wheel xllamacpp) on a core: alone, and with
                the best of its own ways to draft by n-grams; prompts included
    crowd       several concurrent prompt-lookup drafters on one verifier, all their tokens together, relative to the
                same texts one after the other, prompts included: all with the same text, and with all texts in turn
    second_turn time to the first token of the second turn of a chat, whose history the verifier has kept
                (`project.prefix_tokens`), relative to the same prompt without a first turn

Bytes are all that crossed the connection during generation, in both directions, headers and heartbeats included.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.bench import Row, run_parts
from lab.command import entry
from lab.environment import commit
from speculative.bench import chats, clients, loops, plots
from speculative.bench.rig import Rig, for_engine
from speculative.bench.settings import BenchEngine
from speculative.settings import SpeculativeSettings

PARTS: dict[BenchEngine, dict[str, Callable[[Rig], list[Row]]]] = {
    BenchEngine.synthetic: {
        "loops": loops.loops,
        "lengths": loops.lengths,
        "near": loops.near,
        "useless": loops.useless,
        "neighbours": clients.neighbours,
        "frame": loops.frame,
        "busy": loops.busy,
    },
    BenchEngine.real: {
        "sources": loops.sources,
        "texts": loops.texts,
        "crowd": clients.crowd,
        "llama_cpp": loops.llama_cpp,
        "second_turn": chats.second_turn,
    },
}


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the chosen parts; return the figures of the last line."""
    settings = for_engine(settings)
    bench = settings.project.bench
    parts = PARTS[bench.engine]
    figures = run_parts(
        "speculative",
        parts,
        bench.parts or list(parts),
        Rig(settings, place.folder),
        settings=settings,
        place=place,
        report=place.folder / f"speculative-{bench.engine.name}-{commit() or 'unknown'}.json",
        rule=f"project.bench.parts must be of {{}} for engine={bench.engine.name}",
    )
    return figures | {"seed": settings.seed, "pictures": draw(place.folder, figures["rows"])}


def draw(folder: Path, rows: list[Row]) -> list[Path]:
    """Draw the pictures that the rows have figures for."""
    pictures = [folder / "busy.png"] if (folder / "busy.png").exists() else []
    if measured := [row for row in rows if row["part"] == "loops"]:
        pictures.append(plots.draw_speedups(folder / "speedup.png", measured, "measured (points), predicted (dashed)"))
    if texts := [row for row in rows if row["part"] == "texts"]:
        pictures.append(plots.draw_texts(folder / "texts.png", texts))
    return pictures


main = entry.command("spec_decoding", SpeculativeSettings, run)

if __name__ == "__main__":
    main()
