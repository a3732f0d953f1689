"""Speculated text is what the target says alone, whatever the architecture: under rewinds, neighbours and chunks.

A few families here; `python -m tests.soak families_speculated` has all that are proved.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.architectures import NAMED, target_of
from tests.speculative.identity import speculated_equals_alone

SAMPLE = sorted({"gpt2", "bloom", "deepseek_v3", *random.Random(1).sample(NAMED, 3)})


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SAMPLE)
def test_speculated_text_of_a_family_is_the_target_s_own(name: str) -> None:
    compared = speculated_equals_alone(target_of(name), seed=5)
    assert compared.tokens > 50
    assert not compared.flips
