"""Split equals whole: shards of every architecture against LocalEngine, bit by bit, through the engine's own words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from lab.engine.base import Engine, TargetStep
from lab.engine.kv import CacheFull
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.models import folder as folder_module
from lab.models.conversion import byte_tokenizer
from lab.models.layers import load_layers
from lab.models.sources import load_model
from split.chain.boundary import Boundary
from split.inference.messages import Pass
from split.inference.shard import FirstShard, PassInput
from split.inference.sharded_model import ShardFault
from split.inference.stage import InferenceStage
from split.transport.base import Message
from split.transport.inproc import InProcess
from tests.random_models import ARCHITECTURES
from tests.split.chains import SAMPLED, as_engine, inprocess, local, local_engine, saved_model, shards, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def _bits(step: TargetStep | None) -> tuple[object, ...]:
    """Everything in a step; NaN equal to NaN."""
    assert step is not None
    nll = [None if math.isnan(value) else value for value in step.nll]
    return step.next_ids, step.next_nll, step.margin, nll


def conversation(engine: Engine) -> list[object]:
    """Every word of an engine: prompts in chunks, ragged batches, want=all, rewinds, a text that ends and another."""
    said: list[object] = []
    texts = [
        engine.open(some_ids(length, seed=length), SAMPLED if length % 2 else Sampling.greedy())
        for length in (19, 1, 40)
    ]
    said += [_bits(text.step) for text in texts]
    for _ in range(6):
        requests = [(text, [text.step.next_ids[-1]]) for text in texts if text.step]
        said += [_bits(step) for step in engine.extend(requests, "last")]
    ragged = [(text, some_ids(count, seed=count)) for text, count in zip(texts, (3, 30, 1), strict=True)]
    said += [_bits(step) for step in engine.extend(ragged, "all")]
    for text in texts:
        text.position -= text.position // 3
    said += [_bits(step) for step in engine.extend([(texts[2], [5, 6]), (texts[0], [7])], "all")]
    texts[1].close()
    with engine.open([], SAMPLED) as fresh:
        said += [_bits(step) for step in engine.extend([(fresh, some_ids(9, 3)), (texts[2], [11])], "last")]
        said += [_bits(step) for step in engine.extend([(fresh, some_ids(12, 4))], "all")]
    texts[0].close()
    texts[2].close()
    return said


CUTS = [(0, 1, 4), (0, 3, 4), (0, 2, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4), (0, 4)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_split_is_whole_bit_by_bit(architecture: str, tied: bool, tmp_path: Path) -> None:
    settings = saved_model(architecture, tmp_path, tie_word_embeddings=tied)
    whole = conversation(local(settings))
    for cuts in CUTS if not tied else CUTS[:4]:
        assert conversation(inprocess(settings, cuts)) == whole, cuts


@pytest.mark.parametrize("prompt_tokens", [24, 25, 40])
def test_a_prompt_is_cut_alike(prompt_tokens: int, tmp_path: Path) -> None:
    """One that one pass holds gets the same bits from a whole model and from shards."""
    settings = saved_model("llama", tmp_path)
    found = []
    for engine in (local(settings), inprocess(settings, (0, 2, 4))):
        engine._chunk = 64
        with engine.open(some_ids(prompt_tokens, 3), Sampling.greedy()) as session:
            assert session.step is not None
            found.append(session.step.next_nll)
    assert found[0] == found[1]


def test_bfloat16_travels_as_bfloat16(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path, torch.bfloat16)
    byte_tokenizer().save_pretrained(tmp_path)
    # Loaded as shards are: a processor without instructions for 16 bits has products of its own for them.
    whole = local_engine(load_model(settings, torch.device("cpu")).model)
    assert conversation(inprocess(settings, (0, 2, 4), Boundary.bfloat16)) == conversation(whole)


def test_a_lossy_boundary_is_seen_by_the_same_comparison(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    whole = conversation(local(settings))
    assert conversation(inprocess(settings, (0, 2, 4), Boundary.bfloat16)) != whole
    assert conversation(inprocess(settings, (0, 2, 4), Boundary.int8)) != whole


def test_padding_that_moves_by_one_is_seen_by_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = saved_model("qwen2", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PassInput, "rows_of_pieces", lambda self: [slice(0, piece.count) for piece in self.pieces])
        broken = inprocess(settings, (0, 2, 4))
        try:
            said: Any = conversation(broken)
        except (ShardFault, ValueError) as fault:
            said = fault
    assert said != conversation(local(settings))
    assert conversation(inprocess(settings, (0, 2, 4))) == conversation(local(settings))


def test_layers_counted_from_the_whole_model_are_seen_by_the_same_comparison(tmp_path: Path) -> None:
    """Swapped middle shards: each runs, and the text is another."""
    settings = saved_model("llama", tmp_path)
    first, second, third, last = shards(settings, (0, 1, 2, 3, 4))
    swapped = as_engine(InProcess([InferenceStage(shard, Boundary.float32) for shard in (first, third, second, last)]))
    assert conversation(swapped) != conversation(local(settings))


def test_a_full_shard_refuses_and_the_others_go_on(tmp_path: Path) -> None:
    engine = inprocess(saved_model("llama", tmp_path), (0, 2, 4), sessions=2)
    texts = [engine.open(some_ids(5, seed), SAMPLED) for seed in (1, 2)]
    with pytest.raises(CacheFull, match="all 2 slots"):
        engine.open(some_ids(5, 3), SAMPLED)
    texts[0].close()
    with engine.open(some_ids(5, 3), SAMPLED) as third:
        engine.extend([(third, [1]), (texts[1], [2])], "last")


def test_a_text_that_does_not_fit_is_told_what_would(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    bytes_per_position = 2 * 2 * 8 * 4
    engine = inprocess(settings, (0, 1, 4), kv_limit_bytes=3 * bytes_per_position * 32)
    with pytest.raises(ShardFault, match="tokens must be at most the 32 that fit here, prompt included, got 33"):
        engine.open(some_ids(20, 1), Sampling.greedy(), 33)
    text = engine.open(some_ids(20, 1), Sampling.greedy(), 32)
    with pytest.raises(CacheFull, match="room for a sequence of 0 positions is left, got 1"):
        engine.open([], Sampling.greedy(), 1)
    engine.extend([(text, some_ids(12, 2))], "last")
    with pytest.raises(ValueError, match="at most the 32 tokens that were promised"):
        engine.extend([(text, [1])], "last")
    text.close()
    assert not any(any(stage.shard.cache.lengths) for stage in engine._transport._stages)  # type: ignore[attr-defined]
    engine.open([], Sampling.greedy(), 1).close()


def test_an_evicted_text_is_rebuilt_with_the_same_tokens(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    evicting = inprocess(settings, (0, 2, 4), sessions=1, idle_seconds=0.0)
    whole = local(settings)
    texts = [(engine.open(some_ids(9, 1), SAMPLED), engine.open(some_ids(12, 2), SAMPLED))
             for engine in (evicting, whole)]  # fmt: skip
    said = []
    for engine, pair in zip((evicting, whole), texts, strict=True):
        for _ in range(3):
            for text in pair:
                assert text.step is not None
                engine.extend([(text, text.step.next_ids[-1:])], "last")
        said.append([text.step.next_ids for text in pair if text.step])
    assert said[0] == said[1]
    assert not evicting.recoveries


class Evicting(InProcess):
    """Every text is evicted before each pass, as one client's is for another's when nothing may be idle."""

    evicts = False

    @override
    def send(self, shard: int, message: Message) -> None:
        if self.evicts and isinstance(message.head, Pass):
            for stage in self._stages:
                stage.forget()
        super().send(shard, message)


def test_a_text_that_is_evicted_again_while_it_is_rebuilt_stops_alone(tmp_path: Path) -> None:
    made = [InferenceStage(shard, Boundary.float32) for shard in shards(saved_model("llama", tmp_path), (0, 2, 4))]
    transport = Evicting(made)
    engine = as_engine(transport)
    text = engine.open(some_ids(9, 1), SAMPLED)
    said = text.step
    transport.evicts = True
    with pytest.raises(NotFinite, match="request 1 continues at 0, but 0 tokens are held in the shard of layers 0:2"):
        engine.extend([(text, [1])], "last")
    transport.evicts = False
    text.close()
    assert _bits(engine.open(some_ids(9, 1), SAMPLED).step) == _bits(said)


def test_a_shard_reads_no_tensors_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the reader: safetensors' own `get_tensor`."""

    settings = saved_model("llama", tmp_path, tie_word_embeddings=True)
    read: list[str] = []
    real = folder_module.safe_open

    class Counting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = real(*arguments, **options)

        def __enter__(self) -> Counting:
            self._tensors = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._tensors.keys())

        def get_slice(self, name: str) -> Any:
            return Noting(name, self._tensors.get_slice(name))

    class Noting:
        """A tensor that is not read yet."""

        def __init__(self, name: str, slice_: Any) -> None:
            self._name, self._slice = name, slice_

        def __getitem__(self, part: Any) -> torch.Tensor:
            read.append(self._name)
            tensor: torch.Tensor = self._slice[part]
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._slice, name)

    monkeypatch.setattr(folder_module, "safe_open", Counting)
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
        f"{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                      "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    ends = [{"model.embed_tokens.weight"}, set(), {"model.embed_tokens.weight", "model.norm.weight"}]
    for (first, last), end in zip(((0, 1), (1, 3), (3, 4)), ends, strict=True):
        read.clear()
        model = load_layers(settings, torch.device("cpu"), range(first, last), embedding=first == 0, head=last == 4)
        own = {f"model.layers.{index}.{name}" for index in range(first, last) for name in layer} | end
        assert sorted(read) == sorted(own)
        assert sum(tensor.numel() for tensor in model.parameters()) == sum(
            Counting(tmp_path / "model.safetensors", framework="pt").__enter__().get_slice(name)[:].numel()
            for name in own
        )


def test_the_middle_of_a_chain_takes_no_ids(tmp_path: Path) -> None:
    first, *rest = shards(saved_model("llama", tmp_path), (0, 1, 2, 4))
    assert isinstance(first, FirstShard)
    assert [shard.takes_ids for shard in rest] == [False, False]
    assert [shard.gives_steps for shard in rest] == [False, True]
