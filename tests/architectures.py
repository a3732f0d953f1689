"""What is proved of each causal architecture of the installed transformers: `python -m tests.architectures` writes the
table of docs/architectures.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lab.engine.context import longest_text
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.folder import ModelFolder
from lab.models.proof import Proof, prove, try_out, try_packed
from lab.models.quantized import WeightFormat
from lab.models.shape import ModelShape
from lab.models.slices import read_slice, run_slice
from lab.models.twin import VOCABULARY, twin_model
from split.chain.boundary import Boundary
from split.inference.shard import ShardLimits, shard_class
from split.inference.sharded_model import ShardedModel
from split.inference.stage import InferenceStage
from split.transport.inproc import InProcess

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

NAMED = (
    "llama mistral qwen2 qwen3 gemma2 gemma3 smollm3 phi phi3 granite gptj mixtral qwen2_moe qwen3_moe olmoe "
    "granitemoe deepseek_v2 deepseek_v3 gpt_oss glm4_moe gpt2 gpt_neox opt falcon bloom"
).split()
"""Families that people ask for by name: all of them must be proved."""
STATEFUL = (
    "mamba mamba2 falcon_mamba rwkv jamba bamba zamba2 recurrent_gemma qwen3_next falcon_h1 nemotron_h lfm2".split()
)
"""Architectures with recurrent state, not only keys and values: all of them must be refused."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 128, "layer_types": ["sliding_attention", "full_attention"] * 16},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
"""Values of a config class whose own are not those of any model, or of none."""


@dataclass(frozen=True)
class Row:
    """One architecture; None where it is proved, else the reason against it."""

    name: str
    engine: str | None
    slices: str | None
    training: str | None
    nf4: str | None
    int8: str | None
    int4: str | None
    lora: str | None
    text: str | None = None
    """What is wrong with its texts though it is proved; None for nothing."""


def config_of(name: str) -> PreTrainedConfig:
    """A config of an architecture, as its class has it."""
    return AutoConfig.for_model(name, **OVERRIDES.get(name, {}))


def target_of(name: str) -> Any:
    """A twin of an architecture in float64, where rounding makes no other text."""
    model: Any = twin_model(config_of(name)).double()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def row_of(name: str) -> Row:
    """Everything that is said of an architecture, tried."""
    try:
        proof = try_out(config_of(name))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Row(name, *[reason] * len(USES))
    packed = (WeightFormat.nf4, WeightFormat.int8, WeightFormat.int4)
    others = dict.fromkeys([*(stored.name for stored in packed), "lora"], proof.slices)
    if proof.slices is not None:
        return Row(name, proof.engine, proof.slices, proof.training, **others)
    return Row(
        name,
        proof.engine,
        proof.slices,
        proof.training,
        **{stored.name: try_packed(config_of(name), stored=stored).slices for stored in packed},
        lora=_reason(lambda: _try_lora(name, proof)),
        text=_reason(lambda: _try_text(name, proof)),
    )


def _reason(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


IDS = torch.arange(1, 25)[None]


def _chain(
    config: PreTrainedConfig, folder: Path, proof: Proof, cuts: Sequence[int] = (), **placement: Any
) -> list[Any]:
    assert proof.structure is not None
    count = ModelShape.of(config).layers
    stored = ModelFolder(folder)
    with stored.lazy(stored.files) as tensors:
        return [
            read_slice(
                config,
                tensors,
                proof.structure,
                range(first, last),
                embedding=first == 0,
                head=last == count,
                **placement,
            )
            for first, last in itertools.pairwise(cuts or (0, 1, count))
        ]


@torch.inference_mode()
def _compare(whole: Any, chain: Sequence[Any]) -> None:
    expected = whole(input_ids=IDS, use_cache=False).logits
    states: torch.Tensor = IDS
    for part in chain:
        states = run_slice(part, states, use_cache=False)
    if not torch.equal(states, expected):
        raise ValueError(f"slices are off by {float((states - expected).abs().max()):.2g}")


def _try_lora(name: str, proof: Proof) -> None:
    from peft import LoraConfig, get_peft_model

    from lab.models.adapter import fit_adapter, inject_adapter, put_adapter, quiet_peft, read_adapter

    with tempfile.TemporaryDirectory() as place:
        base, folder = Path(place) / "base", Path(place) / "adapter"
        twin_model(config_of(name)).save_pretrained(base)
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        with quiet_peft():
            whole = get_peft_model(model.eval(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            with torch.no_grad():
                for weight_name, weight in whole.named_parameters():
                    if "lora_B" in weight_name:
                        weight.normal_(std=0.1)
            whole.save_pretrained(folder)
        chain = _chain(config, base, proof, dtype=torch.float32)
        adapter = read_adapter(folder)
        fit = fit_adapter(adapter, config)
        for part in chain:
            inject_adapter(part, fit, trainable=False)
            put_adapter(part, adapter, fit)
            part.eval()
        _compare(whole.eval(), chain)


def _try_text(name: str, proof: Proof) -> None:
    """Greedy text is that of `generate`; sampled text is the same whole and split; two at once are each as alone."""
    with tempfile.TemporaryDirectory() as folder:
        twin_model(config_of(name)).save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        model = model.eval()
        count, most = ModelShape.of(config).layers, min(longest_text(config) or 60, 60)
        prompts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in (most - 24, 5)]
        given = torch.tensor([prompts[0]])
        greedy = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=20, min_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(prompts[0]) :].tolist()  # fmt: skip
        limits = ShardLimits(sessions=2, context=most, bucket=16, kv_limit_bytes=10**9, idle_seconds=1000.0)
        options: dict[str, Any] = {"context": most, "bucket": 16, "kv_limit_bytes": 10**9, "exact_rows": None}
        engines: list[Any] = [LocalEngine(model, sessions=2, prefill_chunk=chunk, **options) for chunk in (16, 128)]
        for cuts, chunk in ((sorted({0, 1, count}), 16), (sorted({0, 1, count - 1, count}), 128)):
            stages = [
                InferenceStage(
                    shard_class(part.cut.embedding, part.cut.head)(part, part.cut.layers, limits), Boundary.float32
                )
                for part in _chain(config, Path(folder), proof, cuts=cuts, dtype=torch.float32)
            ]
            engines.append(
                ShardedModel(
                    InProcess(stages), vocabulary_size=VOCABULARY, context=most, prefill_chunk=chunk, recovery_seconds=0
                )
            )
        said = [_written(engine, prompts) for engine in engines]
        if said[0][0] != greedy:
            raise ValueError(f"the engine says {said[0][0]} greedily, transformers {greedy}")
        for texts in said[1:]:
            if texts != said[0]:
                raise ValueError(f"texts are {texts} instead of {said[0]}")


def _written(engine: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """A greedy text alone, then a sampled one alone and beside another; the last two must be the same."""
    sampled = Sampling(seed=3, temperature=0.9, top_k=20, top_p=0.95)
    [greedy] = _together(engine, [prompts[0]], Sampling.greedy())
    [alone] = _together(engine, [prompts[0]], sampled)
    beside = _together(engine, prompts, sampled)
    if beside[0] != alone:
        raise ValueError(f"beside another text it is {beside[0]} instead of {alone}")
    return [greedy, alone, beside[1]]


def _together(engine: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    sessions = [engine.open(prompt, sampling) for prompt in prompts]
    texts = [list(session.step.next_ids[-1:]) for session in sessions]
    for _ in range(19):
        requests = [(session, [text[-1]]) for session, text in zip(sessions, texts, strict=True)]
        for text, step in zip(texts, engine.extend(requests, "last"), strict=True):
            text.append(step.next_ids[-1])
    for session in sessions:
        session.close()
    return texts


# The table

USES = ("engine", "slices", "training", "nf4", "int8", "int4", "lora")
_HEAD = """# Which architectures are proved

For every architecture with a causal language model in transformers {version}: whether a small random model of it gave
the same results as transformers. `yes` means proved. `no` means refused by name; the reasons are below the table. When
a model is loaded, the same trial runs with that model's own config. So a model with unusual settings may be refused in
spite of a `yes`, or accepted in spite of a `no`.

- **engine**: a whole model with our KV cache: in chunks, batched with other sequences, rewound. Needed by `lab.decode`,
  the verifier, drafters with a model.
- **split inference**: three slices read from a folder: equal to the bit, keys and values in the caches too.
- **split training**: the gradients of the slices: equal to the bit (a tied embedding: within 1e-4, since its copies are
  summed).
- **nf4**, **int8**, **int4**, **LoRA**: slices in so many bits, and slices with an adapter on every linear layer: equal
  to the whole, to the bit. And in int8 and int4 the weights are the model's, but for their rounding, and the whole's
  logits are those of the same numbers in float32, but for what products in bfloat16 round.

Proved for split inference: {proved} of {count}. Written by `python -m tests.architectures`.

| architecture | engine | split inference | split training | nf4 | int8 | int4 | LoRA |
|---|---|---|---|---|---|---|---|
"""


def table(rows: Sequence[Row]) -> str:
    """The page."""
    proved = sum(row.slices is None for row in rows)
    lines = [_HEAD.format(version=transformers.__version__, proved=proved, count=len(rows))]
    lines += [
        f"| {row.name} | " + " | ".join("no" if getattr(row, use) else "yes" for use in USES) + " |\n" for row in rows
    ]
    lines.append("\n## Why not\n\n")
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for use in USES:
            if reason := getattr(row, use):
                reasons.setdefault(reason, []).append(use)
        said = "; ".join(f"{', '.join(uses)}: {reason}" for reason, uses in reasons.items())
        if said:
            said = re.sub(r"'/[^']*'", "its folder", said).replace("|", "/").replace("<", "&lt;")
            lines.append(f"- **{row.name}**: {said}\n")
    return "".join(lines)


def counts_of(rows: Sequence[Row]) -> dict[str, Any]:
    """How many are proved, refused by name, and wrong though they are proved."""
    wrong = {row.name: row.text for row in rows if row.text}
    return {
        "part": "architectures",
        "tried": len(rows),
        "proved": sum(row.slices is None for row in rows),
        "refused": sum(row.slices is not None for row in rows),
        "wrong": len(wrong),
        "wrong_ones": wrong,
        "target": "wrong at most 0",
        "holds": not wrong,
    }


def trial_seconds(name: str) -> dict[str, Any]:
    """What a trial costs at load: of a family that is new, and of one that was seen before."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name)
        began = time.perf_counter()
        prove(config, Path(folder))
        new_seconds = time.perf_counter() - began
        known = []
        for _ in range(21):
            began = time.perf_counter()
            prove(config, Path(folder))
            known.append(time.perf_counter() - began)
    return {
        "part": "trial",
        "name": name,
        "new_seconds": new_seconds,
        "known_seconds": statistics.median(known),
        "target": "new at most 5 s, known at most 0.02 s",
        "holds": new_seconds <= 5 and statistics.median(known) <= 0.02,
    }


def main() -> None:
    """Try all, write the page, and print the figures as one line of JSON, as benchmarks do."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in NAMES:
        rows.append(row_of(name))
        print(rows[-1], file=sys.stderr, flush=True)
    TABLE.write_text(table(rows), encoding="utf-8")
    trials = [trial_seconds(name) for name in ("llama", "gemma3", "deepseek_v3", "gpt2")]
    print(json.dumps({"rows": [counts_of(rows), *trials]}))


if __name__ == "__main__":
    main()
