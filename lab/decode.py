"""Time per token of a whole model on this machine: `python -m lab.decode project.context=1024`.

Every text fills its window: prompts of `context - new_tokens` tokens, then `new_tokens` more, so that the timed tokens
see as much context as there is room for. The tokens themselves do not matter for the time, so they come from a hash.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.command import entry
from lab.engine.settings import CacheSettings
from lab.settings import LabSettings, UserError, register, require, require_at_least, user_errors

if TYPE_CHECKING:
    from lab.engine.base import Engine
    from lab.engine.sampling import Sampling

WARM_UP_TOKENS = 4


@dataclass(kw_only=True)
class DecodeProjectSettings(CacheSettings):
    """Measures a whole model, at the end of texts of `context` tokens."""

    max_new_tokens: int
    """Tokens at the end of each text that are generated and timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(2, self, "max_new_tokens")
        rule = f"context must be greater than max_new_tokens={self.max_new_tokens}"
        require(self.context > self.max_new_tokens, rule, self.context)


@register("decode")
@dataclass(kw_only=True)
class DecodeSettings(LabSettings):
    """All settings of `python -m lab.decode`."""

    project: DecodeProjectSettings

    compiles_layers = True
    takes_adapter = True


def run(settings: DecodeSettings, place: entry.Run) -> dict[str, Any]:
    """Time full windows; return the figures of the last line."""
    from lab.device import open_device, read_memory
    from lab.engine.compiled import Compiler
    from lab.engine.local import LocalEngine
    from lab.models.layers import load_proved, with_adapter
    from lab.tracking import Tracker

    project, device = settings.project, open_device(settings.device)
    model = with_adapter(load_proved(settings.model, device).model, settings.model)
    with Tracker(settings, "decode", place.folder) as tracker:
        with user_errors("project."), room_for_texts():  # a context that the model was not made for
            engine = LocalEngine(
                model,
                sessions=project.sessions,
                context=project.context,
                bucket=project.cache_bucket,
                kv_limit_bytes=project.cache_limit_bytes,
                prefill_chunk=project.prefill_chunk,
                exact_rows=None,
                compiler=Compiler.of(settings.model, settings.device, lasts=True),
            )
            figures = time_tokens(
                engine, context=project.context, sessions=project.sessions, new_tokens=project.max_new_tokens
            )
        figures |= {"compiled": engine.is_compiled, "row_invariant": engine.row_invariant}
        memory = read_memory(device)
        figures |= {"peak_rss_bytes": memory.peak_rss_bytes, "peak_device_bytes": memory.device_peak_bytes}
        tracker.result(figures)
    return figures


@contextmanager
def room_for_texts() -> Iterator[None]:
    """UserError where the engine of the block has no room for its texts."""
    from lab.engine.kv import CacheFull

    try:
        yield
    except CacheFull as full:
        raise UserError(f"project.cache_limit_bytes must have room for these texts: {full}") from None


def time_tokens(
    engine: Engine, *, context: int, sessions: int, new_tokens: int, sampling: Sampling | None = None
) -> dict[str, Any]:
    """Time `sessions` concurrent texts, one pass for each token of all; greedy unless `sampling` is given.

    Returns:
        `time_to_first_token_seconds`: all prompts in one batch, until each text has its first token.
        `token_seconds_p50`: median time of a pass, which gives every text one token.
        `tokens_per_second`: of all texts together, prompts left out.

    Raises:
        ValueError: `new_tokens` below 2 or not below `context`.
        CacheFull: the engine has no room for them.
    """
    from lab.engine.sampling import Sampling

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
    from lab.engine.sampling import mix64

    return [mix64(text << 32 | place) % vocabulary_size for place in range(count)]


main = entry.command("decode", DecodeSettings, run)

if __name__ == "__main__":
    main()
