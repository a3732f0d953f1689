"""A model cut into two shards writes what the whole model writes. `python examples/split_generate.py`"""

import sys
from pathlib import Path

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from split.inference.open import sharded_model
from split.settings import SplitSettings


def write(shards: int, tokens: int = 24) -> str:
    """Greedy text of a model cut into `shards`, all of them in this process."""
    overrides = ["project.transport=inproc", f"project.local_shards={shards}"]
    settings = compose_settings("split_inf", [*overrides, *sys.argv[1:]], SplitSettings)
    prompt = load_tokenizer_only(settings.model)("The sky is blue because")["input_ids"]
    model = sharded_model(settings, open_device(settings.device), Path())
    with model as engine, engine.open(prompt, Sampling.greedy()) as session:
        text = [session.step.next_ids[-1]]
        while len(text) < tokens:
            [step] = engine.extend([(session, text[-1:])], "last")  # ids in, hidden states across, a token out
            text.append(step.next_ids[-1])
    return load_tokenizer_only(settings.model).decode(text)


print(whole := write(1))
assert write(2) == whole
