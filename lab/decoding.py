"""How fast an engine goes on with several full texts at once. Any engine: whole, split, synthetic.

Every text fills its window: prompts of `context - new_tokens` tokens, then `new_tokens` more, so that the timed tokens
see as much context as there is room for. What the tokens are changes no time, so they come from a hash.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

from lab.engine.base import Engine
from lab.engine.sampling import Sampling, mix64

WARM_UP_TOKENS = 4


def decode(
    engine: Engine, *, context: int, sessions: int, new_tokens: int, sampling: Sampling | None = None
) -> dict[str, Any]:
    """Figures of `sessions` texts in step, one pass a token; greedy unless `sampling` says otherwise.

    Returns:
        `time_to_first_token_seconds`: all prompts in one batch, until each text has its first token.
        `token_seconds_p50`: median time of a pass, which gives every text one token.
        `tokens_per_second`: of all texts together, prompts left out.

    Raises:
        ValueError: `new_tokens` below 2 or not below `context`.
        CacheFull: the engine has no room for them.
    """
    if not 2 <= new_tokens < context:
        raise ValueError(f"new_tokens must be at least 2 and below context={context}, got {new_tokens}")
    prompts = [_ids(text, context - new_tokens, engine.vocabulary_size) for text in range(sessions)]
    with ExitStack() as stack:
        sampling = sampling or Sampling.greedy()
        texts = [stack.enter_context(engine.open([], sampling, context)) for _ in prompts]
        for text in texts:  # the first passes of a process load kernels and warm caches
            engine.extend([(text, _ids(0, WARM_UP_TOKENS, engine.vocabulary_size))], "last")
            text.position = 0
        began = time.perf_counter()
        steps = engine.extend(list(zip(texts, prompts, strict=True)), "last")
        first_token_seconds = time.perf_counter() - began
        seconds = []
        for _ in range(new_tokens - 1):
            ids = [step.next_ids[-1:] for step in steps]
            began = time.perf_counter()
            steps = engine.extend(list(zip(texts, ids, strict=True)), "last")
            seconds.append(time.perf_counter() - began)
    return {
        "context": context,
        "sessions": sessions,
        "prompt_tokens": context - new_tokens,
        "new_tokens": new_tokens,
        "time_to_first_token_seconds": first_token_seconds,
        "prompt_tokens_per_second": sessions * (context - new_tokens) / first_token_seconds,
        "token_seconds_p50": statistics.median(seconds),
        "tokens_per_second": sessions * len(seconds) / sum(seconds),
    }


def _ids(text: int, count: int, vocabulary_size: int) -> list[int]:
    return [mix64(text << 32 | place) % vocabulary_size for place in range(count)]
