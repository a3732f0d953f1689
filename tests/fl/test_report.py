from dataclasses import replace
from pathlib import Path

import torch

from fl.report import RoundFigures, history, site_losses, summary
from fl.rounds import ClientRow, Refusal, RoundReport, RunReport


def row(partition: int | None, loss: float, examples: int = 10) -> ClientRow:
    return ClientRow(
        node_id=1_000 + (partition or 0),
        partition_id=partition,
        train_weight=examples,
        evaluate_weight=examples,
        train={"train_loss": loss + 1, "train_seconds": 2.0},
        evaluate={"eval_loss": loss},
        uplink_bytes=110,
        downlink_bytes=100,
    )


def report(number: int, losses: list[float], refused: int = 0) -> RoundReport:
    return RoundReport(
        round=number,
        adapter={"a": torch.zeros(1)},
        train={"train_loss": sum(losses) / len(losses) + 1},
        evaluate={"eval_loss": sum(losses) / len(losses)},
        clients=[row(partition, loss) for partition, loss in enumerate(losses)],
        refused=[Refusal(node_id=9, reason="raised an error")] * refused,
        downlink_bytes=100 * (len(losses) + refused),
        uplink_bytes=110 * len(losses),
        round_seconds=3.0,
        aggregate_seconds=0.25,
    )


def finished(losses: list[float]) -> RunReport:
    rows = [row(partition, loss) for partition, loss in enumerate(losses)]
    mean = {"eval_loss": sum(losses) / len(losses)}
    return RunReport(adapter={}, evaluate=mean, clients=rows, refused=[])


REPORTS = [report(1, [5.0, 4.0]), report(2, [3.0], refused=1)]


def test_a_loss_belongs_to_the_state_before_the_round_that_reports_it() -> None:
    states = history(REPORTS, finished([1.0, 2.0]))
    assert [state.round for state in states] == [0, 1, 2]
    assert [state.eval_loss for state in states] == [4.5, 3.0, 1.5]
    assert [state.client_losses for state in states] == [{0: 5.0, 1: 4.0}, {0: 3.0}, {0: 1.0, 1: 2.0}]
    assert [state.train_loss for state in states] == [None, 5.5, 4.0]
    assert [state.train_seconds for state in states] == [{}, {0: 2.0, 1: 2.0}, {0: 2.0}]


def test_the_last_line_sums_over_rounds_and_counts_bytes_per_message() -> None:
    figures = summary(history(REPORTS, finished([1.0, 2.0])), 99, Path("/a"), [Path("/p.png")])
    assert figures["rounds_completed"] == 2
    assert (figures["eval_loss_before"], figures["eval_loss_after"]) == (4.5, 1.5)
    assert figures["eval_loss_by_round"] == [3.0, 1.5]
    assert (figures["train_seconds"], figures["aggregate_seconds"]) == (6.0, 0.5)
    assert figures["refused"] == ["node 9: raised an error"]
    # Four messages went down, three answers came up: who was refused got the adapter all the same.
    assert (figures["downlink_bytes_per_client_round"], figures["uplink_bytes_per_client_round"]) == (100, 110)


def test_a_client_without_a_partition_goes_by_its_node() -> None:
    [state] = history([], RunReport(adapter={}, evaluate={"eval_loss": 1.0}, clients=[row(None, 1.0)], refused=[]))
    assert state.client_losses == {1_000: 1.0}


def test_rounds_that_sent_nothing_have_no_bytes() -> None:
    states = [RoundFigures(round=number, eval_loss=1.0, client_losses={}, eval_sites=[]) for number in range(3)]
    figures = summary(states, 1, Path("/a"), [])
    assert figures["uplink_bytes_per_client_round"] == figures["downlink_bytes_per_client_round"] == 0


def test_before_and_after_are_means_over_the_sites_that_reported_both() -> None:
    first = report(1, [5.0, 1.0])
    last = RunReport(adapter={}, evaluate={}, clients=[row(0, 4.0), row(2, 90.0)], refused=[])
    states = history([first], last)
    assert [(state.eval_loss, state.eval_sites) for state in states] == [(5.0, [0]), (4.0, [0])]
    assert [state.client_losses for state in states] == [{0: 5.0, 1: 1.0}, {0: 4.0, 2: 90.0}]


def test_a_site_that_holds_nothing_out_has_no_loss() -> None:
    bare = replace(row(1, 9.0), evaluate={}, evaluate_weight=0)
    run = RunReport(adapter={}, evaluate={}, clients=[bare], refused=[])
    [state] = history([], run)
    assert (state.eval_loss, state.client_losses, state.eval_sites) == (None, {}, [])
    assert summary([state], 1, Path("/a"), [])["eval_loss_after"] is None


def test_the_worst_sites_are_told_from_the_mean() -> None:
    losses = {site: 1.0 + site / 10 for site in range(25)} | {30: 9.0}
    state = RoundFigures(round=1, eval_loss=1.0, client_losses=losses, eval_sites=sorted(losses)[:-1])
    found = site_losses(state)
    assert found.by_site == {str(site): losses[site] for site in range(25)}, "site 30 is not in the mean"
    assert (found.median, found.worst, found.worst_site) == (losses[12], losses[24], "24")
    assert found.worst_tenth == losses[22], "of 25 sites, three are the worst tenth"
    assert sum(loss > found.worst_tenth for loss in found.by_site.values()) <= len(found.by_site) / 10
    few = site_losses(RoundFigures(round=1, eval_loss=2.0, client_losses={4: 2.0, 5: 2.0}, eval_sites=[4, 5]))
    assert (few.worst_tenth, few.worst, few.worst_site) == (2.0, 2.0, "4")
    none = site_losses(RoundFigures(round=1, eval_loss=None, client_losses={}, eval_sites=[]))
    assert (none.by_site, none.median, none.worst_tenth, none.worst, none.worst_site) == ({}, None, None, None, None)
    figures = summary(history(REPORTS, finished([1.0, 2.0])), 99, Path("/a"), [])
    assert figures["sites_before"].by_site == {"0": 5.0, "1": 4.0}
    assert (figures["sites_after"].worst, figures["sites_after"].worst_site) == (2.0, "1")
