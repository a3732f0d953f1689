"""Replies of the OpenAI API: whole documents, and the chunks of a stream. Keys without a value are left out where
clients take their presence for a meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve.choice import Piece, TokenReport
from serve.generation import Generation
from serve.models.tokens import ModelTexts
from serve.text_request import TextRequest

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON lacks, as OpenAI does."""


class Replies:
    """The documents of one request.

    Args:
        generation: Its texts.
        texts: The tokenizer.
        created: Seconds of the epoch.
        model: Its id for clients.
        fingerprint: `system_fingerprint`.
    """

    def __init__(
        self,
        generation: Generation,
        texts: ModelTexts,
        *,
        created: int,
        model: str,
        fingerprint: str,
    ) -> None:
        self._generation, self._texts = generation, texts
        self._request: TextRequest = generation.request
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        is_chunk = self._request.is_stream and self._request.is_chat
        self._head = {
            "id": generation.name,
            "object": f"{kind}.chunk" if is_chunk else kind,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._offsets = [0] * len(generation.choices)
        """Characters of each completion that its log probabilities have counted."""

    # Streams

    def opening(self, choice: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        return self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, choice: int, piece: Piece, new_tokens: int | None = None) -> dict[str, Any]:
        """A chunk with characters; `new_tokens` are those of all choices then, None: now. Called for every piece, in
        order, whether or not it is sent: the places of log probabilities are counted."""
        body: dict[str, Any] = {"delta": {"content": piece.text}} if self._request.is_chat else {"text": piece.text}
        if self._request.logprobs is not None:
            body["logprobs"] = self._logprobs(choice, piece.tokens)
        if self._request.shows_guesses:
            body["is_guess"] = piece.is_guess
        return self._chunk(choice, body, new_tokens=new_tokens)

    def closing(self, choice: int) -> dict[str, Any]:
        """The chunk with the reason of the end."""
        finish = self._generation.choices[choice].finish
        return self._chunk(choice, {"delta": {}} if self._request.is_chat else {"text": ""}, finish)

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head, "choices": [], "usage": self.usage()}

    # Whole documents

    def whole(
        self, prompt_reports: Sequence[Sequence[TokenReport | None]], told: Sequence[Sequence[Piece]]
    ) -> dict[str, Any]:
        """The document of a request without a stream.

        Args:
            prompt_reports: Of each choice, the tokens of its prompt where they are echoed with log probabilities.
            told: Of each choice, its pieces.
        """
        choices = []
        for number, (choice, pieces) in enumerate(zip(self._generation.choices, told, strict=True)):
            text = "".join(piece.text for piece in pieces)
            body: dict[str, Any] = {"index": number, "finish_reason": choice.finish, "logprobs": None}
            if self._request.is_chat:
                body["message"] = {"role": "assistant", "content": text}
            else:
                body["text"] = self.echoed(number) + text
            if self._request.has_token_ids:
                body["token_ids"] = choice.ids
            if self._request.logprobs is not None:
                reports = [*prompt_reports[number], *(one for piece in pieces for one in piece.tokens)]
                body["logprobs"] = self._logprobs(number, reports)
            choices.append(body)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def echoed(self, choice: int) -> str:
        """The text of a prompt that is to be echoed."""
        return self._texts.detokenize(self._generation.prompt_of(choice)) if self._request.echo else ""

    def usage(self, new_tokens: int | None = None) -> dict[str, Any]:
        """Tokens so far."""
        prompt = self._generation.prompt_tokens
        new = self._generation.new_tokens if new_tokens is None else new_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._generation.cached_tokens},
            "completion_tokens_details": {"accepted_prediction_tokens": self._generation.guesses},
        }

    def _chunk(
        self, choice: int, body: dict[str, Any], finish: str | None = None, new_tokens: int | None = None
    ) -> dict[str, Any]:
        usage: dict[str, Any] = {}
        if self._request.has_usage_always:
            usage = {"usage": self.usage(new_tokens)}
        elif self._request.has_usage:
            usage = {"usage": None}
        logprobs = {} if self._request.is_chat and "logprobs" not in body else {"logprobs": body.pop("logprobs", None)}
        return {**self._head, "choices": [{"index": choice, **body, **logprobs, "finish_reason": finish}], **usage}

    # Log probabilities

    def _logprobs(self, choice: int, reports: Sequence[TokenReport | None]) -> dict[str, Any]:
        return self._of_chat(reports) if self._request.is_chat else self._of_completion(choice, reports)

    def _of_chat(self, reports: Sequence[TokenReport | None]) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(one.id, one.nll), "top_logprobs": [self._entry(id_, nll) for id_, nll in one.top]}
                for one in reports
                if one is not None
            ]
        }

    def _entry(self, token: int, nll: float) -> dict[str, Any]:
        text, own_bytes = self._texts.piece(token)
        return {"token": text, "logprob": _logprob(nll), "bytes": list(own_bytes)}

    def _of_completion(self, choice: int, reports: Sequence[TokenReport | None]) -> dict[str, Any]:
        """Lists by token, the prompt's among them. The first token of a prompt has no probability."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        prompt = self._generation.prompt_of(choice)
        for place, one in enumerate(reports):
            token = prompt[place] if one is None else one.id
            text = self._texts.piece(token)[0]
            found["tokens"].append(text)
            found["text_offset"].append(self._offsets[choice])
            self._offsets[choice] += len(text)
            if one is None:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(_logprob(one.nll))
            top = one.top if any(id_ == one.id for id_, _ in one.top) else [*one.top, (one.id, one.nll)]
            found["top_logprobs"].append({self._texts.piece(id_)[0]: _logprob(nll) for id_, nll in reversed(top)})
        return found


def _logprob(nll: float) -> float | None:
    if nll != nll:  # not known
        return None
    return max(-nll, LEAST_LOGPROB) if nll > 0 else -nll + 0.0


def event(document: Any, position: str = "") -> bytes:
    """One event of a stream, with the position that it leads to."""
    head = f"id: {position}\n" if position else ""
    return f"{head}data: {document if isinstance(document, str) else as_json(document)}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that clients ignore, which keeps a connection alive."""
    return f": {text}\n\n".encode()


def as_json(document: Any) -> str:
    """Compact JSON."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
