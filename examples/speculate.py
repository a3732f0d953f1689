"""Prompt lookup drafts tokens, the model checks all of them in one forward pass. `python examples/speculate.py`"""

import sys

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from speculative.acceptance import common_length
from speculative.drafts import NgramDrafts
from speculative.settings import SpeculativeSettings
from speculative.verifier.target import open_target

settings = compose_settings("spec_decoding", sys.argv[1:], SpeculativeSettings)
engine, tokenizer = open_target(settings, open_device(settings.device)).engine, load_tokenizer_only(settings.model)
prompt = tokenizer("The days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday,")["input_ids"]
drafts = NgramDrafts(longest=3, shortest=1)
drafts.begin(prompt)
text, passes = list(prompt), 0
with engine.open(prompt[:-1], Sampling.greedy()) as session:  # the cache holds all but the last token
    while len(text) < len(prompt) + 48:
        draft = drafts.propose(8)
        [step] = engine.extend([(session, [text[-1], *draft])], "all")  # next_ids: what the model puts after each
        accepted = common_length(draft, step.next_ids)
        session.position -= len(draft) - accepted  # forget the wrong draft tokens: an assignment
        drafts.correct(len(text) + accepted, [step.next_ids[accepted]])
        text += step.next_ids[: accepted + 1]
        passes += 1
print(tokenizer.decode(text))
print(f"{len(text) - len(prompt)} new tokens in {passes} forward passes")
