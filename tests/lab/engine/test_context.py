"""How long a text may be."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from lab.engine.context import longest_text, model_context
from lab.settings import UserError

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}


def test_longrope_is_served_up_to_where_its_frequencies_change() -> None:
    config = AutoConfig.for_model("phi3", max_position_embeddings=131072, rope_parameters=LONGROPE)
    assert longest_text(config) == 4096
    assert model_context(config, 0) == 4096
    assert model_context(config, 100) == 100


def test_more_than_a_model_is_served_with_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model("phi3", max_position_embeddings=131072, rope_parameters=LONGROPE)
    assert model_context(config, 8192) == 4096
    assert "project.context=8192 is more than the 4096 tokens" in caplog.text


def test_other_models_are_served_up_to_what_they_were_made_for() -> None:
    assert longest_text(AutoConfig.for_model("llama", max_position_embeddings=2048)) == 2048
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    assert longest_text(AutoConfig.for_model("llama", max_position_embeddings=2048, rope_parameters=yarn)) == 2048


def test_a_model_that_does_not_say_needs_a_context() -> None:
    config = AutoConfig.for_model("bloom")
    assert longest_text(config) is None
    with pytest.raises(UserError, match=r"project\.context must be set"):
        model_context(config, 0)
    assert model_context(config, 64) == 64
