"""Limits of a verifier, and the reasons for refusing a request."""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.engine.base import Engine, check_ids, check_logit_rules
from speculative.request import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Limits of one verifier, of each of its clients and of each sequence."""

    prefill_chunk: int
    """Most tokens of a prompt in one pass."""
    longest_check: int
    """Most draft tokens of one sequence in one pass."""
    window: int
    """Most draft tokens of one sequence that may wait."""
    lookup: tuple[int, int] | None
    """Longest and shortest n-gram of the verifier's own prompt lookup; None: no lookup."""
    most_waiting: int
    """Most sequences waiting in line."""
    client_texts: int
    """Most concurrent sequences of one client."""
    client_cache_bytes: int
    """Most keys and values that the sequences of one client may need, at their full length."""
    bytes_per_token: int
    """Bytes of keys and values of one token; 0 if the engine does not report them."""
    keep_seconds: float
    """Time for which a sequence is kept after its connection has ended."""
    prefix_tokens: int
    """Most tokens of prompts kept after their sequences have ended, for later prompts that begin alike; 0: none."""
    idle_seconds: float
    """Time limit of a sequence of mode sync without a DRAFT."""

    def refusal_by_client(self, request: GenerationRequest, others: Sequence[GenerationRequest]) -> str | None:
        """The reason to refuse this request to a client with the requests `others`; None: it is accepted."""
        if len(others) >= self.client_texts:
            return f"a client may have {self.client_texts} requests at a time (the verifier's project.client.texts)"
        if not self.bytes_per_token:
            return None
        taken = sum(len(other.prompt_ids) + other.max_new_tokens for other in others)
        why = f"a client's requests may need {self.client_cache_bytes} bytes of keys and values, its "
        why += "project.client.cache_bytes" + (f", and {taken} tokens are taken" if taken else "")
        return _refusal_by_length(request, self.client_cache_bytes // self.bytes_per_token - taken, why)


def refusal_by_engine(request: GenerationRequest, engine: Engine) -> str | None:
    """The reason why an engine could never serve a request; None if it could."""
    if not request.prompt_ids:
        return "prompt must hold at least one token, got none"
    try:
        check_ids(request.ids, engine.vocabulary_size)
    except ValueError as error:
        return f"prompt must hold tokens that the target has rows for: {error}"
    try:
        check_logit_rules(engine, request.sampling)
    except ValueError as error:
        return str(error)
    rules = request.sampling.logit_rules
    if request.threshold is not None and rules is not None and rules.schema:
        return (
            "rule must be exact with a schema: rule cross_entropy accepts draft tokens that the schema does not allow"
        )
    if request.logprobs and not engine.has_logits:
        return "logprobs must be off for a synthetic engine, which has no logits"
    if request.max_new_tokens < 1:
        return f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
    if len(request.new_ids) >= request.max_new_tokens:
        return f"new tokens must be fewer than max_new_tokens {request.max_new_tokens}, got {len(request.new_ids)}"
    why = "its context" if engine.longest == engine.context else "its project.cache_limit_bytes"
    return _refusal_by_length(
        request, engine.longest, f"a request to this verifier has room for {engine.longest} tokens, {why}"
    )


def _refusal_by_length(request: GenerationRequest, most: int, why: str) -> str | None:
    length = len(request.prompt_ids)
    if length + request.max_new_tokens <= most:
        return None
    if length >= most:
        return f"prompt must be at most {max(0, most - 1)} tokens here ({why}), got {length}"
    return (
        f"project.max_new_tokens must be at most {most - length} here for a prompt of {length} tokens ({why}), "
        f"got {request.max_new_tokens}"
    )
