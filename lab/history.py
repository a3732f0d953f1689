"""One text as its words need it: how often each token stands in it, and what its logits become by that.

Shapes: K consecutive places of one text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lab.words import Words


class History:
    """The tokens of one text, as its words need them: an engine tells it what the text is, and it follows.

    Counts are kept, not made anew: going on costs what has come since, going back what is taken back.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._ids: list[int] = []
        self._counted = 0
        """The counts below are those of so many ids at the beginning."""
        self._counts_2V: Tensor | None = None
        """How often each token stands in the prompt, and behind it."""
        self._single = sorted({word[0] for word in words.bad_words if len(word) == 1})
        self._endings: dict[int, list[tuple[int, ...]]] = {}
        """Bad words of several tokens, by the one before the last."""
        for word in words.bad_words:
            if len(word) > 1:
                self._endings.setdefault(word[-2], []).append(word)

    def hold(self, position: int, ids: Sequence[int]) -> None:
        """From `position` on the text is `ids`; what it was there is forgotten."""
        self._count_to(min(self._counted, position))
        self._ids[position:] = ids

    def changed(self, logits_KV: Tensor, end: int) -> Tensor:
        """The logits to draw from, for the places behind the last K tokens of the text's first `end`.

        Args:
            logits_KV: float32 or float64; not changed.
            end: The last row is about the place `end`.
        """
        words = self._words
        scores_KV = logits_KV.clone()
        for row in range(len(scores_KV)):
            if banned := self._banned(end - len(scores_KV) + 1 + row, scores_KV.shape[1]):
                scores_KV[row, banned] = -math.inf
        if words.logit_bias:
            tokens, biases = zip(*words.logit_bias)
            scores_KV[:, list(tokens)] += scores_KV.new_tensor(biases)
        if (words.repetition_penalty, words.presence_penalty, words.frequency_penalty) != (1.0, 0.0, 0.0):
            scores_KV = self._penalised(scores_KV, end)
        return scores_KV

    def _banned(self, place: int, vocabulary_size: int) -> list[int]:
        """The tokens that must not stand at `place`."""
        if not self._endings:
            return self._single if len(self._single) < vocabulary_size else []
        before = self._ids[place - 1] if place else -1
        found = {
            word[-1]
            for word in self._endings.get(before, ())
            if len(word) <= place + 1 and tuple(self._ids[place - len(word) + 1 : place]) == word[:-1]
        }
        banned = sorted(found.union(self._single))
        return banned if len(banned) < vocabulary_size else []

    def _penalised(self, scores_KV: Tensor, end: int) -> Tensor:
        words, rows = self._words, len(scores_KV)
        if self._counts_2V is None:
            self._counts_2V = torch.zeros(2, scores_KV.shape[1], dtype=torch.int32, device=scores_KV.device)
        self._count_to(end - rows + 1)
        counts_2KV = self._counts_2V[:, None].repeat(1, rows, 1)
        later = [(row, place) for row in range(rows) for place in range(end - rows + 1, end - rows + 1 + row)]
        if later:
            sides = [int(place >= words.prompt_tokens) for _, place in later]
            where = (sides, [row for row, _ in later], [self._ids[place] for _, place in later])
            index = tuple(torch.tensor(numbers, device=scores_KV.device) for numbers in where)
            counts_2KV.index_put_(index, torch.ones_like(index[0], dtype=torch.int32), accumulate=True)
        generated_KV = counts_2KV[1].to(scores_KV.dtype)
        # Each step is rounded by itself, on every device and in every shape: no fused multiply-add.
        if words.repetition_penalty != 1:
            divided_KV = scores_KV / words.repetition_penalty
            shrunk_KV = torch.where(scores_KV > 0, divided_KV, scores_KV * words.repetition_penalty)
            scores_KV = torch.where(counts_2KV.sum(0) > 0, shrunk_KV, scores_KV)
            scores_KV = scores_KV.clamp(max=torch.finfo(scores_KV.dtype).max)
        scores_KV = scores_KV - generated_KV * words.frequency_penalty
        return scores_KV - (generated_KV > 0).to(scores_KV.dtype) * words.presence_penalty

    def _count_to(self, length: int) -> None:
        """Make the counts those of the first `length` ids."""
        if self._counts_2V is not None and length != self._counted:
            first, last = sorted((length, self._counted))
            places = range(first, last)
            sides = [int(place >= self._words.prompt_tokens) for place in places]
            index = (sides, self._ids[first:last])
            step = torch.tensor(1 if length > self._counted else -1, dtype=torch.int32)
            self._counts_2V.index_put_(
                tuple(torch.tensor(numbers, device=self._counts_2V.device) for numbers in index),
                step.to(self._counts_2V.device),
                accumulate=True,
            )
        self._counted = length if self._counts_2V is not None else 0
