"""JSON schemas for tests, a subject whose engines take them, and what every text under one must be.

python -m tests.schemas 90
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from typing import Any

import jsonschema
import torch

from lab.engine.sampling import Sampling
from lab.text.logit_rules import LogitRules
from speculative.settings import Mode
from tests.speculative.identity import Compared, Subject, compare

PROMPT_TOKENS = 16
SOURCES = ("model", "ngram", "layers", "noisy", "random")
MODES = (Mode["async"], Mode.sync)
END = 256
"""The end token of `model=random`."""
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "colour": {"enum": ["red", "green", "blue"]},
        "home": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 5}, "number": {"type": "integer", "minimum": 1,
                                                                                   "maximum": 99}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "colour", "home", "tags"],
    "additionalProperties": False,
}  # fmt: skip


def rules(schema: dict[str, Any], prompt_tokens: int = PROMPT_TOKENS, **others: Any) -> LogitRules:
    return LogitRules(prompt_tokens=prompt_tokens, schema=json.dumps(schema), **others)


def samplings(schema: dict[str, Any] = PERSON, **others: Any) -> tuple[Sampling, Sampling]:
    """Greedy and sampled."""
    drawn = [
        Sampling(seed=5, temperature=heat, top_k=top_k, top_p=top_p, logit_rules=rules(schema, **others))
        for heat, top_k, top_p in ((0.0, 0, 1.0), (0.9, 60, 0.97))
    ]
    return drawn[0], drawn[1]


class SchemaSubject(Subject):
    """`model=random` in float64, of the bytes as tokens; the draft model is the same in float32."""

    def __init__(self, prompts: int = 4) -> None:
        numbers = random.Random(3)
        words = (
            *("model=random", "model.dtype=float64", "device.threads=1", "project.context=256"),
            *("project.draft.model=random", "project.draft.dtype=float32"),
            *("project.draft.layers=3", "project.draft.noise=0.05"),
        )
        super().__init__(words, [[numbers.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(prompts)])


def texts(subject: Subject, sampling: Sampling, most: int = 130) -> list[str]:
    """What the target writes to each prompt, all of them at once, without its end tokens; "" where it does not end."""
    engine = subject.engine(len(subject.prompts))
    sessions = [engine.open(prompt, sampling) for prompt in subject.prompts]
    written = [session.step.next_ids[-1:] for session in sessions if session.step]
    going = list(zip(sessions, written, strict=True))
    while going := [(session, ids) for session, ids in going if ids[-1] != END and len(ids) < most]:
        steps = engine.extend([(session, ids[-1:]) for session, ids in going], "last")
        for (_, ids), step in zip(going, steps, strict=True):
            ids += step.next_ids[-1:]
    said = [bytes(token for token in ids[:-1] if token < 256) for ids in written]
    return [text.decode(errors="replace") * (ids[-1] == END) for text, ids in zip(said, written, strict=True)]


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that follows its schema, by another library than the one that wrote it."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def compare_schemas(new_tokens: int, *, whole: bool = True) -> Compared:
    """Speculated texts under a schema against the target alone; after their end they hold end tokens. Not whole: each
    source once, greedy or sampled."""
    torch.set_num_threads(1)
    subject, total = SchemaSubject(), Compared()
    drawn = samplings()
    if whole:
        cells = list(itertools.product(drawn, SOURCES, MODES, ((5,), (7, 2))))
    else:
        cells = [
            (drawn[number % 2], source, MODES[number // 3], ((5,), (7, 2))[number == 1])
            for number, source in enumerate(SOURCES)
        ]
    for sampling, source, mode, lengths in cells:
        total.add(compare(subject, source, sampling, lengths, new_tokens, mode=mode))
    return total


# Schemas with few texts


def finite(numbers: random.Random, depth: int = 2) -> tuple[dict[str, Any], list[str]]:
    """A random schema, and every text that follows it in one line: an oracle that parses nothing."""
    kind = numbers.choice(["enum", "integer", "boolean", "null", "object", "array", "any"] if depth else ["enum"])
    if kind == "enum":
        values = numbers.sample(["a", "ab", "b c", '"', 12, 1, True, None, "ü", -7, "true"], numbers.randrange(1, 5))
        return {"enum": values}, [json.dumps(value, ensure_ascii=False) for value in values]
    if kind == "integer":
        least = numbers.randrange(1, 30)
        most = least + numbers.randrange(0, 25)
        schema = {"type": "integer", "minimum": least, "maximum": most}
        return schema, [str(value) for value in range(least, most + 1)]
    if kind == "boolean":
        return {"type": "boolean"}, ["true", "false"]
    if kind == "null":
        return {"type": "null"}, ["null"]
    if kind == "any":
        options = [finite(numbers, depth - 1) for _ in range(2)]
        return {"anyOf": [one for one, _ in options]}, [text for _, found in options for text in found]
    if kind == "array":
        item, found = finite(numbers, depth - 1)
        found = found[:4]
        item = {"enum": [json.loads(text) for text in found]}
        least, most = numbers.choice([(0, 1), (1, 2), (2, 2)])
        schema = {"type": "array", "items": item, "minItems": least, "maxItems": most}
        rows = (row for count in range(least, most + 1) for row in itertools.product(found, repeat=count))
        return schema, [f"[{', '.join(row)}]" for row in rows]
    return _object(numbers, depth)


def _object(numbers: random.Random, depth: int) -> tuple[dict[str, Any], list[str]]:
    names = numbers.sample(["a", "key", "ke", "Ä b"], numbers.randrange(1, 4))
    parts = {name: finite(numbers, depth - 1) for name in names}
    required = [name for name in names if numbers.random() < 0.6]
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in parts.items()},
        "required": required,
        "additionalProperties": False,
    }
    options = []
    for name, (_, found) in parts.items():
        key = json.dumps(name, ensure_ascii=False)
        options.append([f"{key}: {text}" for text in found[:6]] + ([] if name in required else [""]))
        schema["properties"][name] = {"enum": [json.loads(text) for text in found[:6]]}  # type: ignore[index]
    rows = itertools.product(*options)
    return schema, [f"{{{', '.join(part for part in row if part)}}}" for row in rows]


if __name__ == "__main__":
    done = compare_schemas(int(sys.argv[1]))
    print(f"{done.tokens} tokens, {done.differing} differ, {done.accepted} guesses accepted, {len(done.cells)} cells")
