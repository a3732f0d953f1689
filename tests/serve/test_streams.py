"""Streams that broke: continued from any position, by another connection or by another server, with the same text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.serve.servers import Client, Event, said, serving

ASKED = {"prompt": "On the first day", "max_tokens": 40, "seed": 11, "temperature": 1.0}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


@pytest.fixture(scope="module")
def server(journal: Path) -> Iterator[Client]:
    with serving(journal) as client:
        yield client


def test_a_stream_is_the_text_without_a_stream(server: Client) -> None:
    whole = server.complete(**ASKED, logprobs=2)
    with server.streaming(**ASKED, logprobs=2) as events:
        found = list(events)
    assert said(found) == whole["choices"][0]["text"]
    reports = [part["logprobs"] for one in found for part in one.data["choices"] if part["logprobs"]]
    tokens = [token for report in reports for token in report["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]


@pytest.mark.parametrize("choices", [1, 3])
def test_a_stream_goes_on_from_every_position(server: Client, choices: int) -> None:
    with server.streaming(**ASKED, n=choices) as events:
        found = list(events)
    name = found[0].data["id"]
    texts = [said(found, choice) for choice in range(choices)]
    for place in range(0, len(found), 3):
        rest = server.continued(name, found[place].id)
        for choice in range(choices):
            assert said([*found[: place + 1], *rest], choice) == texts[choice], f"after event {place}"
    assert [said(server.continued(name, ""), choice) for choice in range(choices)] == texts


def test_a_connection_that_breaks_in_the_middle_is_taken_up_by_another(server: Client) -> None:
    text = server.text(**ASKED)
    for count in (1, 5, 20):
        with server.streaming(**ASKED) as events:
            begun = list(islice(events, count))
        rest = server.continued(begun[0].data["id"], begun[-1].id)
        assert said([*begun, *rest]) == text


def test_another_connection_takes_over_while_the_first_still_reads(server: Client) -> None:
    text = server.text(**ASKED)
    with server.streaming(**ASKED) as events:
        begun = list(islice(events, 3))
        rest = server.continued(begun[0].data["id"], begun[-1].id)
    assert said([*begun, *rest]) == text


def test_a_stream_outlives_its_server(tmp_path: Path) -> None:
    begun: list[list[Event]] = []
    with serving(tmp_path) as first:
        text = first.text(**ASKED)
        for count in (1, 4, 17):
            with first.streaming(**ASKED) as events:
                begun.append(list(islice(events, count)))
                if count == 17:
                    first.role.process.kill()
                    first.role.process.wait(10)
    cut = tmp_path / f"{begun[1][0].data['id']}.jsonl"
    cut.write_bytes(cut.read_bytes()[:-7])  # as a kill in the middle of a write leaves it
    with serving(tmp_path) as second:
        for one in begun:
            assert said([*one, *second.continued(one[0].data["id"], one[-1].id)]) == text
        rest = second.get(f"/v1/streams/{begun[0][0].data['id']}", headers={"Last-Event-ID": "1-2"})
        assert rest.status_code == 400
    # What the request left to the server stays as it was, whatever the server is set to now.
    unset = {"prompt": "On the first day", "max_tokens": 40, "seed": 11}
    with serving(tmp_path, "project.temperature=0.9") as first:
        text = first.text(**unset)
        with first.streaming(**unset) as events:
            start = list(islice(events, 3))
    with serving(tmp_path, "project.temperature=0", "project.max_new_tokens=5") as second:
        assert said([*start, *second.continued(start[0].data["id"], start[-1].id)]) == text
    other = ("model.seed=5",)
    with serving(tmp_path, *other) as third:
        refused = third.get(f"/v1/streams/{begun[0][0].data['id']}")
        assert refused.status_code == 409, "another model's half would be told as this one's"
        assert "two unequal halves" in refused.json()["error"]["message"]


@pytest.mark.parametrize("choices", [1, 2])
def test_what_is_told_again_is_in_order_and_can_break_again(server: Client, choices: int) -> None:
    """A finished stream, continued, and broken after its first events: the end never comes before the text."""
    with server.streaming(**ASKED, n=choices, logprobs=1) as events:
        found = list(events)
    name = found[0].data["id"]
    texts = [said(found, choice) for choice in range(choices)]
    again = server.continued(name, found[4].id)
    assert [one.data["choices"] for one in again] == [one.data["choices"] for one in found[5:]], "offsets among them"
    assert [one.id for one in again] == [one.id for one in found[5:]]
    for place in (0, 1, 5):
        rest = server.continued(name, again[place].id)
        whole = [*found[:5], *again[: place + 1], *rest]
        assert [said(whole, choice) for choice in range(choices)] == texts
    assert server.continued(name, found[-1].id) == []


def test_what_is_echoed_is_told_once(server: Client) -> None:
    with server.streaming(**ASKED, echo=True, n=2) as events:
        found = list(events)
    name = found[0].data["id"]
    assert [one.id for one in found[:2]] == ["", "0-0"]
    for choice in range(2):
        text = said(found, choice)
        assert text.startswith(str(ASKED["prompt"]))
        assert said([*found[:2], *server.continued(name, "0-0")], choice) == text
        assert said(server.continued(name, ""), choice) == text


def test_usage_counts_what_was_told(server: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with server.streaming(**ASKED, stream_options=options) as events:
        found = list(events)
    counts = [one.data["usage"]["completion_tokens"] for one in found]
    assert counts == sorted(counts)
    again = server.continued(found[0].data["id"], found[2].id)
    assert [one.data["usage"]["completion_tokens"] for one in again] == counts[3:]
    many = server.complete(prompt="x" * 300, n=3, max_tokens=2)["usage"]
    many = server.complete(prompt="x" * 300, n=3, max_tokens=2)["usage"]
    assert many["prompt_tokens_details"]["cached_tokens"] <= many["prompt_tokens"] == 300


def test_no_other_file_is_read(server: Client, journal: Path) -> None:
    (journal / "secret.jsonl").write_text('{"version":1}\n')
    for name in ("secret", "..%2Fsecret", "cmpl-" + "0" * 32, "cmpl-" + "0" * 31 + "\u0661"):
        assert server.get(f"/v1/streams/{name}").status_code == 404
    assert all(path.stat().st_mode & 0o077 == 0 for path in journal.glob("cmpl-*.jsonl"))
