"""A text whose peers and link are taken away at random points: one function for a few in `test` and 100 in `soak`.

Every time a real verifier process, a real link and a drafter's own code: the text must be the target's, whatever goes.
A drafter that is killed is a process, too; who takes its text up again has nothing of it but its run folder.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.link import CutKind, Link, LinkSettings
from lab.models.conversion import BYTE_EOS
from lab.models.sources import load_model, load_tokenizer_only
from lab.text.logit_rules import LogitRules
from lab.text.prompts import prompt_ids
from speculative.acceptance import until_end
from speculative.drafter.loop import Target, speculate
from speculative.drafter.sources import open_drafts
from speculative.drafter.target import RemoteTarget, join
from speculative.request import GenerationRequest
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.shared import one_way
from tests.speculative.in_process import decoded_alone, local_engine
from tests.speculative.processes import RANDOM, Role, drafted, drafter_process, verifier

KINDS = ("verifier", "drafter", "reset", "half_open", "stall")
PENALTIES = {"repetition_penalty": 1.15, "presence_penalty": 0.2, "frequency_penalty": 0.1}
BIASES = dict.fromkeys(range(0, 200, 3), 0.3)
"""In the measure of the logits of random models. Both are functions of the whole text: who takes one up again must
know all of it."""
SAMPLED = (
    *("seed=5", "project.temperature=1.0", "project.top_k=60", "project.top_p=0.98"),
    *(f"project.{name}={value}" for name, value in PENALTIES.items()),
    f"project.logit_bias={BIASES}".replace(" ", ""),
)
"""`_sampling`, for a drafter as people start it."""
WORDS = (
    *RANDOM,
    *("project.draft.source=noisy", "project.draft.noise=0.05", "project.lookup=true"),
    "project.resume_seconds=300.0",  # a busy machine takes long to start a verifier
)
QUICK = ("network.heartbeat_seconds=0.25", "network.dead_after_seconds=1.0")
"""A dead peer is found four times as soon as with the shipped settings."""
TOKENS_PER_KILL = 20
ENDS = frozenset({BYTE_EOS})
LAST_TOKENS = 60
"""Behind the last kill: what is under way by then."""
DELAY_SECONDS = 0.01
"""Each way, and as much again at random."""
SHOWN_CHARACTERS = 40
"""Of the text, at most, when its drafter is killed."""
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
    found_seconds: list[float] = field(default_factory=list)
    """From when the peer or the link went to when the drafter knew."""


class _Scene:
    """One verifier, one link to it, and what is done to them."""

    def __init__(self, stack: ExitStack, generator: random.Random, words: Sequence[str]) -> None:
        self._stack = stack
        self._generator = generator
        self.words = words
        self.settings = compose_settings("spec_decoding", " ".join(words), SpeculativeSettings)
        self._living: tuple[ExitStack, Role] = self._started(0)
        way = one_way(DELAY_SECONDS, jitter_seconds=DELAY_SECONDS)
        target = ("127.0.0.1", self._living[1].port)
        settings = LinkSettings(up=way, down=way, buffer_bytes=2**20, seed=1)
        self.link = stack.enter_context(Link(target, settings, host="127.0.0.1", port=0))
        self.harmed_at = self.whole_at = 0.0
        self._mending: threading.Thread | None = None

    def harm(self, kind: str) -> None:
        """Does it, and has it mended after a while."""
        if self._mending is not None:
            self._mending.join()
        self.harmed_at = time.monotonic()
        if kind == "verifier":
            self._living[1].process.kill()
            self._mend(0.0, self._restart)
            return
        cut, seconds = {
            "reset": (CutKind.reset, self._generator.uniform(0, 0.3)),
            "half_open": (CutKind.blackhole, 1.6 * self.settings.network.dead_after_seconds),
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
        running = stack.enter_context(verifier(*self.words, f"network.port={port}"))
        self._stack.callback(stack.close)
        return stack, running


class _Watched:
    """A drafter's target that notes when it was lost."""

    def __init__(self, target: RemoteTarget) -> None:
        self._target = target
        self.lost_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def resume(self, request: GenerationRequest) -> None:
        self.lost_at = time.monotonic()
        self._target.resume(request)


def kill_at_random(kinds: Sequence[str], seed: int, words: Sequence[str] = ()) -> Kills:
    """One text after the other, at most `MOST_TOKENS` each; at random points what `kinds` names happens, in turn."""
    came = Kills()
    generator = random.Random(seed)
    left = [kind for kind in kinds if kind != "drafter"]
    with ExitStack() as stack:
        scene = _Scene(stack, generator, (*WORDS, *words))
        while left:
            most = (MOST_TOKENS - LAST_TOKENS) // TOKENS_PER_KILL
            left = _one_text(scene, generator, left[:most], came) + left[most:]
        scene.mended()
        for _ in range(list(kinds).count("drafter")):
            _kill_drafter(scene, generator, came)
    return came


def _one_text(scene: _Scene, generator: random.Random, kinds: Sequence[str], came: Kills) -> list[str]:
    """Returns what is left: a verifier may have finished the text before it misses its drafter, and a long
    text may end by itself."""
    scene.mended()
    count = len(kinds) * TOKENS_PER_KILL + LAST_TOKENS
    points = list(zip(sorted(generator.sample(range(1, count - LAST_TOKENS), len(kinds))), kinds, strict=True))
    settings = replace(scene.settings, network=replace(scene.settings.network, port=scene.link.port))
    prompt = [generator.randrange(256) for _ in range(30)]
    request = GenerationRequest(
        prompt_ids=prompt, sampling=_sampling(prompt), max_new_tokens=count, mode=Mode["async"], threshold=None
    )
    texts = token_texts(load_tokenizer_only(settings.model))
    ids: list[int] = []
    harmed = False
    with join(settings, texts) as target:
        drafts = open_drafts(
            settings, open_device(settings.device), request.sampling, texts, target.welcome.vocabulary_size
        )
        before = target.resumes
        watched = _Watched(target)
        for done in speculate(cast(Target, watched), drafts, request, ENDS):
            if harmed and target.resumes > before:
                came.resume_seconds.append(max(0.0, time.monotonic() - scene.whole_at))
                came.found_seconds.append(watched.lost_at - scene.harmed_at)
                harmed, before = False, target.resumes
            ids += done.tokens
            if points and len(ids) >= points[0][0] and not harmed:  # one at a time
                _, kind = points.pop(0)
                scene.harm(kind)
                harmed = kind != "stall"
                came.kills[kind] = came.kills.get(kind, 0) + 1
        drafts.close()
        came.resumes += target.resumes
    came.same_text &= ids == until_end(_own_text(scene, prompt, count), ENDS)
    return [kind for _, kind in points]


def _kill_drafter(scene: _Scene, generator: random.Random, came: Kills) -> None:
    """A text whose drafter is killed; another takes it up again, to its end."""
    prompt = f"text number {generator.randrange(1000)}"
    words = (*scene.words, *SAMPLED, f"project.max_new_tokens={MOST_TOKENS}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = drafter_process(
            *words, f"network.port={scene.link.port}", f"prompt={prompt}", folder=folder / "killed"
        )
        assert process.stdout is not None
        shown = process.stdout.read(generator.randint(1, SHOWN_CHARACTERS))
        process.kill()
        process.communicate()
        assert shown, "the drafter had ended before it was killed"
        resume = f"project.resume={folder}/killed/text.json"
        result = drafted(scene.link.port, (*words, resume), folder / "second", prompt)
    came.kills["drafter"] = came.kills.get("drafter", 0) + 1
    came.resumes += 1
    came.resume_seconds.append(result["time_to_first_token_seconds"])
    ids = prompt_ids(load_tokenizer_only(scene.settings.model), prompt, chat=True)
    came.same_text &= result["token_ids"] == until_end(_own_text(scene, ids, MOST_TOKENS), ENDS)


def _own_text(scene: _Scene, prompt: Sequence[int], count: int) -> list[int]:
    """What the target says without any verifier."""
    loaded = load_model(scene.settings.model, open_device(scene.settings.device))
    return decoded_alone(local_engine(loaded.model, 1, context=1024), prompt, _sampling(prompt), count)


def _sampling(prompt: Sequence[int]) -> Sampling:
    rules = LogitRules(prompt_tokens=len(prompt), logit_bias=tuple(BIASES.items()), **PENALTIES)
    return Sampling(seed=5, temperature=1.0, top_k=60, top_p=0.98, logit_rules=rules)
