"""Sources of guesses: what they hold, how they go back, what they guess."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
import torch

from lab.command.entry import compose_settings
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling, mix64
from lab.engine.synthetic import SyntheticEngine
from lab.models.sources import load_tokenizer_only
from lab.settings import Dtype
from speculative.drafter.session import warn_of_unused
from speculative.drafter.sources import EngineDrafts, add_noise_to_head, open_drafts
from speculative.drafts import Drafts, NgramDrafts, NoDrafts, RandomDrafts, RecordedDrafts
from speculative.settings import SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.random_models import VOCABULARY, random_model
from tests.speculative.in_process import local_engine

GREEDY = Sampling.greedy()


@functools.cache
def _model(source: str) -> torch.nn.Module:
    if source == "model":
        return random_model("llama", torch.float32)
    if source == "layers":
        return random_model("llama", torch.float64, num_hidden_layers=3)
    model = random_model("llama", torch.float64)
    add_noise_to_head(model, 0.3, 3)
    return model


def make_drafts(source: str, sampling: Sampling) -> Drafts:
    if source in ("model", "layers", "noisy"):
        return EngineDrafts(local_engine(_model(source), sessions=1), sampling, VOCABULARY)
    return NgramDrafts(3, 1) if source == "ngram" else RandomDrafts(7, VOCABULARY)


class Counting(LocalEngine):
    """Counts the ids it is fed."""

    fed = 0

    def extend(self, requests, want):  # type: ignore[no-untyped-def]
        self.fed += sum(len(ids) for _, ids in requests)
        return super().extend(requests, want)


@pytest.mark.parametrize("source", ["model", "ngram", "layers", "noisy", "random"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=1, temperature=1.0, top_k=0, top_p=1.0)])
def test_after_any_history_a_source_guesses_as_if_it_were_new(source: str, sampling: Sampling) -> None:
    """Going back leaves nothing behind: the same text, whatever was guessed and taken back before."""
    numbers = random.Random(4)
    text = [numbers.randrange(6) for _ in range(30)]  # few ids, so that n-grams come again
    drafts = make_drafts(source, sampling)
    drafts.begin(text)
    for _ in range(12):
        guesses = drafts.propose(numbers.randrange(1, 6))
        kept = numbers.randrange(len(guesses) + 1)
        new = [*guesses[:kept], numbers.randrange(6)]
        drafts.correct(len(text) + kept, new[kept:])
        text += new
        fresh = make_drafts(source, sampling)
        fresh.begin(text)
        expected = fresh.propose(4)
        assert drafts.propose(4) == expected
        drafts.correct(len(text), [])
        fresh.close()
    drafts.close()


def test_going_back_costs_nothing() -> None:
    """The engine is fed each verified token once: no prefill after a rejection."""
    engine = Counting(
        random_model("llama", torch.float64),
        sessions=1,
        context=240,
        bucket=32,
        kv_limit_bytes=2**28,
        prefill_chunk=64,
        exact_rows=None,
    )
    drafts = EngineDrafts(engine, GREEDY, VOCABULARY)
    drafts.begin([1] * 50)
    drafts.propose(4)
    assert engine.fed == 50 + 3
    for round_ in range(10):
        drafts.correct(50 + round_, [2])  # every guess was wrong
        drafts.propose(4)
    assert engine.fed == 53 + 10 * 4


def _ngram(text: Sequence[int], count: int, longest: int = 3, shortest: int = 1) -> list[int]:
    drafts = NgramDrafts(longest, shortest)
    drafts.begin(text)
    return drafts.propose(count)


def test_prompt_lookup_takes_what_followed_the_longest_and_latest_match() -> None:
    assert _ngram([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2) == [9, 2]  # 1 2 3, not the later 2 3
    assert _ngram([2, 3, 9, 2, 3, 8, 4, 2, 3], 1) == [8]  # the later of two
    assert _ngram([1, 2, 3], 4) == []
    assert _ngram([1, 2, 3, 3, 1], 1, longest=3, shortest=2) == []


def test_prompt_lookup_goes_on_in_its_own_guesses() -> None:
    assert _ngram([7, 8, 7, 8], 6) == [7, 8, 7, 8, 7, 8]


def test_prompt_lookup_is_that_of_a_plain_search() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        text = [numbers.randrange(4) for _ in range(numbers.randrange(1, 40))]
        found = _plain_search(text)
        assert _ngram(text, 1) == ([] if found is None else [found])


def _plain_search(text: Sequence[int]) -> int | None:
    for size in (3, 2, 1):
        for place in range(len(text) - 1, size - 1, -1):
            if size < len(text) and text[place - size : place] == text[len(text) - size :]:
                return text[place]
    return None


def test_noise_changes_the_head_and_nothing_else() -> None:
    plain, noisy = (random_model("llama", torch.float64, tie_word_embeddings=True) for _ in range(2))
    add_noise_to_head(noisy, 0.5, 1)
    changed = [
        name
        for (name, before), (_, after) in zip(plain.named_parameters(), noisy.named_parameters(), strict=False)
        if not torch.equal(before, after)
    ]
    assert changed == []  # the embedding, to which the head was tied, is as it was
    head, own = noisy.get_output_embeddings().weight, plain.get_output_embeddings().weight
    assert float((head - own).detach().std() / own.detach().std()) == pytest.approx(0.5, rel=0.05)


def test_a_guess_outside_the_targets_vocabulary_is_none() -> None:
    engine = SyntheticEngine(vocabulary_size=1000, context=99, sessions=1, step_seconds=0, row_seconds=0, agreement=1.0)
    drafts = EngineDrafts(engine, GREEDY, 10)  # nearly everything it says is padding to the target
    drafts.begin([1])
    assert all(guess < 10 for guess in drafts.propose(8))
    assert len(drafts.propose(8)) < 8


def test_an_id_of_the_targets_padding_does_not_hurt() -> None:
    drafts = EngineDrafts(local_engine(random_model("llama", torch.float64), sessions=1), GREEDY, VOCABULARY)
    drafts.begin([1, VOCABULARY + 40, 2])
    assert len(drafts.propose(3)) == 3


def test_beyond_its_context_a_drafter_has_no_guesses() -> None:
    drafts = EngineDrafts(local_engine(random_model("llama", torch.float64), 1, context=20), GREEDY, VOCABULARY)
    drafts.begin([1] * 18)
    assert len(drafts.propose(8)) == 3  # behind 18, 19 and 20 tokens
    drafts.correct(21, [5, 6])
    assert drafts.propose(8) == []


def test_none_and_random() -> None:
    sources: list[Drafts] = [NoDrafts(), RandomDrafts(3, 50)]
    lengths = []
    for drafts in sources:
        drafts.begin([1, 2])
        lengths.append(len(drafts.propose(5)))
        drafts.close()
    assert lengths == [0, 5]


def test_a_known_text_is_guessed_as_often_as_was_asked_for() -> None:
    """Within four standard deviations; what follows a wrong guess is guessed at its place again."""
    text = [mix64(place) % VOCABULARY for place in range(4000)]
    drafts = RecordedDrafts(text, agreement=0.8, seed=3, vocabulary_size=VOCABULARY)
    drafts.begin([1, 2, 3])
    checked = right = place = 0
    while place < len(text):
        guesses = drafts.propose(5)
        assert len(guesses) == min(5, len(text) - place)
        accepted = next((n for n, (a, b) in enumerate(zip(guesses, text[place:])) if a != b), len(guesses))
        checked, right = checked + min(accepted + 1, len(guesses)), right + accepted
        drafts.correct(3 + place + accepted, text[place + accepted : place + accepted + 1])
        place += accepted + 1
    assert abs(right / checked - 0.8) < 4 * (0.8 * 0.2 / checked) ** 0.5
    assert drafts.propose(1) == []


@pytest.mark.parametrize(
    ("asked", "loaded"), [("auto", torch.bfloat16), ("float64", torch.float64), ("null", torch.float32)]
)
def test_a_draft_model_has_the_dtype_that_was_asked_for(
    asked: str, loaded: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculative.drafter.draft_model.best_dtype", lambda device: Dtype.bfloat16)
    seen: list[torch.dtype] = []

    def opened(model: torch.nn.Module, *_: object, **__: object) -> LocalEngine:
        seen.append(next(model.parameters()).dtype)
        return local_engine(model)

    monkeypatch.setattr("speculative.drafter.sources.open_local_engine", opened)
    words = f"model=random project.draft.source=model project.draft.model=random project.draft.dtype={asked}"
    settings = compose_settings("spec_decoding", words, SpeculativeSettings)
    texts = token_texts(load_tokenizer_only(settings.model))
    open_drafts(settings, torch.device("cpu"), Sampling.greedy(), texts, len(texts))
    assert seen == [loaded]


def test_what_belongs_to_another_source_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    words = "model=random project.draft.model=random project.draft.quantization=int4 device.compile=true"
    for source, unused in (
        ("project.draft.source=ngram", "project.draft.model, project.draft.quantization, device.compile"),
        ("project.draft.source=layers", "project.draft.model, project.draft.quantization"),
        ("project.draft.source=model", ""),
        ("project.draft.source=model project.mode=target_only", "project.draft.model, project.draft.quantization, dev"),
    ):
        caplog.clear()
        warn_of_unused(compose_settings("spec_decoding", f"{words} {source}", SpeculativeSettings))
        assert len(caplog.messages) == bool(unused)
        assert unused in caplog.text
