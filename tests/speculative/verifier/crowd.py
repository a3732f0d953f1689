"""More texts than the cache can hold at once, arriving at random: each is finished, or was told at once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.conversion import BYTE_EOS
from lab.models.sources import load_model, load_tokenizer_only
from speculative.acceptance import until_end
from speculative.drafter.loop import RequestRefused, speculate
from speculative.drafter.target import join
from speculative.drafts import NoDrafts
from speculative.request import GenerationRequest
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.speculative.in_process import decoded_alone, local_engine
from tests.speculative.serving_here import Here, serving_here

CACHE_POSITIONS = 1000
BYTES_PER_POSITION = 4096
"""Of `model=random` in float64."""
WORDS = (
    *("model=random", "model.dtype=float64", "device.threads=1", "project.lookup=false", "project.max_connections=64"),
    *(f"project.cache_limit_bytes={CACHE_POSITIONS * BYTES_PER_POSITION}", "project.max_waiting=64"),
)
FITS = range(100, 901)
NEVER_FITS = range(961, 1025)
"""In whole buckets of 64 positions the cache holds 960 of one text; the context is 1,024."""
ARRIVAL_SECONDS = 2.0
ENDS = frozenset({BYTE_EOS})


@dataclass
class Crowd:
    """What came of it."""

    finished: int = 0
    told_at_once: int = 0
    died: list[str] = field(default_factory=list)
    same_texts: bool = True
    new_tokens: int = 0
    waited: int = 0
    """Texts that stood in line."""
    seconds: float = 0.0


def crowd(texts: int, most_new_tokens: int, seed: int, *, never: int = 2) -> Crowd:
    """So many texts of 100 to 900 positions, and some that can never fit, on 1,000 positions of cache."""
    draws = random.Random(seed)
    lengths = [draws.choice(FITS) for _ in range(texts)] + [draws.choice(NEVER_FITS) for _ in range(never)]
    draws.shuffle(lengths)
    requests = [_request(length, most_new_tokens, draws) for length in lengths]
    arrivals = [draws.random() * ARRIVAL_SECONDS for _ in requests]
    came = Crowd()
    began = time.monotonic()
    with serving_here(*WORDS) as here:
        assert isinstance(here.engine, LocalEngine)
        assert here.engine.cache.bytes_per_position == BYTES_PER_POSITION
        names = token_texts(load_tokenizer_only(here.settings.model))

        def one(number: int) -> list[int] | None:
            time.sleep(arrivals[number])
            return _text(here, names, requests[number], came)

        with ThreadPoolExecutor(len(requests)) as pool:
            texts_of = list(pool.map(one, range(len(requests))))
    came.seconds = time.monotonic() - began
    came.waited = here.served.waited
    came.same_texts = _are_own(texts_of, requests)
    return came


def _request(length: int, most_new_tokens: int, draws: random.Random) -> GenerationRequest:
    new = draws.randint(1, min(most_new_tokens, length - 1))
    return GenerationRequest(
        prompt_ids=[draws.randrange(256) for _ in range(length - new)],
        sampling=Sampling(seed=draws.randrange(2**31), temperature=1.0, top_k=40, top_p=0.95),
        max_new_tokens=new,
        mode=Mode.target_only,
        threshold=None,
    )


def _text(here: Here, names: list[str], request: GenerationRequest, came: Crowd) -> list[int] | None:
    settings = replace(here.settings, network=replace(here.settings.network, port=here.port))
    never = len(request.prompt_ids) + request.max_new_tokens > CACHE_POSITIONS // 64 * 64
    ids: list[int] = []
    try:
        with join(settings, names) as target:
            for done in speculate(target, NoDrafts(), request, [BYTE_EOS]):
                ids += done.tokens
    except RequestRefused as refused:
        if never and "must be at most" in str(refused) and not ids:
            came.told_at_once += 1
        else:
            came.died.append(f"refused after {len(ids)} tokens: {refused}")
        return None
    except Exception as error:
        came.died.append(f"{type(error).__name__} after {len(ids)} of {request.max_new_tokens} tokens: {error}")
        return None
    came.finished += 1
    came.new_tokens += len(ids)
    return ids


def _are_own(texts: Sequence[list[int] | None], requests: Sequence[GenerationRequest]) -> bool:
    """Whether each text is the one that the target makes alone."""
    settings = compose_settings("spec_decoding", " ".join(("tracking=none", *WORDS)), SpeculativeSettings)
    engine = local_engine(load_model(settings.model, open_device(settings.device)).model, 1, context=1024)
    return all(
        ids == until_end(decoded_alone(engine, asked.prompt_ids, asked.sampling, asked.max_new_tokens), ENDS)
        for ids, asked in zip(texts, requests, strict=True)
        if ids is not None
    )
