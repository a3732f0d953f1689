"""Cost and gain of splitting, on this machine: `python -m split.bench`; sizes in conf/split_bench.yaml.

Shard processes, links and this one, with the whole model, have a core and a thread each (a core is shared where there
are fewer; of two neighbours in a chain only one computes). Readings are interleaved, and compared turn by turn. Every
row has its target (`target`) and whether it meets it (`holds`); the last line counts those that do not (`missed`).

added_tcp    a token's time over two shards less that of the whole model: the cost of one boundary; also less that of
             the same two slices in this process, without a network, on one core and on a core each: a core that has
             waited for the other computes more slowly at first
added_rpc    the same over torch.distributed.rpc
link         token time against the round trip of a link with 1 -> 2 and 2 -> client in it; the slope, in round trips
prefill      the prompt in chunks that overlap on the shards, over the prompt in one pass
batch        tokens a second of four texts at once over one, and whether each has the tokens that it has alone
plan         the planner's token time, from two slices timed alone, over the measured one, at several cuts
boundary     bytes of a token there and back; bytes and perplexity in each encoding of the boundary
times        the sum of the parts of a token's time over its wall time at the client
speculation  a split target behind a verifier, with a drafter of known acceptance over without, 50 ms between the shards
memory       peak memory of shards of a large random model over that of a tiny one's

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

from pathlib import Path
from typing import Any

from lab.command import entry
from split.bench.settings import SplitBenchSettings


def run(settings: SplitBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the chosen parts; return the figures of the last line."""
    from lab.bench import run_parts
    from split.bench.inference_rows import PARTS
    from split.bench.rig import Rig

    project = settings.project
    report = Path(project.report or place.folder / "bench.json")
    rig = Rig(settings, place.folder)
    return run_parts("split", PARTS, project.parts, rig, settings=settings, place=place, report=report)


main = entry.command("split_bench", SplitBenchSettings, run)

if __name__ == "__main__":
    main()
