"""Benchmark on natural sites: `python -m fl.bench.natural`; sizes in conf/fed_natural_bench.yaml.

A site has one president's State of the Union addresses. The base model is small and is trained first, in one place, on
the addresses of earlier presidents, so that every site differs from it, and from the others, as authors do. A method's
federation is a simulation (`simulations/fed_sim.py`) as a separate process; its last adapter is then measured on the
held-out part of every site. Sites count as equal: a mean is that of losses, and is given as a perplexity.

base        the training of the base model.
methods     held-out perplexity of every method: mean over the sites, worst site, and worst tenth (p10), over the seeds.
            `before` is the base model without an adapter; at a site that is `alone`, the adapter takes as many steps as
            in the federation, all of them on the site's own text.
papers      what papers report of two methods, compared with the ratio of their mean perplexities, seed by seed.
uplink      mean perplexity with a compressed uplink relative to `average`, whose uplink is float32, seed by seed.
large       `before` and `average` with a large base model, over the same sites, for one seed.
"""

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl.bench.__main__ import simulate
from fl.bench.addresses import divide_addresses, fetch_addresses
from fl.bench.pretraining import FIGURES, train_base
from fl.bench.settings import FederatedNaturalBenchSettings
from fl.client import LoRAClient, Site, open_base, read_all
from fl.report import RoundFigures, SiteLosses, site_losses
from fl.server import adapter_of_run, first_adapter
from fl.settings import Codec, FederatedSettings
from lab.bench import Row, Sample, judged, ratio, run_parts
from lab.command import entry
from lab.command.overrides import override
from lab.files import path_of, require_writable, whole_folder
from lab.settings import digest

BEFORE, ALONE, PLAIN = "before", "alone", "average"

PAPERS = (
    ("average", "ffa", "FedEx-LoRA (arXiv 2410.09432): freezing A loses to averaging both factors"),
    ("rolora", "average", "RoLoRA (arXiv 2409.02346): alternating the factors gains on averaging both"),
    (
        "svd_of_the_rank",
        "average",
        "FlexLoRA (arXiv 2402.11505): the best part of the mean product gains on mean factors",
    ),
    ("svd", "average", "FlexLoRA, and what does not fit the rank is kept in a second adapter"),
)
"""Method that is reported to have the lower perplexity, the other one, and where."""

NO_DIFFERENCE = 0.005
"""Largest relative difference of two perplexities that says nothing about two methods."""

LARGEST_LOSS = {Codec.int8: 0.005, Codec.int4: 0.01, Codec.topk_int8: math.inf}
"""Largest relative change of the perplexity that a format may make; without limit where it is only reported."""


def run(settings: FederatedNaturalBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the parts that are asked for; write the report and return it for the last line."""
    project = settings.project
    return run_parts(
        "fed_natural",
        {"base": base, "methods": methods, "papers": papers, "uplink": uplink, "large": large},
        project.parts,
        prepared(settings, place.folder),
        settings=settings,
        place=place,
        report=Path(project.report),
    )


class Federations:
    """The sites and their base model, and the results of federations over them, each of which runs once."""

    def __init__(self, settings: FederatedNaturalBenchSettings, cache: Path, folder: Path) -> None:
        self.project, self.cache, self._folder = settings.project, cache, folder
        self.seeds = settings.project.seeds
        plain = ["model.quantization=none", "model.dtype=float32"]
        self._own = ["model=random", "model.source=path", override("model.path", cache / "model"), *plain]
        self.methods = {method.name: method.overrides for method in self.project.methods}
        self._known: dict[tuple[str, ...], list[SiteLosses]] = {}
        self._clients: dict[int, list[LoRAClient]] = {}

    def settings(self, seed: int, *more: str) -> FederatedSettings:
        """Settings of a federation."""
        return entry.compose_settings("fed_learn", [*self.overrides(seed), *more], FederatedSettings)

    def overrides(self, seed: int) -> list[str]:
        """Overrides of every federation."""
        data = ["project.data.source=text", override("project.data.path", self.cache / "sites")]
        return [*self.project.federation, *self._own, f"seed={seed}", *data]

    def with_large_model(self) -> "Federations":
        """Federations over the same sites with the large base model, for the first seed."""
        large = copy(self)
        large.seeds, large._own, large._folder = self.seeds[:1], self.project.large, self._folder / "large"
        large._known, large._clients = {}, {}
        return large

    def losses(self, method: str, *more: str) -> list[SiteLosses]:
        """Held-out losses of the sites for every seed."""
        if (method, *more) not in self._known:
            self._known[method, *more] = [self._losses(method, seed, more) for seed in self.seeds]
        return self._known[method, *more]

    def perplexities(self, method: str, *more: str) -> list[float]:
        """Mean perplexity over the sites for every seed."""
        return [mean_perplexity(found) for found in self.losses(method, *more)]

    def _losses(self, method: str, seed: int, more: tuple[str, ...]) -> SiteLosses:
        words = [*self.methods.get(method, []), *more]
        settings = self.settings(seed, *words)
        adapter = first_adapter(settings)
        if method not in (BEFORE, ALONE):
            folder = self._folder / "-".join([method, *more, str(seed)])
            # Held-out examples are measured below, `max_held_out` of each site; no figure of the simulation is used.
            few = "project.data.max_held_out=1"
            figures = simulate([*self.overrides(seed), *words, few], folder, self.project.run_timeout_seconds)
            adapter = adapter_of_run(settings, Path(figures["adapter_path"]), "project.resume")
        if seed not in self._clients:
            self._clients[seed] = sites_of(self.settings(seed))
        found = {}
        for site in self._clients[seed]:
            client = replace(site, project=settings.project)
            client.load(adapter)
            if method == ALONE:
                client.load(alone(client).train(1)[0])
            found[client.site.index] = client.evaluate()
        return site_losses(RoundFigures(round=0, eval_loss=None, client_losses=found, eval_sites=sorted(found)))


def sites_of(settings: FederatedSettings) -> list[LoRAClient]:
    """The sites that have a held-out part."""
    base = open_base(settings)
    splits = enumerate(read_all(settings, base.tokenizer))
    return [
        LoRAClient(settings.project, settings.seed, Site(index), base, split)
        for index, split in splits
        if split.held_out
    ]


def alone(client: LoRAClient) -> LoRAClient:
    """The same site in a federation of one round, which has all steps."""
    project = client.project
    return replace(client, project=replace(project, rounds=1, local_steps=project.rounds * project.local_steps))


@contextmanager
def prepared(settings: FederatedNaturalBenchSettings, folder: Path) -> Iterator[Federations]:
    """The federations, once their sites and their base model are in the cache."""
    project, cache = settings.project, path_of(settings.project.cache, "project.cache")
    require_writable(cache, "project.cache")
    made = cache / digest([settings.model, settings.seed, project.package, project.site_bytes, project.base])
    if not made.exists():
        addresses = fetch_addresses(project.package, project.fetch_timeout_seconds)
        with whole_folder(made) as new:
            divide_addresses(addresses, project.base.presidents, project.site_bytes, new / "base", new / "sites")
            train_base(new / "base", settings, project.base, new / "model")
    yield Federations(settings, made, folder)


def base(federations: Federations) -> Row:
    """The base model's size and training."""
    figures: Row = json.loads((federations.cache / "model" / FIGURES).read_text(encoding="utf-8"))
    sites = sum(1 for _ in (federations.cache / "sites").iterdir())
    perplexity = math.exp(figures.pop("eval_loss"))
    return {**figures, "perplexity": perplexity, "sites": sites}


def methods(federations: Federations) -> list[Row]:
    """A row for each method."""
    names = [BEFORE, ALONE, *federations.methods]
    before = federations.perplexities(BEFORE)
    return [row_of(name, federations.losses(name), before) for name in names]


def row_of(name: str, losses: list[SiteLosses], before: list[float]) -> Row:
    """The perplexities of one method, and their ratio to those before training."""
    row: Row = {
        "name": name,
        "mean_perplexity": Sample.of(means := [mean_perplexity(found) for found in losses]),
        "p10_perplexity": Sample.of([math.exp(found.worst_tenth or 0.0) for found in losses]),
        "worst_perplexity": Sample.of([math.exp(found.worst or 0.0) for found in losses]),
        "over_before": ratio(means, before),
    }
    return row if name == BEFORE else judged(name, row, "over_before below 1", row["over_before"].high < 1)


def papers(federations: Federations) -> list[Row]:
    """What is reported of each pair of methods, and what was found."""
    known = {BEFORE, ALONE, *federations.methods}
    return [
        row
        for better, worse, source in PAPERS
        if {better, worse} <= known
        for row in [compared(better, worse, source, federations)]
    ]


def compared(better: str, worse: str, source: str, federations: Federations) -> Row:
    """A report is confirmed, or contradicted, where all seeds agree, and differ by more than `NO_DIFFERENCE`."""
    found = ratio(federations.perplexities(better), federations.perplexities(worse))
    if found.high < 1 - NO_DIFFERENCE:
        verdict = "confirmed"
    elif found.low > 1 + NO_DIFFERENCE:
        verdict = "contradicted"
    else:
        verdict = f"undecided: seeds disagree, or differ by less than {NO_DIFFERENCE:.1%}"
    return {"name": f"{better} under {worse}", "source": source, "perplexity_ratio": found, "verdict": verdict}


def uplink(federations: Federations) -> list[Row]:
    """A row for each format."""
    plain = federations.perplexities(PLAIN)
    rows = []
    for codec, most in LARGEST_LOSS.items():
        found = ratio(federations.perplexities(PLAIN, f"project.compression.uplink={codec.name}"), plain)
        row: Row = {"name": codec.name, "over_float32": found}
        if most < math.inf:
            holds = max(abs(found.low - 1), abs(found.high - 1)) <= most
            row = judged(f"uplink {codec.name}", row, f"over_float32 of every seed within {most:.1%}", holds)
        rows.append(row)
    return rows


def large(federations: Federations) -> list[Row]:
    """A row before and one after plain averaging."""
    own = federations.with_large_model()
    before = own.perplexities(BEFORE)
    return [{"overrides": own.project.large, **row_of(name, own.losses(name), before)} for name in (BEFORE, PLAIN)]


def mean_perplexity(losses: SiteLosses) -> float:
    """Perplexity of the mean loss over the sites, which count as equal."""
    return math.exp(statistics.fmean(losses.by_site.values()))


main = entry.command("fed_natural_bench", FederatedNaturalBenchSettings, run)

if __name__ == "__main__":
    main()
