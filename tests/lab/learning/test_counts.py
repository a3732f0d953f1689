"""The counts of a reader against a plain reading of the same file: 200 random files of the six formats."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.client import Site, read_split
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.learning.counts import Counts
from lab.models.conversion import byte_tokenizer
from lab.settings import UserError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% for c in m['tool_calls'] %}"
    "<{{ c['function']['name'] }}>{% endfor %}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
LENGTH = 32
END = "\0"  # stands for the one end token

Turns = list[tuple[str, str, str]]
"""Role, text, and the name of a tool that is called."""


def pair(prompt: str, answer: str) -> Turns:
    return [("user", prompt, ""), ("assistant", answer, "")]


def as_messages(turns: Turns) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
            | ({"tool_calls": [{"function": {"name": call, "arguments": "{}"}}]} if call else {})
            for role, text, call in turns
        ]
    }


def as_sharegpt(turns: Turns) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": text} for role, text, _ in turns]}


words = st.text(st.sampled_from("abcé "), min_size=1, max_size=24).map(lambda text: text + ".")
pairs = st.builds(pair, words, words)
turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), words, st.just("")), min_size=1, max_size=5
)
calling = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), words, st.just("")) | st.just(("assistant", "", "add")),
    min_size=1,
    max_size=4,
)
lines = st.one_of(
    pairs.map(lambda t: (t, {"prompt": t[0][1], "response": t[1][1]})),
    pairs.map(lambda t: (t, {"prompt": t[0][1], "completion": t[1][1], "id": 3})),
    pairs.map(lambda t: (t, {"instruction": t[0][1], "input": "", "output": t[1][1]})),
    turns.map(lambda t: (t, as_sharegpt(t))),
    calling.map(lambda t: (t, as_messages(t))),
    words.map(lambda text: (text, {"text": text * 2})),
)


def plain_reading(read: list[tuple[Any, Any]], row_count: int) -> dict[str, int]:
    """What a person with a pencil would count; by bytes, since the tokenizer has one token a byte."""
    counts: Counter[str] = Counter(lines_read=row_count)
    for turns, row in read:
        if isinstance(turns, str):
            size = len(row["text"].encode()) + 1
            full, rest = divmod(size, LENGTH)
            counts["examples"] += full + (rest > 1)
            continue
        shown, ends, within = 0, [], False
        for index, (role, text, call) in enumerate(turns):
            shown += len("[x]")
            if role == "assistant" and index:
                within |= shown < LENGTH
                ends.append(shown + len(text.encode()) + len(f"<{call}>" * bool(call)) + 1)
            shown += len(text.encode()) + len(f"<{call}>" * bool(call)) + 1 + len("\n")
        late = sum(end > LENGTH for end in ends)
        counts["lines_skipped"] += not ends
        counts["lines_masked"] += bool(ends) and not within
        counts["lines_cut"] += within and late > 0
        counts["answers"] += len(ends)
        counts["answers_cut"] += late
        counts["longest_tokens"] = max(counts["longest_tokens"], *ends, 0)
        counts["examples"] += within
    return counts


@pytest.fixture(scope="module")
def project() -> FederatedSettings:
    words = "model=random project.data.source=jsonl project.num_clients=1 project.data.held_out_fraction=0.3"
    return compose_settings("fed_learn", f"{words} project.data.sequence_length={LENGTH}", FederatedSettings)


@settings(max_examples=200, deadline=None)
@given(read=st.lists(lines, min_size=1, max_size=12), seed=st.integers(0, 99))
def test_the_counts_of_random_files_are_those_of_a_plain_reading(
    read: list[tuple[Any, Any]], seed: int, project: FederatedSettings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "counted.jsonl"
    blank = random.Random(seed)
    rows = [json.dumps(row, ensure_ascii=bool(seed % 2)) for _, row in read]
    path.write_text("".join(blank.choice(["", "\n", "  \n"]) + row + "\n" for row in rows), encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    expected = plain_reading(read, len(rows))
    try:
        split = read_split(project, Site(0, str(path)), tokenizer)
    except UserError as error:
        assert "must give each reader an example to train on" in str(error)  # noqa: PT017 (its figures are below)
        assert f"got {len(rows)} lines read: {expected['lines_skipped']} skipped, " in str(error)  # noqa: PT017
        return
    counts = asdict(split.counts)
    fates = {name: counts.pop(name) for name in [*counts] if name.startswith("examples_")}
    assert sum(fates.values()) == expected.pop("examples"), "each example has one fate"
    assert fates["examples_trained"] == len(split.train)
    assert fates["examples_held_out"] == len(split.held_out)
    assert counts.pop("answer_tokens") == sum(int(example.counted_T[1:].sum()) for example in split.train)
    assert counts == {name: expected[name] for name in counts}
    distinct = {example.ids_T.tobytes() for example in split.train + split.held_out}
    assert len(distinct) == len(split.train) + len(split.held_out)


def test_counts_add_up_but_for_the_longest() -> None:
    both = Counts(lines_read=2, longest_tokens=9) + Counts(lines_read=3, longest_tokens=7)
    assert (both.lines_read, both.longest_tokens) == (5, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lines_read": -1}, "lines_read must be a whole number from 0 on, got -1"),
        ({"lines_read": 1.0}, "lines_read must be a whole number from 0 on, got 1.0"),
        ({"lines_read": True}, "lines_read must be a whole number from 0 on, got True"),
        ({"the secret": 1}, "the secret is unknown or missing"),
    ],
)
def test_counts_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Counts.checked(asdict(Counts()) | change)
