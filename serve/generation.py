"""All choices of one request on their way: begun at a writer, journaled, stopped when the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from serve.choice import Choice, Piece
from serve.faults import RETRY_SECONDS, RequestFault
from serve.journal import Journal
from serve.models.tokens import ModelTexts
from serve.models.writer import Ended, Event, InLine, NewTokens, PromptTokens, Writer
from serve.text_request import TextRequest
from speculative.request import GenerationRequest
from speculative.settings import Mode

log = logging.getLogger(__name__)

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Told:
    """Pieces of one choice that can be sent now."""

    choice: int
    pieces: Sequence[Piece]
    is_end: bool = False
    """Whether the choice is complete with these pieces."""
    guesses: int = 0
    """Draft tokens that the target accepted in the pass of these pieces."""


class Generation:
    """The texts of one request.

    Args:
        name: Its id for clients.
        request: What is asked for.
        writer: The model.
        texts: Its tokenizer.
        most: Most new tokens of each choice.
        client: Address that the request came from.
    """

    def __init__(
        self,
        name: str,
        request: TextRequest,
        writer: Writer,
        texts: ModelTexts,
        most: Sequence[int],
        client: str,
    ) -> None:
        self.name, self.request = name, request
        self.journal: Journal | None = None
        self.is_left = False
        self.is_taken_over = False
        """Whether another connection continues the stream."""
        self.prompt_scores: list[PromptTokens | None] = [None] * request.count
        """Of each choice, its prompt under the model, where that is asked for."""
        self._cached = [0] * request.count
        self.writer, self._client = writer, client
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        # A stream that goes on under its name gets nothing that was on its way to the connection before.
        self._keys = [(name, next(_NUMBERS), number) for number in range(request.count)]
        self._prompt_of = [prompt for prompt in request.prompts for _ in range(request.choices)]
        self.most = list(most)
        self.choices = [Choice(texts, request.stops, own, has_reports=request.logprobs is not None) for own in most]
        self._requests = [self._request(number) for number in range(len(self.choices))]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.request.prompts))

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that no choice had to compute again."""
        each = self.request.choices
        return sum(min(self._cached[first : first + each]) for first in range(0, len(self._cached), each))

    @property
    def guesses(self) -> int:
        """Draft tokens in the texts."""
        return sum(choice.guesses for choice in self.choices)

    @property
    def new_tokens(self) -> int:
        """New tokens of all choices so far."""
        return sum(choice.position for choice in self.choices)

    def prompt_of(self, number: int) -> Sequence[int]:
        """The prompt of a choice."""
        return self._prompt_of[number]

    def retell(self, events: Sequence[tuple[int, NewTokens]]) -> list[Told]:
        """Continue the choices by what a journal holds of them, before `run`."""
        return [self._told(number, new) for number, new in events]

    def _told(self, number: int, new: NewTokens) -> Told:
        choice = self.choices[number]
        was_open = choice.finish is None
        pieces = choice.add(new)
        return Told(number, pieces, was_open and choice.finish is not None, new.guesses)

    async def run(self, keep_alive_seconds: float | None = None) -> AsyncGenerator[Told | InLine | None]:
        """Generate all choices to their ends. Yields what can be sent, places in line, and None when nothing came for
        `keep_alive_seconds`. Leaving the iterator early stops everything.

        Raises:
            RequestFault: a choice could not be continued.
        """
        open_choices = {
            number
            for number, choice in enumerate(self.choices)
            if choice.finish is None or (self.request.scores_prompt and not choice.ids)
        }
        try:
            for number in sorted(open_choices):
                self._begin(number)
            while open_choices and not self.is_left:
                try:
                    number, event = await asyncio.wait_for(self._events.get(), keep_alive_seconds)
                except TimeoutError:
                    yield None
                    continue
                if number not in open_choices:
                    continue
                if isinstance(event, InLine):
                    yield event
                    continue
                choice = self.choices[number]
                if isinstance(event, PromptTokens):
                    self.prompt_scores[number] = event
                elif isinstance(event, NewTokens):
                    self._note(number, event)
                    self._cached[number] = event.cached_tokens
                    told = self._told(number, event)
                    if choice.finish is not None:
                        open_choices.discard(number)
                        self.writer.leave(self._keys[number])
                    yield told
                else:
                    if event.is_full:
                        raise RequestFault(429, event.fault, code="queue_full", retry_after=RETRY_SECONDS)
                    raise RequestFault(400 if event.is_refused else 503, event.fault or "the text ended early")
            if open_choices and not self.is_taken_over:  # never a text that looks whole
                raise RequestFault(
                    503, "the server is ending, and this text is not finished", retry_after=RETRY_SECONDS
                )
        finally:
            self.leave()

    def leave(self) -> None:
        """Stop all choices that run. A second call does nothing."""
        if self.is_left:
            return
        self.is_left = True
        self._events.put_nowait((-1, Ended()))  # wakes `run`
        for number in range(len(self.choices)):
            self.writer.leave(self._keys[number])
        if self.journal is not None:
            self.journal.touch()
            self.journal.close()

    def _begin(self, number: int) -> None:
        request = self._requests[number]
        own = replace(request, new_ids=tuple(self.choices[number].ids))

        def receive(event: Event) -> None:
            self._events.put_nowait((number, event))

        self.writer.begin(self._keys[number], own, self._client, self.request.user, receive)

    def _request(self, number: int) -> GenerationRequest:
        prompt = self._prompt_of[number]
        try:
            sampling = self.request.sampling_of(number % self.request.choices, len(prompt))
        except ValueError as error:
            raise RequestFault(400, str(error)) from None
        return GenerationRequest(
            prompt_ids=prompt,
            sampling=sampling,
            max_new_tokens=max(1, self.most[number]),  # 0 with a prompt to score: its one token is dropped
            mode=Mode["async"] if self.request.is_speculative else Mode.target_only,
            threshold=None,
            logprobs=self.request.logprobs is not None,
            scores_prompt=self.request.scores_prompt,
        )

    def _note(self, number: int, new: NewTokens) -> None:
        if self.journal is None:
            return
        try:
            self.journal.add(number, new)
        except OSError as error:
            log.warning("a stream's journal could not be written (%s): what is missing in it is computed again", error)
            with contextlib.suppress(OSError):
                self.journal.close()
            self.journal = None
