"""How records become examples: token ids, which of them the loss counts, held-out parts, batches.

Knows nothing about where a record comes from, about clients or models.

Shapes: B examples in a batch, T tokens (the longest example of the batch).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from lab.data import Dialogue, Record, Text
from lab.settings import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that does not count, as torch and transformers have it."""


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of at most `sequence_length`, and which of them the loss counts."""

    ids_T: NDArray[np.int32]
    counted_T: NDArray[np.bool_]
    """True where the token is predicted in the loss. Position 0 has nothing before it and never counts."""

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return int(self.counted_T[1:].sum())


@dataclass(frozen=True)
class Split:
    """One reader's examples; no token sequence stands on both sides, or twice on one."""

    train: list[Example]
    held_out: list[Example]


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


def examples(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> list[Example]:
    """Records as token ids with the mask of what the loss counts.

    A text becomes windows of `sequence_length` that do not overlap, with the end-of-text token behind it; all of it
    counts. A last window of a single token has nothing to predict and is left out. A dialogue becomes one example, cut
    at its end, in which only the assistant's answers count, each up to and with the token that ends it.

    Dialogues of which no answer is left, and answers that the chat template does not keep as it would generate them
    (some drop the reasoning of earlier turns), are counted in one warning each. UserError when a dialogue does not suit
    the template.
    """
    found: list[Example] = []
    empty = uncounted = 0
    for record in records:
        if isinstance(record, Text):
            found += _windows(record.text, tokenizer, sequence_length)
            continue
        example, lost = _dialogue(record, tokenizer, sequence_length)
        uncounted += lost
        if example.targets:
            found.append(example)
        else:
            empty += 1
    if empty:
        log.warning("%d dialogues skipped: no answer within the first %d tokens", empty, sequence_length)
    if uncounted:
        log.warning("%d answers not counted in the loss: the chat template rewrites them later on", uncounted)
    return found


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Example]:
    ids = _opening(tokenizer) + _encode(tokenizer, text)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    ids_T = np.asarray(ids, dtype=np.int32)
    for start in range(0, len(ids_T) - 1, length):
        window = ids_T[start : start + length]
        if len(window) > 1:
            yield Example(window, np.ones(len(window), dtype=np.bool_))


def _dialogue(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Example, int]:
    """The example, and how many answers the template did not let us count."""
    if tokenizer.chat_template:
        pieces, lost = _template_pieces(dialogue, tokenizer)
        ids, counted = _join(pieces, tokenizer, opening=[])
    else:
        pieces, lost = _plain_pieces(dialogue, tokenizer), 0
        ids, counted = _join(pieces, tokenizer, _opening(tokenizer))
    return Example(np.asarray(ids[:length], dtype=np.int32), np.asarray(counted[:length], dtype=np.bool_)), lost


Piece = tuple[str, bool]
"""A stretch of a dialogue's text, and whether it is an answer."""


def _plain_pieces(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Without a chat template: a prompt, a newline, an answer, the end-of-text token."""
    end = str(tokenizer.eos_token or "")
    turns = (message.role == "assistant" for message in dialogue.messages)
    return [(m.content + (end if answer else "\n"), answer) for m, answer in zip(dialogue.messages, turns)]


def _template_pieces(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece], int]:
    """An answer is what the template adds to the text that it would have given the model to generate from.

    So nothing here knows a template. An answer that the whole dialogue shows differently is not one that a model would
    have to give there: it does not count, and the second value says how many those are.
    """
    messages = [asdict(message) for message in dialogue.messages]

    def render(count: int, generate: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=generate))
        except TemplateError as error:
            raise UserError(f"{dialogue.name} must suit the model's chat template, got: {error}") from None

    whole = render(len(messages))
    pieces: list[Piece] = []
    done = lost = 0
    # An opening message of the assistant answers nothing.
    for index in (i for i, message in enumerate(dialogue.messages) if i and message.role == "assistant"):
        before, through = render(index, generate=True), render(index + 1)
        if not (whole.startswith(through) and through.startswith(before)):
            lost += 1
            continue
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(through)], True)]
        done = len(through)
    return [*pieces, (whole[done:], False)], lost


def _join(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, opening: list[int]
) -> tuple[list[int], list[bool]]:
    """Token ids of all pieces and whether each counts.

    Where a prompt ends a token ends, as when the model generates: the ids are those of the whole text as long as they
    begin with those of the text so far, and where a token would straddle the boundary the new piece is tokenized alone.
    """
    ids, counted, text = list(opening), [False] * len(opening), ""
    for piece, counts in pieces:
        text += piece
        whole = opening + _encode(tokenizer, text)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _encode(tokenizer, piece)
        counting = _up_to_last(new, tokenizer.eos_token_id) if counts else 0
        ids += new
        counted += [True] * counting + [False] * (len(new) - counting)
    return ids, counted


def _up_to_last(ids: list[int], end: int | None) -> int:
    """Length of `ids` up to and with the last `end`: what a template writes behind it no model has to generate."""
    return len(ids) - ids[::-1].index(end) if end in ids else len(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-text token, or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and list(tokenizer("")["input_ids"])[:1] == [begin] else []


def split_examples(
    examples: Iterable[Example], held_out_fraction: float, seed: int, max_examples: int, max_held_out: int
) -> Split:
    """Training and held-out part, decided by each example's content.

    An example's hash of (seed, token ids) is a number in [0, 1); those below `held_out_fraction` are held out. So
    the same token sequence stands on the same side wherever it turns up: twice in one text, or with two clients that
    know nothing of each other. Where that leaves one side empty, the lowest (highest) hash goes there alone. The caps
    (0: none) keep the first in hash order. UserError when there are fewer than two different examples.
    """
    unique = {_content_hash(example, seed): example for example in examples}
    if len(unique) < 2:
        raise UserError(f"project.data must give each reader at least 2 different examples, got {len(unique)}")
    ranked = sorted(unique)
    below = sum(int.from_bytes(digest) < held_out_fraction * 2**128 for digest in ranked)
    held_out = min(max(below, 1), len(ranked) - 1)
    return Split(
        train=[unique[digest] for digest in ranked[held_out:][: max_examples or None]],
        held_out=[unique[digest] for digest in ranked[:held_out][: max_held_out or None]],
    )


def _content_hash(example: Example, seed: int) -> bytes:
    ids = example.ids_T.astype("<i4").tobytes()
    return hashlib.blake2b(ids, digest_size=16, key=seed.to_bytes(8, "little")).digest()


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

    For a federated client the seed is `derive_seed(seed, "order", round, partition)` of lab/training.py.
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
