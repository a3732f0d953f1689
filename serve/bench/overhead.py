"""Part of the benchmark that compares HTTP with the scheduler behind it."""

from __future__ import annotations

import time

from lab.bench import Row, Sample, interleaved, judged, pinned
from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from lab.text.data_text import DataEncoder
from lab.text.generation import decoder
from serve.bench.rig import MODEL_CORE, Rig
from serve.bench.settings import ServeBenchSettings
from serve.models.scheduled import limits_of
from serve.settings import ServeSettings
from speculative.request import Ending, GenerationRequest, Verdict
from speculative.settings import Mode
from speculative.verifier.scheduler import Scheduler
from speculative.verifier.target import open_target

MOST_SECONDS = 0.0005
PROMPT_TOKENS = 16
KEY = "direct"


class Direct:
    """The server's own engine and scheduler, in this process, without HTTP."""

    def __init__(self, settings: ServeSettings) -> None:
        tokenizer = load_tokenizer_only(settings.model)
        target = open_target(settings, open_device(settings.device))
        self._encoder, self._decode = DataEncoder(tokenizer), decoder(tokenizer, frozenset(target.end_ids))
        self._scheduler = Scheduler(
            target.engine, end_ids=target.end_ids, limits=limits_of(settings.project), closed=lambda *ended: None
        )
        self._scheduler.prove()
        self.text, self.tokens = "", 0
        """The last text, and the number of its tokens."""

    def generate(self, prompt: str, new_tokens: int) -> float:
        """Continue a prompt greedily; returns the seconds of the whole."""
        ids: list[int] = []
        began = time.perf_counter()
        request = GenerationRequest(
            prompt_ids=self._encoder.encode_data(prompt, add_special_tokens=True),
            sampling=Sampling.greedy(),
            max_new_tokens=new_tokens,
            mode=Mode.target_only,
            threshold=None,
        )
        outcomes = self._scheduler.open(KEY, request, client=KEY)
        while not any(isinstance(outcome, Ending) for outcome in outcomes):
            ids += [token for outcome in outcomes if isinstance(outcome, Verdict) for token in outcome.ids]
            outcomes = self._scheduler.tick()
        ids += [token for outcome in outcomes if isinstance(outcome, Verdict) for token in outcome.ids]
        seconds = time.perf_counter() - began
        self.text, self.tokens = self._decode(ids), len(ids)
        return seconds


def overhead(rig: Rig) -> list[Row]:
    """Time whole streams of one client, and the same texts from the scheduler on the same core."""
    random, both = rig.with_random_model(), [rig.settings]
    if rig.settings.model.name != random.model.name:
        both.append(random)
    return [_overhead(rig, settings) for settings in both]


def _overhead(rig: Rig, settings: ServeBenchSettings) -> Row:
    project, words = rig.project, rig.words(settings)
    prompt = rig.prose(PROMPT_TOKENS, 0)
    same = []
    with pinned(MODEL_CORE):
        direct = Direct(compose_settings("serve", words, ServeSettings))
    with rig.server(words) as client:

        def through_http() -> float:
            answer = client.complete(prompt, project.overhead_tokens, speculative=False)
            same.append(answer.text == direct.text or not direct.text)
            return answer.seconds / answer.tokens

        def directly() -> float:
            with pinned(MODEL_CORE):
                return direct.generate(prompt, project.overhead_tokens) / direct.tokens

        found = interleaved({"direct": directly, "http": through_http}, 1, project.overhead_repeats)
    added = Sample.of([one - other for one, other in zip(found["http"], found["direct"], strict=True)])
    row = {
        "model": settings.model.name,
        "quantization": settings.model.quantization.name,
        "tokens": direct.tokens,
        "token_seconds": {name: Sample.of(own) for name, own in found.items()},
        "added_seconds": added,
        "same_text": all(same),
    }
    target = f"added_seconds at most {MOST_SECONDS:g}, same_text"
    return judged("overhead", row, target, added.median <= MOST_SECONDS and all(same))
