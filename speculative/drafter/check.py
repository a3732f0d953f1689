"""Compares a generated text with the target's own: every token that differs is a flip."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from speculative.drafter.loop import Target, speculate
from speculative.drafts import NoDrafts
from speculative.request import GenerationRequest
from speculative.settings import Mode


@dataclass(frozen=True)
class Flip:
    """A token of the text for which the target alone, after the same tokens, chooses another one."""

    index: int
    """Number of the new token, from 0."""
    token: int
    alone: int
    """The target's own choice."""
    margin: float
    """Lead of that choice over the second best; a batch of another shape changes logits by about 1e-6 in float32."""


def find_flips(
    target: Target, request: GenerationRequest, new_ids: Sequence[int], end_ids: Collection[int]
) -> list[Flip]:
    """Let the target alone decode the text token by token; after a token that differs, continue with the text's own.

    No flips: the text is the target's own. Margins need a target that reports them.
    """
    flips: list[Flip] = []
    start = 0
    while start < len(new_ids):
        alone = replace(
            request,
            prompt_ids=[*request.prompt_ids, *new_ids[:start]],
            max_new_tokens=len(new_ids) - start,
            mode=Mode.target_only,
            threshold=None,
        )
        for done in speculate(target, NoDrafts(), alone, end_ids):
            start += 1
            if done.ids[0] != new_ids[start - 1]:
                margin = done.margins[0] if done.margins else float("nan")
                flips.append(Flip(start - 1, new_ids[start - 1], done.ids[0], margin))
                break
    return flips
