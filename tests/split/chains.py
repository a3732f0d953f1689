"""Small models on disk and chains of their shards, for the tests of split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lab.device import TORCH_DTYPES
from lab.engine.compiled import Compiler
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.layers import load_layers
from lab.settings import ArchitectureSettings, Dtype, ModelSettings, ModelSource, Quantization
from split.chain.boundary import Boundary
from split.inference.shard import Shard, ShardLimits, shard_class
from split.inference.sharded_model import ShardedModel
from split.inference.stage import InferenceStage
from split.transport.inproc import InProcess
from tests.random_models import random_model

VOCABULARY = 264
CONTEXT, BUCKET, KV_BYTES, CHUNK, SESSIONS = 200, 16, 10**8, 7, 4
SAMPLED = Sampling(seed=21, temperature=0.8, top_k=40, top_p=0.95)

LIMITS = ShardLimits(sessions=SESSIONS, context=CONTEXT, bucket=BUCKET, kv_limit_bytes=KV_BYTES, idle_seconds=1000.0)


def saved_model(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> ModelSettings:
    """A model of `random_models` in a folder, and the settings that load it."""
    model = random_model(architecture, dtype, **overrides)
    model.save_pretrained(folder)
    sizes = ArchitectureSettings(
        family=architecture, layers=4, hidden_size=32, intermediate_size=64, heads=4, kv_heads=2, head_dim=8,
        vocabulary=VOCABULARY, tied_embeddings=False, context=256,
    )  # fmt: skip
    return ModelSettings(
        name=architecture, source=ModelSource.path, repo=None, revision=None, path=str(folder), package=None,
        wheel=None, seed=0,
        dtype=Dtype[str(dtype).removeprefix("torch.")], quantization=Quantization.none, adapter=None,
        cache_dir=str(folder), lora_targets=["q_proj"], architecture=sizes,
    )  # fmt: skip


def shards(
    settings: ModelSettings, cuts: Sequence[int], limits: ShardLimits = LIMITS, compiler: Compiler | None = None
) -> list[Shard]:
    """Shards of layers [cuts[0], cuts[1]), [cuts[1], cuts[2]), ..."""
    made = []
    for first, last in itertools.pairwise(cuts):
        begins, ends = first == 0, last == cuts[-1]
        model = load_layers(settings, torch.device("cpu"), range(first, last), embedding=begins, head=ends)
        if settings.name == "gemma2":
            model.config._attn_implementation = "eager"
        made.append(shard_class(begins, ends)(model, range(first, last), limits, compiler=compiler))
    return made


def inprocess(
    settings: ModelSettings, cuts: Sequence[int], boundary: Boundary = Boundary.float32, **limits: Any
) -> ShardedModel:
    """A chain in this process, as an engine."""
    stages = [InferenceStage(shard, boundary) for shard in shards(settings, cuts, replace(LIMITS, **limits))]
    return as_engine(InProcess(stages))


def as_engine(transport: Any, recovery_seconds: float = 0.0) -> ShardedModel:
    return ShardedModel(
        transport,
        vocabulary_size=VOCABULARY,
        context=CONTEXT,
        prefill_chunk=CHUNK,
        recovery_seconds=recovery_seconds,
    )


def local(settings: ModelSettings) -> LocalEngine:
    """The whole model, read from the same file (the rounding of some kernels depends on where a tensor lies)."""
    model = AutoModelForCausalLM.from_pretrained(
        settings.path,
        dtype=TORCH_DTYPES[settings.dtype],
        attn_implementation="eager" if settings.name == "gemma2" else "sdpa",
    )
    return local_engine(model)


def local_engine(model: torch.nn.Module, compiler: Compiler | None = None) -> LocalEngine:
    """The same for a model at hand."""
    return LocalEngine(
        model,
        sessions=SESSIONS,
        context=CONTEXT,
        bucket=BUCKET,
        kv_limit_bytes=KV_BYTES,
        prefill_chunk=CHUNK,
        exact_rows=None,
        compiler=compiler,
    )


def some_ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(count)]
