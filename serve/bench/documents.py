"""Part of the benchmark with JSON documents under schemas, behind a slow link."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema

from lab.bench import Row, Sample, judged, link_process, ratio
from serve.bench.client import Answer, Client
from serve.bench.rig import CLIENT_CORE, MODEL_CORE, Rig
from serve.bench.settings import Form

LEAST_OVER_PLAIN = 1.5


@dataclass(frozen=True)
class Document:
    """One document, with speculation and without."""

    form: Form
    speculated: Answer
    plain: Answer

    @property
    def is_valid(self) -> bool:
        """Whether both texts are JSON that follows the schema."""
        return all(is_valid(one.text, self.form.schema) for one in (self.speculated, self.plain))


def schema(rig: Rig) -> Row:
    """Time documents over a link between server and verifier, with speculation and without, interleaved."""
    done = list(_documents(rig))
    speculated, plain = [one.speculated for one in done], [one.plain for one in done]
    each = ratio(list(map(_speed, speculated)), list(map(_speed, plain)))
    over = _speed(*speculated) / _speed(*plain)
    valid = sum(one.is_valid for one in done)
    row = {
        "rtt_seconds": rig.project.rtt_seconds,
        "documents": len(done),
        "valid": valid,
        "same_texts": sum(one.speculated.text == one.plain.text for one in done),
        "invalid_forms": sorted({one.form.name for one in done if not one.is_valid}),
        "tokens": sum(one.tokens for one in plain),
        "tokens_per_second": {"speculative": _speed(*speculated), "plain": _speed(*plain)},
        "first_token_seconds": Sample.of([one.first_seconds for one in plain]),
        "over_plain": over,
        "over_plain_each": each,
        "example": done[0].speculated.text,
    }
    target = f"valid {len(done)}, over_plain at least {LEAST_OVER_PLAIN}"
    return judged("schema", row, target, valid == len(done) and over >= LEAST_OVER_PLAIN)


def _speed(*answers: Answer) -> float:
    """Tokens a second of all of them, prompts included."""
    return sum(one.tokens for one in answers) / sum(one.seconds for one in answers)


def _documents(rig: Rig) -> Iterator[Document]:
    """Each form in turn. No prompt is kept, so that the first of two requests for one document has no disadvantage."""
    project, words = rig.project, rig.words(rig.settings)
    verifier = [*words, "project.prefix_tokens=0"]
    # The server ends with the rig, after its verifier: it has no request then.
    with (
        rig.on_core(MODEL_CORE, "speculative.verifier", verifier, rig.new_folder("verifier")) as port,
        link_process(port, project.rtt_seconds, rig.new_folder("link"), project.start_seconds) as link,
        rig.server([*words, "project.engine=speculative", f"project.verifier.port={link}"], core=CLIENT_CORE) as client,
    ):
        forms = project.forms
        for form in forms:  # a schema is compiled at its first request
            _ask(client, form, form.subjects[0], 1, False)
        turns = itertools.zip_longest(*([(form, subject) for subject in form.subjects] for form in forms))
        asked = [one for turn in turns for one in turn if one is not None]
        for form, subject in asked[: project.documents]:
            speculated = _ask(client, form, subject, project.document_tokens, True)
            yield Document(form, speculated, _ask(client, form, subject, project.document_tokens, False))


def _ask(client: Client, form: Form, subject: str, new_tokens: int, speculative: bool) -> Answer:
    kind = {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema}}
    messages = [{"role": "user", "content": form.prompt.format(subject)}]
    return client.chat(messages, new_tokens, response_format=kind, speculative=speculative)


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that follows its schema, by another library than the one that wrote it."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
