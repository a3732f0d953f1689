"""A text whose peers and link are taken away at random points: one function for a few in `test` and 100 in `soak`.

Every time a real verifier process, a real link and a drafter's own code: the text must be the target's, whatever goes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from lab.device import open_device
from lab.entry import compose_settings
from lab.link import CutKind, Link, LinkSettings, OneWay
from lab.models import load_model, load_tokenizer_only
from lab.sampling import Sampling
from speculative.drafting import speculate
from speculative.engines import open_drafts
from speculative.joining import join
from speculative.settings import Mode, SpeculativeSettings
from speculative.text import TextRequest
from speculative.vocabulary import token_texts
from tests.speculative.in_process import decoded_alone, local_engine
from tests.speculative.processes import RANDOM, Role, verifier

KINDS = ("verifier", "reset", "half_open", "stall")
SAMPLING = Sampling(seed=5, temperature=1.0, top_k=60, top_p=0.98)
WORDS = (
    *RANDOM,
    *("project.draft.source=noisy", "project.draft.noise=0.05", "project.lookup=true"),
    *("network.heartbeat_seconds=0.25", "network.dead_after_seconds=1.0"),
)
TOKENS_PER_KILL = 20
LAST_TOKENS = 60
"""Behind the last kill: what is under way by then."""
DELAY_SECONDS = 0.01
MOST_TOKENS = 800
"""Of one text: the context of `model=random` is 1,024."""


@dataclass
class Kills:
    """What came of it."""

    kills: dict[str, int] = field(default_factory=dict)
    resumes: int = 0
    same_text: bool = True
    resume_seconds: list[float] = field(default_factory=list)
    """From when the peer listens, or the link is whole, to the next new token."""


class _Scene:
    """One verifier, one link to it, and what is done to them."""

    def __init__(self, stack: ExitStack, generator: random.Random) -> None:
        self._stack = stack
        self._generator = generator
        self._living: tuple[ExitStack, Role] = self._started(0)
        one_way = OneWay(delay_seconds=DELAY_SECONDS, jitter_seconds=DELAY_SECONDS)
        target = ("127.0.0.1", self._living[1].port)
        settings = LinkSettings(up=one_way, down=one_way, buffer_bytes=2**20, seed=1)
        self.link = stack.enter_context(Link(target, settings, host="127.0.0.1", port=0))
        self.whole_at = 0.0
        self._mending: threading.Thread | None = None

    def harm(self, kind: str) -> None:
        """Does it, and has it mended after a while."""
        if self._mending is not None:
            self._mending.join()
        if kind == "verifier":
            self._living[1].process.kill()
            self._mend(0.0, self._restart)
            return
        cut, seconds = {
            "reset": (CutKind.reset, self._generator.uniform(0, 0.3)),
            "half_open": (CutKind.blackhole, 1.6),  # longer than a peer may be silent
            "stall": (CutKind.blackhole, self._generator.uniform(0, 0.5)),
        }[kind]
        self.link.cut(cut, duration_seconds=float("inf"))
        self._mend(seconds, self.link.heal)

    def mended(self) -> None:
        """Waits until all is well again."""
        if self._mending is not None:
            self._mending.join()

    def _mend(self, seconds: float, how: Callable[[], None]) -> None:
        self.whole_at = float("inf")

        def mend() -> None:
            time.sleep(seconds)
            how()
            self.whole_at = time.monotonic()

        self._mending = threading.Thread(target=mend)
        self._mending.start()

    def _restart(self) -> None:
        old, role = self._living
        port = role.port
        old.close()
        self._living = self._started(port)

    def _started(self, port: int) -> tuple[ExitStack, Role]:
        stack = ExitStack()
        running = stack.enter_context(verifier(*WORDS, f"network.port={port}"))
        self._stack.callback(stack.close)
        return stack, running


def kill_at_random(kinds: Sequence[str], seed: int) -> Kills:
    """One text after the other, at most `MOST_TOKENS` each; at random points what `kinds` names happens, in turn."""
    came = Kills()
    generator = random.Random(seed)
    left = list(kinds)
    with ExitStack() as stack:
        scene = _Scene(stack, generator)
        while left:
            most = (MOST_TOKENS - LAST_TOKENS) // TOKENS_PER_KILL
            left = _one_text(scene, generator, left[:most], came) + left[most:]
        scene.mended()
    return came


def _one_text(scene: _Scene, generator: random.Random, kinds: Sequence[str], came: Kills) -> list[str]:
    """Returns what is left: a verifier goes on alone and may have finished the text before its drafter is back."""
    count = len(kinds) * TOKENS_PER_KILL + LAST_TOKENS
    points = list(zip(sorted(generator.sample(range(1, count - LAST_TOKENS), len(kinds))), kinds, strict=True))
    settings = compose_settings(
        "spec_decoding", " ".join((*WORDS, f"network.port={scene.link.port}")), SpeculativeSettings
    )
    loaded = load_model(settings.model, open_device(settings.device))
    prompt = [generator.randrange(256) for _ in range(30)]
    request = TextRequest(
        prompt_ids=prompt, sampling=SAMPLING, max_new_tokens=count, mode=Mode["async"], threshold=None
    )
    texts = token_texts(load_tokenizer_only(settings.model))
    ids: list[int] = []
    harmed = False
    with join(settings, texts) as target:
        drafts = open_drafts(settings, open_device(settings.device), SAMPLING, texts, target.welcome.vocabulary_size)
        before = target.resumes
        for done in speculate(target, drafts, request, []):
            if harmed and target.resumes > before:
                came.resume_seconds.append(max(0.0, time.monotonic() - scene.whole_at))
                harmed, before = False, target.resumes
            ids += done.tokens
            if points and len(ids) >= points[0][0] and not harmed:  # one at a time
                _, kind = points.pop(0)
                scene.harm(kind)
                harmed = kind != "stall"
                came.kills[kind] = came.kills.get(kind, 0) + 1
        drafts.close()
        came.resumes += target.resumes
    came.same_text &= ids == decoded_alone(local_engine(loaded.model, 1, context=1024), prompt, SAMPLING, count)
    return [kind for _, kind in points]
