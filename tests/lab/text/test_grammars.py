"""What a schema allows, against all texts that follow it; going back; what is refused."""

from __future__ import annotations

import json
import random
import re
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lab.text.grammars import PROBES, GrammarFailed, Grammars, GrammarText
from tests.schemas import PERSON, finite, is_valid

TAUGHT = ['{"a": 1, "key": true, "ke": null}', '["ab", "a", "b", 12, -7]', '": "', "true false null", "key key ke"]


@cache
def tokenizer(size: int = 330) -> PreTrainedTokenizerFast:
    """A small byte-level vocabulary with tokens of several bytes, which cross the parts of JSON, and two end tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>", "<stop>"]
    )
    made.train_from_iterator(TAUGHT * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


ENDS = (0, 1)


def grammars() -> Grammars:
    return Grammars(lambda: (tokenizer(), ENDS))


@cache
def spelled() -> dict[int, bytes]:
    """The bytes of each token that is text, from the tokenizer's own alphabet."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    of_letter = {chr(byte): byte for byte in order}
    of_letter |= dict(zip((chr(256 + at) for at in range(256)), (byte for byte in range(256) if byte not in order)))
    assert set(of_letter) == set(letters)
    return {
        token: bytes(of_letter[letter] for letter in text)
        for text, token in tokenizer().get_vocab().items()
        if token not in ENDS
    }


def begun(text: GrammarText) -> set[int]:
    return {token for token, may in enumerate(text.allowed()) if may}


def expected(written: bytes, texts: list[bytes]) -> set[int]:
    """Every token of the vocabulary tried: it may come if a text begins with what is written and with it."""
    tried = {token for token, own in spelled().items() if any(text.startswith(written + own) for text in texts)}
    return tried | (set(ENDS) if written in texts else set())


@pytest.mark.parametrize("seed", range(12))
def test_a_token_is_allowed_if_some_text_goes_on_with_it(seed: int) -> None:
    numbers = random.Random(seed)
    schema, written = finite(numbers)
    texts = [text.encode() for text in dict.fromkeys(written)]
    many, narrowed = grammars(), 0
    for _ in range(3):
        text, so_far = many.begin(json.dumps(schema)), b""
        while True:
            allowed, forced, legal = begun(text), text.forced(), expected(so_far, texts)
            # Where the bytes are forced, so are their tokens: the ones that the tokenizer itself writes.
            assert allowed == legal or (allowed == {*forced[:1]} and allowed < legal), (schema, so_far)
            narrowed += allowed != legal
            assert {token for token in range(len(text.allowed())) if text.allows(token)} == legal
            forced = [token for token in forced if token not in ENDS]
            assert all(one.startswith(so_far + b"".join(spelled()[token] for token in forced))
                       for one in texts if one.startswith(so_far))  # fmt: skip
            token = numbers.choice(sorted(allowed))
            text.go_on([token])
            if token in ENDS:
                break
            so_far += spelled()[token]
        assert so_far in texts
        assert text.is_over
        assert begun(text) == set(ENDS)
    assert narrowed < 60


def test_where_only_the_end_is_left_it_is_forced() -> None:
    text = grammars().begin('{"const": true}')
    assert tokenizer().decode(text.forced()) == "true"
    text.go_on(text.forced())
    assert text.forced() == [0]
    text.go_on([0])
    assert text.forced() == []


def test_going_back_forgets() -> None:
    """Texts by detours (tokens that are not allowed, ends, pieces of any length) against texts that went straight."""
    numbers, many, schema = random.Random(4), grammars(), json.dumps(PERSON)
    text, held, seen_over = many.begin(schema), list[int](), 0
    for _ in range(250):
        at = numbers.randrange(max(0, len(held) - 6), len(held) + 1)
        text.go_back(at)
        del held[at:]
        for _ in range(numbers.randrange(1, 5)):
            mask = text.allowed()
            wild = numbers.random() < 0.1
            token = numbers.choice([one for one in range(len(mask)) if wild or mask[one]])
            text.go_on([token])
            held.append(token)
        straight = many.begin(schema)
        straight.go_on(held)
        seen_over += straight.is_over
        assert (text.is_over, text.length, text.allowed()) == (straight.is_over, straight.length, straight.allowed())
        assert text.forced() == straight.forced()
    assert 20 < seen_over < 230


def test_a_text_that_does_not_go_back_is_found_out() -> None:
    """The negative control: tokens that were taken back still count."""
    many = grammars()
    text, straight = many.begin(json.dumps(PERSON)), many.begin(json.dumps(PERSON))
    text.go_on(tokenizer()('{"')["input_ids"])
    text._followed = 0
    text.go_back(0)
    assert text.allowed() != straight.allowed()


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, PERSON], ids=["any", "object", "person"])
def test_every_walk_through_a_grammar_is_json(schema: dict[str, object]) -> None:
    """Tokens drawn at random, towards the end of the text; the JSON is read by other libraries."""
    numbers, many, ended = random.Random(1), grammars(), 0
    closing = set(b'}]"0') | {ord("u")}
    for _ in range(25):
        text, ids = many.begin(json.dumps(schema)), list[int]()
        while not text.is_over and len(ids) < 120:
            allowed = sorted(begun(text))
            short = [token for token in allowed if token in ENDS or spelled()[token][0] in closing]
            ids.append(numbers.choice(short if short and numbers.random() < 0.7 else allowed))
            text.go_on(ids[-1:])
        if text.is_over:
            ended += 1
            said = b"".join(spelled()[token] for token in ids[:-1]).decode()
            assert is_valid(said, schema), said
    assert ended >= 15


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("nonsense", "schema must be a JSON object that describes one, got: expected ident"),
        ("true", "schema must be a JSON object that describes one, got: Expecting object"),
        ("[" * 9000, "schema must be a JSON object that describes one, got: recursion limit exceeded"),
        ('{"type": "zzz"}', "schema must be one that llguidance can compile, got: Invalid type: zzz"),
        ('{"not": {}}', 'schema must be one that llguidance can compile, got: Unimplemented keys: ["not"]'),
        ('{"not": {}, "x-guidance": {"lenient": true}}', "schema must be one that llguidance can compile, got: Unimp"),
        ('{"type": "integer", "minimum": 3, "maximum": 2}', "schema must be one that llguidance can compile, got: Uns"),
        ('{"$ref": "http://127.0.0.1:9/a"}', "schema must be one that llguidance can compile, got: Resource 'http"),
        ('{"$ref": "file:///etc/hostname"}', "schema must be one that llguidance can compile, got: Resource 'file"),
        ('{"$ref": "#"}', "schema must be one that a text can follow, got: "),
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_line(schema: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}[^\n]*$"):
        grammars().check(schema)


def _other(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that loses bytes: whole words, or letters that it makes small."""
    if kind == "small":
        made = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
        made.normalizer = normalizers.Lowercase()
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    return _word_level()


def _word_level() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<end>", "<unk>", "a", "{", "}"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


def test_a_tokenizer_that_does_not_fit_is_refused_by_name() -> None:
    for load, message in (
        (
            lambda: (_other("small"), (0,)),
            "schema must be off for a tokenizer whose tokens do not spell a text's bytes",
        ),
        (lambda: (_other("words"), (0,)), "schema must be off for a tokenizer that llguidance cannot read, got: "),
        (lambda: (object(), (0,)), "schema must be off for a tokenizer without a tokenizer.json, got object"),
        (lambda: (tokenizer(), ()), "schema must be off for a model without end tokens"),
    ):
        many = Grammars(load)  # type: ignore[arg-type]  # what does not fit
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                many.check("{}")


def test_probes_are_texts_that_a_careless_tokenizer_loses() -> None:
    assert all(any(ord(letter) > 127 for letter in text) or '"' in text for text in PROBES)


def test_a_text_that_no_token_continues_is_a_fault_and_no_end() -> None:
    text = grammars().begin('{"enum": ["a"]}')
    text._matcher = _Dead()  # type: ignore[assignment]  # no vocabulary of ours lacks a byte
    with pytest.raises(
        GrammarFailed, match=r"^no token of the vocabulary continues the text under its schema \(token 0"
    ):
        text.allowed()


class _Dead:
    def compute_logit_bias(self) -> bytes:
        return bytes(len(tokenizer()))

    def is_accepting(self) -> bool:
        return False

    def is_error(self) -> bool:
        return False
