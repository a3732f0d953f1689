"""Speed of speculation for several full windows at once: one verifier process, and all drafters in this process.

    python -m speculative.decode project.context=1024 project.sessions=4

Every text fills its window: `project.context` tokens, of which the last `project.max_new_tokens` are timed. Prompts are
`prompt`, repeated, or by default the source of Python's argparse: text that prompt lookup can draft.
"""

import argparse
import inspect
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.command import entry
from lab.command.processes import listening, own_overrides
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from lab.tracking import Tracker
from speculative.drafter.session import draft
from speculative.settings import SpeculativeSettings

START_SECONDS = 300.0
WARM_UP_TOKENS = 8
_NOT_FOR_THE_VERIFIER = ("prompt", "hydra.", "network.port=")


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Generate all texts concurrently; return the figures of the last line."""
    project = settings.project
    context = project.context or settings.model.architecture.context
    if project.max_new_tokens < 1:
        raise UserError(f"project.max_new_tokens must be at least 1 to be timed, got {project.max_new_tokens}")
    if context <= project.max_new_tokens:
        raise UserError(f"project.context must be greater than max_new_tokens={project.max_new_tokens}, got {context}")
    prompts = _prompts(settings, context - project.max_new_tokens)
    overrides = [
        *own_overrides(_NOT_FOR_THE_VERIFIER),
        "network.port=0",
        f"project.max_connections={project.sessions + 1}",
    ]
    with (
        Tracker(settings, "speculative-decode", place.folder) as tracker,
        listening("speculative.verifier", overrides, place.folder / "verifier", START_SECONDS) as port,
    ):
        asked = replace(
            settings,
            network=replace(settings.network, host="127.0.0.1", port=port),
            project=replace(project, chat=False, check=False),
        )
        warm_up = replace(asked.project, max_new_tokens=WARM_UP_TOKENS)
        draft(replace(asked, prompt="warm up", project=warm_up), entry.Run(place.folder))
        runs = [entry.Run(place.folder / f"text-{index}") for index in range(len(prompts))]
        place.so_far = lambda: {"new_tokens": sum(text.so_far().get("new_tokens", 0) for text in runs)}
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked_for = [replace(asked, prompt=prompt) for prompt in prompts]
            texts = [pool.submit(draft, one, text) for one, text in zip(asked_for, runs, strict=True)]
        figures = figures_of([text.result() for text in texts])
        figures |= {"context": context, "sessions": project.sessions}
        tracker.result(figures)
    return figures


def figures_of(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens of all texts over the time of the slowest, medians of their own times, acceptance over all texts."""
    checked = sum(text["drafts_checked"] for text in texts)
    tokens = sum(text["new_tokens"] for text in texts)
    return {
        "new_tokens": tokens,
        "tokens_per_second": tokens / max(text["generation_seconds"] for text in texts),
        "token_seconds_p50": statistics.median(text["ms_per_token_p50"] for text in texts) / 1000,
        "time_to_first_token_seconds": statistics.median(text["time_to_first_token_seconds"] for text in texts),
        "alpha": sum(text["drafts_accepted"] + text["drafts_late"] for text in texts) / checked if checked else None,
    }


def _prompts(settings: SpeculativeSettings, length: int) -> list[str]:
    """One prompt of about `length` tokens, never more, for each session."""
    tokenizer = load_tokenizer_only(settings.model)
    text = settings.prompt or inspect.getsource(argparse)
    ids = list(tokenizer(text)["input_ids"])
    ids *= -(-length * settings.project.sessions // len(ids))
    starts = range(0, length * settings.project.sessions, length)
    return [_cut(tokenizer, ids[start : start + length]) for start in starts]


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of these ids, shortened until it has at most as many tokens: a cut text may be tokenized differently."""
    for count in range(len(ids), 0, -1):
        text = str(tokenizer.decode(ids[:count]))
        if text and len(tokenizer(text)["input_ids"]) <= len(ids):
            return text
    raise UserError(f"project.context must leave room for a prompt, got {len(ids)} tokens for it")


main = entry.command("spec_decoding", SpeculativeSettings, run)

if __name__ == "__main__":
    main()
