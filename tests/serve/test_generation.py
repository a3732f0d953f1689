"""A request's texts on their way: what stops them, and that a text which was cut never looks whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import pytest

from lab.engine.sampling import Sampling
from serve.choice import Choice
from serve.faults import RequestFault
from serve.generation import Generation, Told
from serve.models.tokens import ModelTexts
from serve.models.writer import Counts, Ended, Event, InLine, NewTokens, Receive, Writer
from serve.text_request import TextRequest
from speculative.request import GenerationRequest
from tests.serve.texts import byte_texts


class Scripted(Writer):
    """Says what a test tells it to."""

    vocabulary_size, context, end_ids, scores_prompts = 259, 64, (256,), False

    def __init__(self) -> None:
        self.fingerprints: dict[str, str] = {}
        self.finished: Future[None] = Future()
        self.receive: dict[Hashable, Receive] = {}
        self.left: list[Hashable] = []

    def check_schema(self, schema: str) -> None:
        return

    def begin(self, key: Hashable, request: GenerationRequest, client: str, user: str, receive: Receive) -> None:
        self.receive[key] = receive

    def leave(self, key: Hashable) -> None:
        if self.receive.pop(key, None) is not None:
            self.left.append(key)

    def counts(self) -> Counts:
        return Counts()

    def start(self) -> None:
        return

    def close(self) -> None:
        return

    def say(self, event: Event) -> None:
        """To all that listen."""
        for receive in list(self.receive.values()):
            receive(event)


@pytest.fixture(scope="module")
def texts() -> ModelTexts:
    return byte_texts()


def asked(**changes: object) -> TextRequest:
    fields: dict[str, object] = {
        "is_chat": False, "prompts": [[65]], "choices": 1, "max_new_tokens": 8, "sampling": Sampling.greedy(),
        "rules": {}, "stops": [], "logprobs": None, "echo": False, "is_stream": True, "has_usage": False,
        "has_usage_always": False, "is_speculative": True, "has_token_ids": False, "shows_guesses": False, "user": "",
    }  # fmt: skip
    return TextRequest(**(fields | changes))  # type: ignore[arg-type]


def generated(texts: ModelTexts, script: Callable[[Scripted, Generation], None], **changes: object) -> list[str]:
    """The pieces that come while a script speaks for the model."""
    writer, found = Scripted(), list[str]()
    generation = Generation("cmpl-1", asked(**changes), writer, texts, [8], "client")

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.01, script, writer, generation)
        async for event in generation.run():
            if isinstance(event, Told):
                found.extend(piece.text for piece in event.pieces)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert not writer.receive, "a text that is done computes on"
    return found


def test_a_text_ends_with_its_end_token_its_length_or_a_stop_string(texts: ModelTexts) -> None:
    assert generated(texts, lambda writer, _: writer.say(NewTokens([*b"abc", 256, *b"later"], 0))) == ["a", "b", "c"]
    assert "".join(generated(texts, lambda writer, _: writer.say(NewTokens(list(b"abcdefghijk"), 0)))) == "abcdefgh"
    said = generated(texts, lambda writer, _: writer.say(NewTokens(list(b"ab--cd"), 0)), stops=["--"])
    assert "".join(said) == "ab"


def test_a_server_that_ends_never_makes_a_text_look_whole(texts: ModelTexts) -> None:
    def cut(writer: Scripted, generation: Generation) -> None:
        writer.say(NewTokens(list(b"ab"), 0))
        generation.leave()

    with pytest.raises(RequestFault, match="not finished") as cut_short:
        generated(texts, cut)
    assert cut_short.value.status == 503


def test_a_stream_that_goes_on_elsewhere_ends_here_without_a_fault(texts: ModelTexts) -> None:
    def taken(writer: Scripted, generation: Generation) -> None:
        generation.is_taken_over = True
        generation.leave()

    assert generated(texts, taken) == []


def test_a_fault_of_the_model_is_the_request_s(texts: ModelTexts) -> None:
    with pytest.raises(RequestFault, match="a shard is lost"):
        generated(texts, lambda writer, _: writer.say(Ended("a shard is lost")))
    with pytest.raises(RequestFault, match="the line is full") as crowded:
        generated(texts, lambda writer, _: writer.say(Ended("the line is full", is_full=True)))
    assert crowded.value.status == 429
    with pytest.raises(RequestFault, match="ended early"):
        generated(texts, lambda writer, _: writer.say(Ended()))
    generated(texts, lambda writer, _: (writer.say(InLine(2)), writer.say(NewTokens([256], 0))))  # type: ignore[func-returns-value]


def test_pieces_do_not_depend_on_how_many_tokens_arrive_together(texts: ModelTexts) -> None:
    ids = list("Größe: 3 €, ok--no".encode())
    straight = Choice(texts, ["--"], 99, has_reports=True)
    expected = [piece for one in ids for piece in straight.add(NewTokens([one], 0, [1.0], [[]]))]
    for size in (2, 3, 7, 99):
        choice = Choice(texts, ["--"], 99, has_reports=True)
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        found = [
            piece for part in parts for piece in choice.add(NewTokens(part, 0, [1.0] * len(part), [[]] * len(part)))
        ]
        assert [(one.position, one.text, one.tokens) for one in found] == [
            (one.position, one.text, one.tokens) for one in expected
        ]
    assert "".join(piece.text for piece in expected) == "Größe: 3 €, ok"
    assert [one.id for piece in expected for one in piece.tokens] == ids[: ids.index(ord("-"))]


def test_draft_tokens_that_a_stop_string_drops_are_not_counted(texts: ModelTexts) -> None:
    choice = Choice(texts, ["cd"], 99, has_reports=False)
    choice.add(NewTokens(list(b"abcdefgh"), 7))
    assert (choice.text, choice.guesses, choice.position) == ("ab", 4, 4)
