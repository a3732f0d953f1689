"""The tokens of one text, counted for its logit rules, and the changes to its logits.

Shapes: K consecutive positions of one text, V vocabulary, U different tokens of the text.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lab.text.grammars import Grammars
from lab.text.logit_rules import LogitRules


class History:
    """The tokens of one text with their counts; the engine keeps it up to date.

    Counts are updated, not computed again: advancing and rewinding cost as much as the tokens added or removed. Only
    tokens of the text have counts, so a row costs little more than one copy of its logits.
    """

    def __init__(self, rules: LogitRules, grammars: Grammars | None = None) -> None:
        """`grammars` compiles the schema of the rules, if they have one."""
        self._rules = rules
        self._ids: list[int] = []
        self._counts = _Counts(rules.prompt_tokens)
        self._singles = sorted({word[0] for word in rules.bad_words if len(word) == 1})
        self._bias = dict(rules.logit_bias)
        self._endings: dict[int, list[tuple[int, ...]]] = {}
        """Bad words of several tokens, by their last token but one."""
        for word in rules.bad_words:
            if len(word) > 1:
                self._endings.setdefault(word[-2], []).append(word)
        self._grammar = None
        if rules.schema:
            assert grammars is not None, "engines without grammars refuse schemas: check_logit_rules"
            self._grammar = grammars.begin(rules.schema)
        self._singles_B: Tensor | None = None
        self._biased_B: Tensor | None = None
        self._biases_B: Tensor | None = None

    def hold(self, position: int, ids: Sequence[int]) -> None:
        """Replace the text from `position` on by `ids`."""
        self._counts.go_back(position, self._ids)
        if self._grammar is not None:
            self._grammar.go_back(max(0, position - self._rules.prompt_tokens))
        self._ids[position:] = ids

    def changed(self, logits_KV: Tensor, end: int) -> Tensor:
        """The logits to draw from, for the positions after each of the last K of the text's first `end` tokens.

        Args:
            logits_KV: float32 or float64; not changed.
            end: Position that the last row predicts.
        """
        scores_KV = logits_KV.clone()
        forbidden_KV = self._forbidden(logits_KV, end)
        self._ban(scores_KV, logits_KV, end)
        if forbidden_KV is not None and self._rules.bad_words:
            # Bad words yield to the schema: a text under a schema has to follow it, and it has to go on.
            stuck_K1 = (scores_KV.isneginf() | forbidden_KV).all(-1, keepdim=True)
            scores_KV = torch.where(stuck_K1, logits_KV, scores_KV)
        if self._bias:
            if self._biased_B is None or self._biases_B is None:
                self._biased_B = torch.tensor(list(self._bias), device=scores_KV.device)
                self._biases_B = torch.tensor(list(self._bias.values()), device=scores_KV.device, dtype=torch.float64)
            scores_KV[:, self._biased_B] += self._biases_B.to(scores_KV.dtype)
        if self._rules.has_penalties:
            self._penalise(scores_KV, end)
        if forbidden_KV is not None:  # last: no bias and no penalty can allow what the schema does not
            scores_KV.masked_fill_(forbidden_KV, -math.inf)
        return scores_KV

    def _forbidden(self, logits_KV: Tensor, end: int) -> Tensor | None:
        """Whether each token would leave the schema, at the positions after each of the last K of `end` tokens."""
        if self._grammar is None:
            return None
        grammar, rows_KV = self._grammar, torch.zeros(logits_KV.shape, dtype=torch.bool)
        for row, place in enumerate(range(end - len(logits_KV) + 1, end + 1)):
            generated = place - self._rules.prompt_tokens
            if generated < 0:  # in the prompt
                continue
            grammar.go_back(generated)
            grammar.go_on(self._ids[self._rules.prompt_tokens + grammar.length : place])
            allowed_X = torch.frombuffer(grammar.allowed(), dtype=torch.uint8)[: logits_KV.shape[-1]]
            rows_KV[row] = True
            rows_KV[row, : len(allowed_X)] = allowed_X == 0
        return rows_KV.to(logits_KV.device)

    def _ban(self, scores_KV: Tensor, logits_KV: Tensor, end: int) -> None:
        rows, vocabulary_size = scores_KV.shape
        if self._singles and len(self._singles) < vocabulary_size:
            if self._singles_B is None:
                self._singles_B = torch.tensor(self._singles, device=scores_KV.device)
            scores_KV[:, self._singles_B] = -math.inf
        for row in range(rows) if self._endings else ():
            completing = self._completing(end - rows + 1 + row)
            if len(completing.union(self._singles)) == vocabulary_size:
                scores_KV[row] = logits_KV[row]  # the text has to go on
            elif completing:
                scores_KV[row, list(completing)] = -math.inf

    def _completing(self, place: int) -> set[int]:
        """Tokens that would complete a bad word at `place`."""
        before = self._ids[place - 1] if place else -1
        return {
            word[-1]
            for word in self._endings.get(before, ())
            if len(word) <= place + 1 and tuple(self._ids[place - len(word) + 1 : place]) == word[:-1]
        }

    def _penalise(self, scores_KV: Tensor, end: int) -> None:
        rules, dtype = self._rules, scores_KV.dtype
        tokens_U, counts_2KU = self._counts.before(self._ids, end, len(scores_KV), scores_KV.device)
        scores_KU = scores_KV[:, tokens_U]
        generated_KU = counts_2KU[1].to(dtype)
        # Each step is rounded by itself, on every device and in every shape: no fused multiply-add.
        if rules.repetition_penalty != 1:
            divided_KU = scores_KU / rules.repetition_penalty
            shrunk_KU = torch.where(scores_KU > 0, divided_KU, scores_KU * rules.repetition_penalty)
            scores_KU = torch.where(counts_2KU.sum(0) > 0, shrunk_KU, scores_KU).clamp_(max=torch.finfo(dtype).max)
        scores_KU = scores_KU - generated_KU * rules.frequency_penalty
        scores_KV[:, tokens_U] = scores_KU - (generated_KU > 0).to(dtype) * rules.presence_penalty


class _Counts:
    """Counts of each token in the prompt of a text, and after it."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._length = 0
        """Number of ids at the beginning of the text that are counted."""
        self._columns: dict[int, int] = {}
        """The column of each token that has occurred."""
        self._tokens_U = torch.zeros(0, dtype=torch.int64)
        self._counts_2U = torch.zeros(2, 0, dtype=torch.int32)

    def go_back(self, length: int, ids: Sequence[int]) -> None:
        """Rewind to the first `length` of the ids counted so far, `ids`."""
        if length < self._length:
            self._add(ids, range(length, self._length), -1)
            self._length = length

    def before(self, ids: Sequence[int], end: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens, and their counts before each of the positions after the last `rows` of the first `end` ids."""
        first = end - rows + 1
        self._make_columns(ids[self._length : end], device)
        self.go_back(first, ids)
        self._add(ids, range(self._length, first), 1)
        self._length = first
        counts_2KU = self._counts_2U[:, None].repeat(1, rows, 1)
        for row, place in enumerate(range(first, end), start=1):
            counts_2KU[int(place >= self._prompt_tokens), row:, self._columns[ids[place]]] += 1
        return self._tokens_U, counts_2KU

    def _add(self, ids: Sequence[int], places: range, step: int) -> None:
        if not places:
            return
        device = self._counts_2U.device
        sides = torch.tensor([int(place >= self._prompt_tokens) for place in places], device=device)
        columns = torch.tensor([self._columns[ids[place]] for place in places], device=device)
        steps = torch.full((len(places),), step, dtype=torch.int32, device=device)
        self._counts_2U.index_put_((sides, columns), steps, accumulate=True)

    def _make_columns(self, ids: Sequence[int], device: torch.device) -> None:
        new = [token for token in dict.fromkeys(ids) if token not in self._columns]
        self._columns |= {token: column for column, token in enumerate(new, start=len(self._columns))}
        if new:
            tokens_U = torch.tensor(new, device=device)
            self._tokens_U = torch.cat([self._tokens_U.to(device), tokens_U])
            counts_2U = torch.zeros(2, len(new), dtype=torch.int32, device=device)
            self._counts_2U = torch.cat([self._counts_2U.to(device), counts_2U], 1)
