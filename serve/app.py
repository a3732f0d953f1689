"""The routes: from a request's body to its reply, whole or as a stream."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from serve import bodies
from serve.choice import Piece, TokenReport
from serve.faults import RETRY_SECONDS, RequestFault, wrong
from serve.fields import Fields
from serve.generation import Generation, Told
from serve.journal import Journals
from serve.metrics import Metrics
from serve.models.adapters import Adapters
from serve.models.served import Models, ServedModel
from serve.models.writer import Counts, InLine, PromptTokens
from serve.replies import Replies, as_json, comment, event
from serve.settings import ServeProjectSettings
from serve.text_request import Limits, TextRequest, messages_of, read_chat, read_completion

log = logging.getLogger(__name__)

Done = TypeVar("Done")

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class State:
    """What the routes share."""

    project: ServeProjectSettings
    models: Models
    journals: Journals | None
    metrics: Metrics
    about: Callable[[], dict[str, Any]]
    """What runs where, for the page."""
    adapters: Adapters | None = None
    is_ending: bool = False
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a request is read in a thread."""
    running: dict[str, Generation] = field(default_factory=dict)
    """Requests by id."""

    def forget(self, generation: Generation) -> None:
        """Count a request no more among those that run."""
        if self.running.get(generation.name) is generation:
            del self.running[generation.name]

    def uses(self, model: ServedModel) -> bool:
        """Whether a request that runs needs this model."""
        return any(one.writer is model.writer for one in self.running.values())

    @property
    def limits(self) -> Limits:
        """The server's own values for fields that a request does not name."""
        project = self.project
        return Limits(
            max_new_tokens=project.max_new_tokens, temperature=project.temperature, choices=project.max_choices
        )

    def check_open(self) -> None:
        """RequestFault (503) if the server is ending."""
        if self.is_ending:
            raise RequestFault(503, "the server is ending", retry_after=RETRY_SECONDS)

    def check_room(self, choices: int) -> None:
        """RequestFault (429) if all places are taken."""
        taken = sum(len(one.choices) for one in self.running.values())
        most = self.project.sessions + self.project.max_waiting
        if taken + choices > most and taken:
            rule = f"texts that run or wait must be at most {most} (project.sessions + project.max_waiting)"
            raise RequestFault(
                429, f"{rule}, and {taken} are: try again later", code="queue_full", retry_after=RETRY_SECONDS
            )


def make_app(state: State) -> FastAPI:
    """The app with all its routes."""
    app = FastAPI(title="distributed-llm-lab", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page), "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    @app.exception_handler(RequestFault)
    async def refuse(request: Request, fault: RequestFault) -> Response:
        state.metrics.refused(fault.status)
        return JSONResponse(fault.body, fault.status, fault.headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        about = f"{request.method} {request.url.path}"[:200]
        known = "texts come from /v1/chat/completions and /v1/completions, and /openapi.json lists all paths"
        fault = RequestFault(error.status_code, f"{about} is not served here ({error.detail}): {known}")
        state.metrics.refused(fault.status)
        return JSONResponse(fault.body, fault.status, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        log.error("a request ends by a fault of ours", exc_info=error)
        return JSONResponse(RequestFault(500, "the server failed on this request: its log says why").body, 500)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """The chat page."""
        return HTMLResponse(page, headers=headers)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Whether the server takes requests."""
        state.check_open()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and times, as Prometheus reads them."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/status")
    async def status() -> Response:
        """What runs where, for the page."""
        return JSONResponse(state.about())

    @app.get("/v1/models")
    async def models() -> Response:
        """All models."""
        return JSONResponse(state.models.listed())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        return JSONResponse(state.models.get(name).about(state.models.created))

    @app.post("/tokenize", openapi_extra=bodies.body(bodies.TOKENIZE))
    @app.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        """The ids of a text or of messages."""
        fields = await _fields(request, state)
        model = state.models.get(fields.text("model"))

        def read() -> list[int]:
            if fields.has("messages"):
                return model.texts.ids_of_messages(messages_of(fields))
            text = fields.text("prompt")
            if text is None:
                raise wrong("prompt", "must be a text", None)
            return model.texts.tokenize(text, add_special_tokens=fields.flag("add_special_tokens", True))

        ids = await _in_thread(state, read)
        named = {"token_strs": model.texts.names(ids)} if fields.flag("return_token_strs", False) else {}
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.writer.context, **named})

    @app.post("/detokenize", openapi_extra=bodies.body(bodies.DETOKENIZE, "tokens"))
    @app.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(request: Request) -> Response:
        """The text of ids."""
        fields = await _fields(request, state)
        model = state.models.get(fields.text("model"))
        ids = fields.raw("tokens")
        size = model.texts.vocabulary_size
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < size for one in ids):
            raise wrong("tokens", f"must be a list of token ids in [0, {size})", ids)
        return JSONResponse({"prompt": model.texts.detokenize(ids)})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The tokenizer of the first model."""
        return JSONResponse(state.models.get(None).texts.info())

    @app.post("/v1/chat/completions", openapi_extra=bodies.body(bodies.CHAT, "messages"))
    async def chat(request: Request) -> Response:
        """Continue a chat."""
        return await _answer(state, request, is_chat=True)

    @app.post("/v1/completions", openapi_extra=bodies.body(bodies.COMPLETION, "prompt"))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await _answer(state, request, is_chat=False)

    @app.get("/v1/streams/{name}")
    async def stream(request: Request, name: str) -> Response:
        """Continue a stream whose connection broke, from the position in Last-Event-ID."""
        return await _continue(state, request, name)

    if state.project.load_adapters:
        _add_loading(app, state)
    return app


def _add_loading(app: FastAPI, state: State) -> None:
    """Routes that load and unload adapters, as vLLM has them."""

    def adapters() -> Adapters:
        assert state.adapters is not None, "the gate is closed until there is a model"
        return state.adapters

    @app.post("/v1/load_lora_adapter", openapi_extra=bodies.body(bodies.LOAD, "lora_name", "lora_path"))
    async def load(request: Request) -> Response:
        """Offer an adapter."""
        fields = await _fields(request, state)
        name, path = fields.text("lora_name"), fields.text("lora_path")
        if not name or not path:
            raise wrong("lora_path" if name else "lora_name", "must be a text", path if name else name)
        model = await adapters().load(name, path)
        return JSONResponse(model.about(state.models.created))

    @app.post("/v1/unload_lora_adapter", openapi_extra=bodies.body(bodies.UNLOAD, "lora_name"))
    async def unload(request: Request) -> Response:
        """Offer an adapter no more."""
        name = (await _fields(request, state)).text("lora_name") or ""
        await adapters().unload(name)
        return JSONResponse({"status": "ok"})


def _policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own style and script, known by their digests, and this server."""

    def own(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; style-src {own('style')}; script-src {own('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _fields(request: Request, state: State) -> Fields:
    """The fields of a request's body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # A page of another site can send any other type without asking.
        raise RequestFault(415, f"Content-Type must be application/json, got {kind[:100]!r}")
    most, pieces, size = state.project.max_body_bytes, [], 0
    try:
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise RequestFault(413, f"the body must be at most {most} bytes (project.max_body_bytes)")
    except ClientDisconnect:
        raise RequestFault(400, "the body ended early") from None
    return Fields.parse(b"".join(pieces))


async def _answer(state: State, request: Request, *, is_chat: bool) -> Response:
    fields = await _fields(request, state)
    state.check_open()
    model = state.models.get(fields.text("model"))
    asked = await _in_thread(state, lambda: _read(model, fields, state.limits, is_chat=is_chat))
    if is_chat and (fields.raw("tools") or fields.raw("functions")):
        _warn_of_tools()
    most = [asked.new_tokens(len(prompt), model.writer.context, state.limits) for prompt in asked.prompts]
    state.check_room(asked.count)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(16)}"
    about = About(created=int(time.time()), model=model.id)
    generation = _generation(state, name, model, asked, most, request)
    if not asked.is_stream:
        return await _whole(state, request, model, generation, about)
    if state.journals is not None:
        head = {
            **msgspec.to_builtins(about),
            "fingerprint": model.fingerprint,
            "adapter": state.adapters.name_of(model) if state.adapters else None,
            "request": msgspec.to_builtins(asked),
            "most": most,
        }
        try:
            generation.journal = state.journals.new(name, head)
        except OSError as error:
            log.warning("project.journal cannot be written (%s): this stream cannot be continued", error)
    return _Stream(state, generation, _told(state, model, generation, about, None, []))


@dataclass(frozen=True)
class About:
    """What every document of a request says of it."""

    created: int
    """Seconds of the epoch."""
    model: str
    """The model's id for clients."""


async def _in_thread(state: State, work: Callable[[], Done]) -> Done:
    """Do what takes a while beside the event loop, one at a time: tokenising, compiling a schema."""
    async with state.reading:
        return await asyncio.to_thread(work)


@cache
def _warn_of_tools() -> None:
    """Say once that tools are ignored: `tool_choice` auto, the only one that is served, allows any answer."""
    log.warning("a request has tools: no model here is shown any, and none makes tool calls")


def _read(model: ServedModel, fields: Fields, limits: Limits, *, is_chat: bool) -> TextRequest:
    asked = (read_chat if is_chat else read_completion)(fields, model.texts, limits)
    if asked.scores_prompt and not model.writer.scores_prompts:
        raise wrong("echo", "must be false with logprobs where a verifier holds the model", True)
    if asked.scores_prompt and asked.is_stream:
        raise wrong("stream", "must be false for the log probabilities of a prompt (echo with logprobs)", True)
    try:
        model.writer.check_schema(asked.rules.get("schema", ""))
    except ValueError as error:
        raise RequestFault(400, str(error), param="response_format") from None
    return asked


def _generation(
    state: State, name: str, model: ServedModel, asked: TextRequest, most: Sequence[int], request: Request
) -> Generation:
    """A generation that counts among those that run."""
    each = [count for count in most for _ in range(asked.choices)]
    generation = Generation(name, asked, model.writer, model.texts, each, _client(request))
    state.running[name] = generation
    return generation


def _replies(model: ServedModel, generation: Generation, about: About) -> Replies:
    return Replies(generation, model.texts, created=about.created, model=about.model, fingerprint=model.fingerprint)


def _client(request: Request) -> str:
    """Whose request it is: the address. The key tells no clients apart: all have the same one, and where the server has
    none, a client may send any."""
    return request.client.host if request.client else ""


async def _whole(state: State, request: Request, model: ServedModel, generation: Generation, about: About) -> Response:
    """The document of all choices; a client that goes away meanwhile stops them."""
    told: list[list[Piece]] = [[] for _ in generation.choices]

    async def generate() -> None:
        async with contextlib.aclosing(_timed(state, model, generation, None)) as events:
            async for one in events:
                if isinstance(one, Told):
                    told[one.choice] += one.pieces

    work, gone = asyncio.create_task(generate()), asyncio.create_task(_is_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestFault(499, "the client is gone")
        await work
    finally:
        for task in (work, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestFault):
            await work
    scores = [_prompt_reports(generation, number) for number in range(len(generation.choices))]
    document = _replies(model, generation, about).whole(scores, told)
    return Response(as_json(document), media_type="application/json")


def _prompt_reports(generation: Generation, number: int) -> Sequence[TokenReport | None]:
    """The tokens of a prompt that is scored; the first one has no probability."""
    scores: PromptTokens | None = generation.prompt_scores[number]
    if scores is None:
        return []
    ids = generation.prompt_of(number)[1:]
    top = scores.top or [()] * len(ids)
    return [None, *(TokenReport(*one) for one in zip(ids, scores.nll, top, strict=True))]


async def _is_gone(request: Request) -> None:
    """Wait until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _timed(
    state: State, model: ServedModel, generation: Generation, keep_alive_seconds: float | None
) -> AsyncGenerator[Told | InLine | None]:
    """The events of a generation, counted by the metrics."""
    began = last = time.monotonic()
    is_first = True
    try:
        async with contextlib.aclosing(generation.run(keep_alive_seconds)) as events:
            async for one in events:
                if isinstance(one, Told):
                    now = time.monotonic()
                    state.metrics.accepted(model.id, one.guesses)
                    if is_first:
                        state.metrics.first_token(model.id, now - began)
                    else:
                        state.metrics.token(model.id, now - last)
                    is_first, last = False, now
                yield one
    finally:
        state.forget(generation)
        reasons = [choice.finish or "left" for choice in generation.choices]
        seconds = time.monotonic() - began
        state.metrics.ended(model.id, reasons, generation.prompt_tokens, generation.new_tokens, seconds)


async def _told(
    state: State,
    model: ServedModel,
    generation: Generation,
    about: About,
    after: list[int] | None,
    before: Sequence[Told],
) -> AsyncIterator[bytes]:
    """The events of a stream.

    Args:
        after: Positions up to which the client has the choices; None: it has nothing.
        before: What a journal told.
    """
    request, replies = generation.request, _replies(model, generation, about)
    choices = range(len(generation.choices))
    at = list(after or [0] * len(choices))
    said = list(at)

    def position() -> str:
        return "-".join(map(str, at))

    def told(one: Told) -> list[bytes]:
        found = []
        for piece in one.pieces:
            at[one.choice] = max(at[one.choice], piece.position)
            counts = zip(at, generation.choices, strict=True)
            chunk = replies.piece(one.choice, piece, sum(min(count, own.position) for count, own in counts))
            if piece.position > said[one.choice]:
                found.append(event(chunk, position()))
        # The last piece is at most one position behind the last token.
        end = generation.choices[one.choice].position + 2
        if one.is_end and said[one.choice] < end:
            at[one.choice] = end
            found.append(event(replies.closing(one.choice), position()))
        return found

    try:
        for number in choices if after is None else ():
            # Only the last of them can be the last event that a client has.
            own = position() if number == choices[-1] else ""
            if request.is_chat:
                yield event(replies.opening(number), own)
            elif request.echo:
                yield event(replies.piece(number, Piece(0, replies.echoed(number))), own)
        for number in choices:
            if generation.most[number] == 0:
                for line in told(Told(number, (), is_end=True)):
                    yield line
        for one in before:
            for line in told(one):
                yield line
        async with contextlib.aclosing(_timed(state, model, generation, state.project.keep_alive_seconds)) as events:
            async for happened in events:
                if happened is None:
                    yield comment("still here")
                elif isinstance(happened, InLine):
                    yield comment(f"waiting, place {happened.place} in line")
                else:
                    for line in told(happened):
                        yield line
        if generation.is_taken_over:
            taken = RequestFault(409, "another connection continues this stream", code="stream_taken")
            yield event(taken.body)  # and no [DONE]: the text goes on
            return
        if request.has_usage:
            yield event(replies.last(), position())
        yield event("[DONE]")
    except RequestFault as fault:
        yield event(fault.body)
        yield event("[DONE]")


class _Stream(StreamingResponse):
    """A stream of a generation, which ends with it, even if its first event was never read."""

    def __init__(self, state: State, generation: Generation, told: AsyncIterator[bytes]) -> None:
        super().__init__(told, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._state, self._generation = state, generation

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.leave()
            self._state.forget(self._generation)


async def _continue(state: State, request: Request, name: str) -> Response:
    """Tell a stream again from a position on, and generate what is left of it."""
    if state.journals is None:
        raise RequestFault(404, "project.keep_seconds must not be 0 for streams that can be continued")
    state.check_open()
    head = state.journals.head(name)
    asked, most = msgspec.convert(head["request"], TextRequest), head["most"]
    after = _positions(request, asked.count)
    model = state.models.with_fingerprint(head["fingerprint"])
    if model is None and state.adapters is not None:
        model = await state.adapters.of_fingerprint(head["fingerprint"], head["adapter"])
    if model is None:
        rule = f"the stream began at {head['fingerprint']}, which this server has not"
        raise RequestFault(409, f"{rule}: its text would have two unequal halves", code="other_model")
    # From here on nothing waits: no other connection can come between.
    old = state.running.get(name)
    if old is not None:  # its connection broke, and this server has not noticed
        old.is_taken_over = True
        old.leave()
        state.forget(old)
    state.check_room(asked.count)
    events, journal = state.journals.read(name)
    try:
        generation = _generation(state, name, model, asked, most, request)
        generation.journal = journal
        before = generation.retell(events)
    except BaseException:
        journal.close()
        raise
    about = About(created=head["created"], model=head["model"])
    return _Stream(state, generation, _told(state, model, generation, about, after, before))


def _positions(request: Request, count: int) -> list[int] | None:
    """The positions in Last-Event-ID; None without it: from the beginning."""
    given = request.headers.get("last-event-id")
    if not given:
        return None
    found = given.split("-")
    if len(found) != count or not all(one.isascii() and one.isdecimal() and len(one) < 10 for one in found):
        raise wrong("Last-Event-ID", f"must be {count} numbers joined by -, as the stream's events have them", given)
    return list(map(int, found))


def all_counts(models: Models) -> Mapping[str, Counts]:
    """The counts of each model's writer."""
    return {name: model.writer.counts() for name, model in models.by_id.items()}
