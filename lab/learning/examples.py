"""Examples from records: token ids, the part that the loss counts, held-out parts, batches.

Knows nothing about clients or models.

Shapes: B examples in a batch, T tokens (the longest example of the batch).
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING
from unicodedata import combining

import numpy as np
import torch
from numpy.typing import NDArray

from lab.learning.counts import Counts
from lab.learning.data import Document, Source
from lab.learning.records import Dialogue, MalformedRecord, Record, Text
from lab.settings import UserError
from lab.text.chat import Chat, Piece, plain_message
from lab.text.data_text import DataEncoder, unused_letters
from lab.text.marked_messages import Marks, control_of, holds_control, marked, spans_of, taken_out

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that does not count, as torch and transformers have it."""

MAX_NAMED = 3
"""Malformed lines that an error message names; it says how many more there are."""


@dataclass(frozen=True, eq=False)
class Example:
    """At most `sequence_length` token ids, with the mask of those that the loss counts."""

    ids_T: NDArray[np.int32]
    counted_T: NDArray[np.bool_]
    """True where the token is predicted in the loss. Position 0 has nothing before it and never counts."""
    key: str | None = None
    """Examples with the same key are on the same side of a split; None: those with the same tokens."""

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return int(self.counted_T[1:].sum())


@dataclass(frozen=True)
class Split:
    """One reader's examples in two parts; no token sequence is in both, or twice in one."""

    train: list[Example]
    held_out: list[Example]
    """May be empty."""
    counts: Counts

    def with_something_to_train_on(self, sequence_length: int) -> Split:
        """The split itself; UserError if all examples are held out, skipped or masked."""
        if not self.train:
            got = "; ".join([self.counts.line(), *self.counts.warnings(sequence_length)])
            raise UserError(f"project.data must give each reader an example to train on, got {got}")
        return self


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded on the right to the longest of them."""

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    """1 where there is a token, 0 where there is padding."""
    labels_BT: torch.Tensor
    """The ids themselves (not shifted) where they count, IGNORED elsewhere."""
    targets: int
    """Tokens that the loss counts, over the whole batch."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = (self.ids_BT.to(device), self.attention_BT.to(device), self.labels_BT.to(device))
        return Batch(*tensors, self.targets)


class MalformedData(UserError):
    """Lines that cannot be learnt from; the message names the first few. `reasons` has one line for each.

    `summary` has only their number, for readers other than the owner of the data.
    """

    def __init__(self, malformed: Sequence[MalformedRecord], lines: int) -> None:
        self.malformed, self.lines = list(malformed), lines
        self.reasons = [" ".join(str(record).split()) for record in malformed]
        rest = len(self.reasons) - MAX_NAMED
        super().__init__(
            "; ".join(self.reasons[:MAX_NAMED]) + (f"; and {rest} more malformed lines" if rest > 0 else "")
        )

    @property
    def summary(self) -> str:
        """The number of malformed lines, without naming or quoting them."""
        return (
            f"project.data must hold lines that can be learnt from, got {len(self.reasons)} of {self.lines} malformed"
        )


class ExampleReader:
    """Reads records as token ids with the mask of those that the loss counts; `counts` has the totals so far.

    A text becomes windows of `sequence_length` that do not overlap, with the end-of-text token behind it; all of it
    counts. A last window of a single token has nothing to predict and is left out. A dialogue becomes one example for
    each text of `Chat.sequences`, cut at its end, in which only the assistant's answers count, each up to and with the
    token that ends it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._chat = Chat(tokenizer)
        self._encoder = DataEncoder(tokenizer)

    def read(self, source: Source, documents: Sequence[Document]) -> list[Example]:
        """All examples of `documents`; MalformedData when one of them, or more, cannot be learnt from."""
        found: list[Example] = []
        malformed = []
        for document in documents:
            try:
                found += [example for record in source.read(document) for example in self.examples(record)]
            except MalformedRecord as error:
                malformed.append(error)
        if malformed:
            raise MalformedData(malformed, len(documents))
        return found

    def examples(self, record: Record) -> list[Example]:
        """The examples of one record; none when it is skipped or masked. MalformedRecord: see `Chat.sequences`."""
        found = self._windows(record) if isinstance(record, Text) else self._dialogue(record)
        self.counts.lines_read += 1
        return found

    def _windows(self, record: Text) -> list[Example]:
        ids = _opening(self._tokenizer) + _encode(self._tokenizer, record.text)
        if self._tokenizer.eos_token_id is not None:
            ids.append(self._tokenizer.eos_token_id)
        ids_T = np.asarray(ids, dtype=np.int32)
        key = side_key(record.text) if record.whole else None
        windows = [ids_T[start : start + self._length] for start in range(0, len(ids_T) - 1, self._length)]
        self.counts.lines_skipped += not any(len(window) > 1 for window in windows)
        return [Example(window, np.ones(len(window), dtype=np.bool_), key) for window in windows if len(window) > 1]

    def _dialogue(self, dialogue: Dialogue) -> list[Example]:
        sequences, marks = self._shown(dialogue)
        encoded = [self._encoded(pieces, marks) for pieces in sequences]
        ends = [end for sequence in encoded for end in sequence.ends]
        cut = sum(end > self._length for end in ends)
        found = [sequence.example(self._length, side_key(_prompt(dialogue))) for sequence in encoded]
        found = [example for example in found if example.targets]
        self.counts += Counts(
            lines_skipped=not ends,
            lines_masked=bool(ends) and not found,
            lines_cut=bool(found) and cut > 0,
            answers=len(ends),
            answers_cut=cut,
            longest_tokens=max(ends, default=0),
        )
        return found

    def _shown(self, dialogue: Dialogue) -> tuple[list[list[Piece]], Marks | None]:
        """The dialogue as the template shows it; with marks around control tokens that its messages hold, if any do."""
        sequences = self._chat.sequences(dialogue)
        encoder, tools = self._encoder, list(dialogue.tools)
        said = [plain_message(message) for message in dialogue.messages]
        if not any(holds_control(message, control_of(message, encoder), encoder) for message in said) and not (
            holds_control(tools, encoder.control, encoder)
        ):
            return sequences, None
        pieces = [piece.text for sequence in sequences for piece in sequence]
        begin, end = unused_letters(2, json.dumps([said, tools], ensure_ascii=False), *pieces)
        marks = Marks(begin, end, edge="")
        messages = []
        for message, plain in zip(dialogue.messages, said, strict=True):
            shown = marked(plain, control_of(plain, encoder), encoder, marks)
            extra = {key: value for key, value in shown.items() if key not in ("role", "content")}
            messages.append(replace(message, content=shown["content"], extra=extra))
        shown_tools = tuple(marked(tools, encoder.control, encoder, marks))
        found = self._chat.sequences(replace(dialogue, messages=tuple(messages), tools=shown_tools))
        without = [[Piece(taken_out(piece.text, marks)[1], piece.answer) for piece in pieces] for pieces in found]
        if without != sequences:
            raise MalformedRecord(
                f"{dialogue.name} must hold no control tokens with this chat template, which shows a message otherwise "
                "with marks around them"
            )
        return found, marks

    def _encode(self, text: str, marks: Marks | None) -> list[int]:
        if marks is None:
            return _encode(self._tokenizer, text)
        return self._encoder.encode(*spans_of(text, marks), add_special_tokens=False)

    def _encoded(self, pieces: Sequence[Piece], marks: Marks | None) -> _Encoded:
        """Token ids of all pieces, whether each counts, and where the answers end."""
        sequence = _Encoded([], [], [])
        opening = [] if self._chat.has_template else _opening(self._tokenizer)
        for ids, counts in [(opening, False), *zip(self._piecewise(pieces, marks), (piece.answer for piece in pieces))]:
            sequence.ids.extend(ids)
            sequence.counted.extend([counts] * len(ids))
            sequence.ends.extend([len(sequence.ids)] if counts else [])
        return sequence

    def _piecewise(self, pieces: Sequence[Piece], marks: Marks | None) -> list[list[int]]:
        """Token ids of each piece. Where a prompt ends a token ends, as when the model generates.

        The ids are those of the whole text as long as they begin with those of the text so far, and where a token would
        straddle the boundary the new piece is tokenized alone.
        """
        alone = [self._encode(piece.text, marks) for piece in pieces]
        if list(chain.from_iterable(alone)) == self._encode("".join(piece.text for piece in pieces), marks):
            return alone  # Nothing straddles a boundary, and the text so far need not be tokenized for each piece.
        found: list[list[int]] = []
        text, ids = "", list[int]()
        for piece, tokens in zip(pieces, alone):
            text += piece.text
            whole = self._encode(text, marks)
            found.append(whole[len(ids) :] if whole[: len(ids)] == ids else tokens)
            ids += found[-1]
        return found


@dataclass(frozen=True)
class _Encoded:
    """One text of a dialogue, before it is cut."""

    ids: list[int]
    counted: list[bool]
    ends: list[int]
    """Tokens up to and with the end of each answer."""

    def example(self, length: int, key: str) -> Example:
        """Cut at `length`."""
        ids_T = np.asarray(self.ids[:length], dtype=np.int32)
        return Example(ids_T, np.asarray(self.counted[:length], dtype=np.bool_), key)


def _prompt(dialogue: Dialogue) -> str:
    """The messages before the first answer, without the system message, which many share, unless it is the only one."""
    asked = list(takewhile(lambda place: not (place[0] and place[1].role == "assistant"), enumerate(dialogue.messages)))
    said = [message.content for _, message in asked if message.role != "system"]
    return "\n".join(said or [message.content for _, message in asked])


def side_key(text: str) -> str:
    """The words of `text` without case, accents, punctuation and spacing: near duplicates have the same key."""
    letters = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFKD", text) if not combining(c))
    return " ".join(letters.casefold().split()) or text.strip()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text: the begin-of-text token, or none."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and list(tokenizer("")["input_ids"])[:1] == [begin] else []


def split_examples(
    examples: Iterable[Example], held_out_fraction: float, seed: int, max_examples: int, max_held_out: int
) -> Split:
    """Training and held-out part, decided by the content of each example alone.

    The hash of (seed, the example's key, else its token ids) is a number in [0, 1); examples below `held_out_fraction`
    are held out. So the examples of one line, and of lines with nearly the same prompt, stand on the same side
    wherever they turn up: twice in one file, or at two sites that know nothing of each other. A side may
    therefore be empty where there are few. The caps (0: none) keep the first in hash order.
    """
    unique: dict[bytes, tuple[bytes, bytes, Example]] = {}
    found = list(examples)
    for example in found:
        ids = example.ids_T.astype("<i4").tobytes()
        key = ids if example.key is None else example.key.encode()
        place = (_hash(key, seed), _hash(ids, seed), example)
        unique[ids] = min(place, unique.get(ids, place), key=lambda one: one[0])
    ranked = sorted(unique.values(), key=lambda place: place[:2])
    held_out = sum(int.from_bytes(digest) < held_out_fraction * 2**128 for digest, *_ in ranked)
    train = [example for *_, example in ranked[held_out:][: max_examples or None]]
    kept = [example for *_, example in ranked[:held_out][: max_held_out or None]]
    counts = Counts(
        examples_repeated=len(found) - len(unique),
        examples_left_out=len(unique) - len(train) - len(kept),
        examples_trained=len(train),
        examples_held_out=len(kept),
        answer_tokens=sum(example.targets for example in train),
    )
    return Split(train=train, held_out=kept, counts=counts)


def _hash(content: bytes, seed: int) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def collate(examples: Sequence[Example]) -> Batch:
    """`examples` as one batch. Padding has id 0: nothing attends to it and no loss counts it."""
    shape = (len(examples), max(len(example.ids_T) for example in examples))
    ids_BT = torch.zeros(shape, dtype=torch.int64)
    attention_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.ids_T)
        ids_T = torch.from_numpy(example.ids_T.astype(np.int64))
        ids_BT[row, :length] = ids_T
        attention_BT[row, :length] = 1
        labels_BT[row, :length] = ids_T.masked_fill(~torch.from_numpy(example.counted_T), IGNORED)
    return Batch(ids_BT, attention_BT, labels_BT, sum(example.targets for example in examples))


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, in an order that depends on `seed` alone: one seeded permutation after the other.

    For a federated client the seed is `derive_seed(seed, "order", round, partition)` of lab/learning/training.py.
    """
    assert examples, "batches need at least one example"
    order = _permutations(len(examples), seed)
    while True:
        yield collate([examples[index] for index in islice(order, batch_size)])


def _permutations(count: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    while True:
        permutation = list(range(count))
        generator.shuffle(permutation)
        yield from permutation
