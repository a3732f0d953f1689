"""transformers' own speculation, as a baseline: target and drafter in one process, no network."""

import time
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.bench import pinned
from lab.device import open_device
from lab.models.layers import load_layers
from lab.models.sources import load_model
from lab.text.prompts import prompt_ids
from speculative.bench.rig import VERIFIER_CORE
from speculative.settings import DraftSource, SpeculativeSettings


class AssistedRun:
    """The target of the benchmark with the drafter of `project.draft`, greedy, on the verifier's core."""

    def __init__(self, settings: SpeculativeSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        device = open_device(settings.device)
        draft = settings.project.draft
        self._settings, self._tokenizer = settings, tokenizer
        self._model: Any = load_model(settings.model, device).model
        self._device = device
        self._options: dict[str, Any] = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": draft.longest_ngram}
        if draft.source is DraftSource.layers:
            layers = load_layers(settings.model, device, range(draft.layers), embedding=True, head=True)
            self._options = {"assistant_model": layers}

    def speed(self, prompt: str) -> float:
        """Tokens per second of one answer."""
        bench = self._settings.project.bench
        ids = torch.tensor([prompt_ids(self._tokenizer, prompt, chat=True)], device=self._device)
        with pinned(VERIFIER_CORE), torch.inference_mode():
            began = time.perf_counter()
            text = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=bench.text_tokens,
                **self._options,
            )
            seconds = time.perf_counter() - began
        return float((text.shape[1] - ids.shape[1]) / seconds)
