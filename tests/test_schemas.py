"""A schema on every engine: texts are JSON that follows it, and the same text speculated, split, and alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lab.command.entry import Run, compose_settings
from lab.engine.history import History
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.settings import UserError
from lab.text.grammars import GrammarText
from speculative.settings import Mode
from speculative.verifier.limits import refusal_by_engine
from split import infer
from split.settings import SplitSettings
from tests.schemas import END, PERSON, SOURCES, SchemaSubject, compare_schemas, is_valid, rules, samplings, texts
from tests.speculative.in_process import decoded_alone, local_engine, request

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def subject() -> SchemaSubject:
    return SchemaSubject(prompts=6)


def test_every_text_is_json_that_follows_its_schema() -> None:
    both = [*written(0), *written(1)]
    assert len(both) == 12
    assert [text for text in both if not is_valid(text, PERSON)] == []
    assert len(set(both)) > 6


@cache
def written(number: int) -> list[str]:
    return texts(subject(), samplings()[number])


def test_without_the_mask_texts_are_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(History, "_forbidden", lambda *_: None)
    assert not any(is_valid(text, PERSON) for text in texts(subject(), samplings()[1]))


def test_penalties_biases_and_bad_words_change_the_text_and_not_what_it_is() -> None:
    others: dict[str, Any] = {
        "frequency_penalty": 2.0,
        "presence_penalty": 2.0,
        "repetition_penalty": 50.0,
        "logit_bias": ((END, 100.0), (ord("{"), -100.0), (ord("x"), 100.0)),
        "bad_words": tuple((token,) for token in range(0, 256, 3)),
    }
    plain, changed = written(1), texts(subject(), samplings(**others)[1])
    assert all(is_valid(text, PERSON) for text in changed)
    assert all(one != other for one, other in zip(plain, changed, strict=True))


def test_bad_words_yield_where_they_ban_all_that_the_schema_allows() -> None:
    everything = samplings(bad_words=tuple((token,) for token in range(END + 1)))[0]
    assert texts(subject(), everything) == written(0)


def test_speculated_text_is_the_targets_own() -> None:
    compared = compare_schemas(64, whole=False)
    assert {source for source, *_ in compared.cells} == set(SOURCES)
    assert compared.accepted > 60
    assert compared.differing == 0


def test_a_grammar_that_forgets_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the target's mask counts draft tokens that were wrong."""

    def hold(self: History, position: int, ids: Sequence[int]) -> None:
        self._counts.go_back(position, self._ids)
        self._ids[position:] = ids

    def changed(self: GrammarText, length: int) -> None:
        self.length = min(self.length, length)
        self._followed = min(self._followed, length)

    monkeypatch.setattr(History, "hold", hold)
    monkeypatch.setattr(GrammarText, "go_back", changed)
    assert compare_schemas(64, whole=False).differing > 0


def _split(words: str, folder: Path, prompt: str) -> dict[str, Any]:
    words = f"model=random model.dtype=float64 tracking=none project.transport=inproc project.local_shards=2 {words}"
    settings = compose_settings("split_inf", words, SplitSettings)
    settings.prompt = prompt
    return infer.run(settings, Run(folder))


@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_two_shards_write_what_the_whole_model_writes(tmp_path: Path, heat: float) -> None:
    prompt, file = "Who is it?", tmp_path / "person.json"
    file.write_text(json.dumps(PERSON, indent=2))
    found = _split(
        f"project.schema='{file}' project.max_new_tokens=100 project.temperature={heat} seed=3", tmp_path, prompt
    )
    ruled = rules(json.loads(file.read_text()), len(prompt))
    sampling = Sampling(seed=3, temperature=heat, top_k=0, top_p=1.0, logit_rules=ruled)
    expected = decoded_alone(subject().engine(), list(prompt.encode()), sampling, 100)
    assert found["token_ids"] == expected[: expected.index(END) + 1]
    assert found["ended_by"] == "end_token"
    assert is_valid(found["text"], PERSON)


def test_a_schema_that_cannot_be_compiled_is_one_line_before_anything_is_loaded_or_written(tmp_path: Path) -> None:
    for schema, message in (
        ('{"type": "zzz"}', r"^project\.schema must be one that llguidance can compile, got: Invalid type: zzz$"),
        ('{"type": ', r"^project\.schema must be a JSON schema or a JSON file in UTF-8, got JSON \(Expecting value"),
        ("/none/such.json", r"^project\.schema must be a JSON schema or a JSON file .*No such file or directory\)$"),
        ('{"const": "' + "x" * 17000 + '"}', r"^project\.schema must be at most 16384 bytes of JSON, got 170"),
    ):
        with pytest.raises(UserError, match=message):
            _split(f"'project.schema={schema}'", tmp_path, "Hello")


def test_an_engine_that_cannot_follow_a_schema_refuses_it_by_name() -> None:
    greedy = samplings()[0]
    without = local_engine(subject().model)
    with pytest.raises(ValueError, match=r"^schema must be off for an engine that was opened without its model's tok"):
        without.open([1], greedy)
    asked = request([1, 2], 10, greedy)
    assert "opened without its model's tokenizer" in str(refusal_by_engine(asked, without))
    wrong = Sampling(seed=0, temperature=0, top_k=0, top_p=1, logit_rules=rules({"type": "zzz"}))
    refused = refusal_by_engine(request([1, 2], 10, wrong), subject().engine())
    assert refused == "schema must be one that llguidance can compile, got: Invalid type: zzz"
    lossy = request([1, 2], 10, greedy, Mode.sync, threshold=1.0)
    assert str(refusal_by_engine(lossy, subject().engine())).startswith("rule must be exact with a schema")
    assert refusal_by_engine(asked, subject().engine()) is None
    synthetic = SyntheticEngine(
        vocabulary_size=300, context=64, sessions=1, step_seconds=0, row_seconds=0, agreement=1.0, sleep=lambda s: None
    )
    with pytest.raises(ValueError, match="bad_words and schema must be off for a synthetic engine"):
        synthetic.open([1], greedy)
