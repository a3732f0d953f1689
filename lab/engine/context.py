"""The longest text whose tokens do not depend on how it is divided into forward passes."""

import logging
from typing import Any

from transformers import PreTrainedConfig

from lab.settings import UserError

log = logging.getLogger(__name__)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Most tokens of a text for which a model's results do not vary; None if its config names no limit.

    With longrope, rotary frequencies change for the whole text once it exceeds the length of the original training.
    Keys that were computed before still have the old frequencies, and shorter texts in the same pass would get the new
    ones: such a model is served up to that length. (transformers computes the whole text again there.)
    """
    text: Any = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    ropes = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    changing = [rope for rope in ropes if rope.get("rope_type", rope.get("type")) == "longrope"]
    lengths = [
        getattr(text, "max_position_embeddings", None),
        # Where a config says this of itself (Phi-3), `generate` begins anew there whatever the frequencies do.
        getattr(text, "original_max_position_embeddings", None),
        *(rope.get("original_max_position_embeddings") for rope in changing),
    ]
    return min((int(length) for length in lengths if length), default=None)


def model_context(config: PreTrainedConfig, wanted: int) -> int:
    """Most tokens of a text: `wanted`, but at most `longest_text`; 0 stands for `longest_text`.

    Raises:
        UserError: neither gives a limit.
    """
    longest = longest_text(config)
    if not (wanted or longest):
        raise UserError("project.context must be set for a model that does not say what it was made for, got 0")
    if wanted and longest and wanted > longest:
        log.warning("project.context=%d is more than the %d tokens that this model is served with", wanted, longest)
    return min(length for length in (wanted, longest) if length)
