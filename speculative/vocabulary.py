"""Whether two tokenizers give the same ids the same meaning, and where they first differ.

Compares only ids that a tokenizer has: a matrix may be padded beyond them, differently for each size of a family.
"""

import hashlib
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of each id of the tokenizer, in order; "" for an id it does not have."""
    vocabulary = tokenizer.get_vocab()
    texts = [""] * (1 + max(vocabulary.values(), default=-1))
    for text, token in vocabulary.items():
        texts[token] = text
    return texts


def fingerprint(texts: Sequence[str]) -> str:
    """A digest of every id's text."""
    sha = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        sha.update(len(encoded).to_bytes(4, "big") + encoded)
    return sha.hexdigest()


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The first id that differs, with its text on both sides, for messages; None if all are equal."""
    for token in range(max(len(ours), len(theirs))):
        here, there = (repr(texts[token]) if token < len(texts) else "no token" for texts in (ours, theirs))
        if here != there:
            return f"id {token} is {here} here and {there} there"
    return None
