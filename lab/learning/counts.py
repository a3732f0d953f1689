"""Counts of a reader's lines and examples, which may leave the site although the data may not."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Self


@dataclass(kw_only=True)
class Counts:
    """Counts of lines (skipped, masked whole, or read into examples) and of what happened to their examples.

    A line is a line of a JSONL file that is not blank, a row of a dataset, or a file of a folder. It gives one example;
    a text gives one for each window, and a dialogue several if the chat template shows earlier answers differently
    later on. A line is cut when some but not all of its answers' tokens are within `project.data.sequence_length`.
    """

    lines_read: int = 0
    lines_skipped: int = 0
    """Lines without an answer to learn from, or of a single token."""
    lines_masked: int = 0
    """Lines masked whole: no token of an answer is within the sequence length."""
    lines_cut: int = 0
    answers: int = 0
    """Answers in the dialogues that were read."""
    answers_cut: int = 0
    """Answers whose end token is beyond the sequence length, so that no end is learnt from them."""
    longest_tokens: int = 0
    """The sequence length that would hold every answer of every dialogue."""
    examples_repeated: int = 0
    """Examples with the same tokens as another one, which is kept once."""
    examples_left_out: int = 0
    """Examples beyond `project.data.max_examples` or `max_held_out`."""
    examples_trained: int = 0
    examples_held_out: int = 0
    answer_tokens: int = 0
    """Tokens of the examples trained on that the loss counts."""

    def __add__(self, other: Self) -> Self:
        """The sum of both counts."""
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return replace(self, **sums | {"longest_tokens": max(self.longest_tokens, other.longest_tokens)})

    @classmethod
    def checked(cls, numbers: Mapping[str, object]) -> Self:
        """Counts from another machine; ValueError unless all are there, each a whole number of at least 0."""
        known = {field.name for field in fields(cls)}
        if odd := sorted(known ^ numbers.keys()):
            raise ValueError(f"{odd[0]} is unknown or missing")
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")
        return cls(**numbers)  # type: ignore[arg-type]  # checked above

    def line(self) -> str:
        """All counts as one line of a log."""
        return (
            f"{self.lines_read} lines read: {self.lines_skipped} skipped, {self.lines_masked} masked whole, "
            f"{self.lines_cut} cut; examples: {self.examples_trained} trained on ({self.answer_tokens} answer tokens), "
            f"{self.examples_held_out} held out, {self.examples_repeated} repeated, {self.examples_left_out} left out"
        )

    def warnings(self, sequence_length: int) -> Iterator[str]:
        """Advice for the person who started the run: settings that should be changed."""
        remedy = f"project.data.sequence_length={self.longest_tokens} would hold all of them"
        if self.lines_masked:
            masked = f"{self.lines_masked} of {self.lines_read} lines are masked whole"
            yield f"{masked}: no answer within the first {sequence_length} tokens; {remedy}"
        if self.answers_cut:
            yield f"{self.answers_cut} of {self.answers} answers are cut before their end token; {remedy}"
        if self.lines_skipped:
            yield f"{self.lines_skipped} of {self.lines_read} lines skipped: they hold no answer to learn from"
