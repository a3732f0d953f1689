"""Which tokenizers mean the same, and where two first differ."""

from __future__ import annotations

from lab.models.conversion import byte_tokenizer
from speculative.vocabulary import fingerprint, first_difference, token_texts


def test_a_tokenizer_is_itself_whatever_its_model_is_padded_to() -> None:
    texts = token_texts(byte_tokenizer())
    assert len(texts) == 258  # the model of conf/model/random.yaml has 259 rows
    assert texts[ord("a")] == "a"
    assert texts[256:] == ["<eos>", "<pad>"]
    assert fingerprint(texts) == fingerprint(token_texts(byte_tokenizer()))
    assert first_difference(texts, list(texts)) is None


def test_the_first_id_that_differs_is_named() -> None:
    texts = token_texts(byte_tokenizer())
    swapped = [*texts]
    swapped[97], swapped[98] = swapped[98], swapped[97]
    assert fingerprint(swapped) != fingerprint(texts)
    assert first_difference(texts, swapped) == "id 97 is 'a' here and 'b' there"
    assert first_difference(texts, [*texts, "<new>"]) == "id 258 is no token here and '<new>' there"
    assert first_difference([*texts, "<new>"], texts) == "id 258 is '<new>' here and no token there"


def test_texts_are_not_confused_with_their_joins() -> None:
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["a", ""]) != fingerprint(["a"])
