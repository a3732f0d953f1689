"""Proof that an architecture runs correctly, before it is used: a small random twin of the model goes through every
use, and must give the results of transformers. A use that differs is refused by name. Results are kept, by the twin's
config.

Three uses are proved separately. The engine: prompts in chunks, batched with other sequences, rewound, with our cache,
against one plain forward pass in float64. Slices: three of them read from a folder, against the whole, to the bit,
results and caches. Training: the gradients of the same slices, to the bit.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lab.command.ending import disk_full, signal_among
from lab.engine import base, context, kv, local
from lab.engine.base import Session
from lab.engine.context import longest_text
from lab.engine.kv import SlotCache, layer_shapes
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling, nll
from lab.files import path_of, write_whole
from lab.learning.training import keep_differentiable
from lab.models import packed, packed_folder, slices, structure, twin
from lab.models.folder import quietly
from lab.models.packed import IntLinear, linear_layers
from lab.models.packed_folder import pack_model
from lab.models.quantized import PACKED, WeightFormat
from lab.models.shape import ModelShape
from lab.models.slices import cut_of, read_slice, run_slice
from lab.models.structure import Structure, Unsliceable, find_structure
from lab.models.twin import VOCABULARY, NoTwin, twin_config, twin_model
from lab.settings import UserError

log = logging.getLogger(__name__)

OF_MACHINE = ("I/O error", "can't allocate memory", os.strerror(errno.ENOMEM))
"""Words of errors that are about a machine, not about an architecture."""
LONGEST = 64
"""Tokens of a sequence in a trial: more than a twin's windows, and than the length at which its rotary frequencies
change."""

SHORTEST = 8

LARGEST_ERROR = 1e-4
"""Largest error of a cross-entropy in nats, in float64: eager attention rounds its softmax to float32. A wrong mask
costs more."""


LARGEST_ROUNDING = 0.15
"""Largest difference of a token's logits with products in bfloat16 from those in float32, as a share of their norm:
random layers add up their rounding errors. Also of a matrix in 4 bits from what it was made of, where 0.08 is usual. A
wrong product, or a wrong matrix, costs all of the norm."""


class Use(Enum):
    """A use of a model."""

    engine = "a KV cache of several sequences"
    slices = "split inference"
    training = "split training"


@dataclass(frozen=True)
class Proof:
    """The outcome of the trial of one architecture."""

    model_type: str
    engine: str | None
    """The difference that was found; None if the engine is proved."""
    slices: str | None
    training: str | None
    structure: Structure | None
    """None for a model that cannot be cut."""

    def reason_against(self, use: Use) -> str | None:
        """The reason against a use; None if it is proved."""
        found: str | None = getattr(self, use.name)
        return found


class _Difference(ValueError):
    """Two computations that must agree differ."""


def require(config: PreTrainedConfig, use: Use, cache_dir: str, *, packed: WeightFormat | None = None) -> Proof:
    """The proof that an architecture is right for a use, from an earlier trial or a new one (seconds).

    Args:
        config: The model's.
        use: The intended use.
        cache_dir: Where proofs are kept (`model.cache_dir`).
        packed: Format of its quantised matrices, which is proved separately; None: not quantised.

    Raises:
        UserError: it is not proved; the message has the difference.
    """
    folder = path_of(cache_dir, "model.cache_dir") / "proofs"
    proof = prove(config, folder)
    against = proof.reason_against(use)
    if packed and not against:
        against = prove(config, folder, packed=packed).reason_against(use)
    if against:
        wanted = f"{use.value} in {packed.name}" if packed else use.value
        raise UserError(
            f"model must be of an architecture that is proved for {wanted}, got {proof.model_type}: {against}"
        )
    return proof


def prove(config: PreTrainedConfig, folder: Path, *, packed: WeightFormat | None = None) -> Proof:
    """The outcome of the trial of a config, read from `folder` if it is kept there.

    `packed`: try only its slices, with their matrices in this format.
    """
    attempt = partial(try_packed, stored=packed) if packed else try_out
    try:
        file = folder / f"{_digest(config)}{f'-{packed.name}' if packed else ''}.json"
    except Exception:  # a config of which no twin can be made, as the trial will say
        return attempt(config)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        found = known.pop("structure")
        return Proof(structure=Structure(**found) if found else None, **known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # not tried yet, by another version of this file, or no record at all
    what = f"{config.model_type}{f' in {packed.name}' if packed else ''}"
    log.info("trying %s in small, whole and in slices, against transformers (once, some seconds)", what)
    began = time.monotonic()
    try:
        proof = attempt(config)
    except (OSError, MemoryError) as error:
        raise _no_room(error) from None
    log.info("tried %s in %.1f s", what, time.monotonic() - began)
    try:
        write_whole(file, json.dumps(asdict(proof)), share=True)
    except OSError as error:
        log.warning("the outcome of the trial is not kept: %s", error)
    return proof


def _digest(config: PreTrainedConfig) -> str:
    """Digest of the twin's config and of everything else that a trial depends on."""
    modules = (base, context, kv, local, packed, packed_folder, slices, structure, twin)
    ours = "".join(map(inspect.getsource, modules))
    known = [twin_config(config).to_json_string(use_diff=False), transformers.__version__, torch.__version__, ours]
    known += [Path(__file__).read_text(encoding="utf-8"), platform.machine()]
    known.append(torch.backends.cpu.get_cpu_capability())  # a shared cache: the kernels of int8 and int4 differ
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:32]


def try_out(config: PreTrainedConfig) -> Proof:
    """Try a twin of the config in every use."""
    name = str(config.model_type)
    try:
        model = twin_model(config)
    except NoTwin as error:
        return Proof(name, str(error), str(error), str(error), None)
    with _one_thread(), quietly():
        found = Proof(name, _failure(lambda: _try_engine(twin_model(config).double())), None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outline = find_structure(model)
                made = _Trial(model, outline, Path(folder))
            except Exception as error:
                why = _against(error)
                return replace(found, slices=found.engine or why, training=why)
            against = found.engine or _failure(made.try_inference)
            return replace(found, slices=against, training=_failure(made.try_training), structure=outline)


def try_packed(config: PreTrainedConfig, *, stored: WeightFormat) -> Proof:
    """Try a twin with its matrices quantised, on the CPU: slices against the whole, and for int8 and int4 the whole
    against the same numbers in float."""
    with _one_thread(), quietly(), tempfile.TemporaryDirectory() as folder:
        try:
            trial = _packed_trial(config, stored, Path(folder))
        except Exception as error:
            found = _against(error)
            return Proof(str(config.model_type), found, found, found, None)
        whole = _failure(trial.try_packed_whole)
        slices = whole or _failure(trial.try_inference)
    return Proof(str(config.model_type), whole, slices, slices, None)


def _packed_trial(config: PreTrainedConfig, stored: WeightFormat, folder: Path) -> _Trial:
    model = twin_model(config)
    outline = find_structure(model)
    if stored in PACKED:
        return _Trial(model, outline, folder, bits=8 if stored is WeightFormat.int8 else 4)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    device_map = {"": torch.device("cpu")}
    return _Trial(model, outline, folder, quantization_config=quantization, device_map=device_map)


def _failure(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except Exception as error:
        return _against(error)
    return None


def _against(error: Exception) -> str:
    """What an error says against an architecture: it fails in its own way, whatever that is. UserError for one of this
    machine, now: it says nothing of the architecture."""
    if (stopped := signal_among(error)) is not None:
        raise stopped
    log.debug("a trial failed", exc_info=error)
    # safetensors' and torch's own errors of that kind have no type of their own
    has_words = any(words in str(error) for words in OF_MACHINE)
    if has_words or disk_full(error) or isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        raise _no_room(error) from None
    return _in_one_line(error)


def _no_room(error: Exception) -> UserError:
    return UserError(f"model.cache_dir and TMPDIR must have room for a trial of the model, got {_in_one_line(error)}")


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:240]
    return (
        text
        if isinstance(error, (_Difference, Unsliceable, NoTwin, kv.UnknownState))
        else f"{type(error).__name__}: {text}"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on several, rounding can depend on the place of a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()


def _longest(config: PreTrainedConfig) -> int:
    """Tokens of the sequences of a trial."""
    most = min(longest_text(config) or LONGEST, LONGEST)
    if most < SHORTEST:
        raise NoTwin(f"it is for texts of at most {most} tokens, a trial needs {SHORTEST}")
    return most


# The engine

_SETTING = "with a cache, in chunks and batched with others"


def _check_state(config: PreTrainedConfig) -> None:
    """Refuse by name a model for which transformers keeps other state than keys and values."""
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__.removesuffix("Layer")
            raise kv.UnknownState(f"its layer {number} keeps a state other than keys and values ({kind})")


@torch.inference_mode()
def _check_own_cache(model: Any) -> None:
    """Refuse a model for which transformers' own results with its cache, token by token, differ from those of one
    pass."""
    count = min(24, _longest(model.config))
    text = _ids(count, seed=9)
    cache, plain_TV = (
        DynamicCache(config=model.config),
        model(input_ids=torch.tensor([text]), use_cache=False).logits[0],
    )
    for first, last in itertools.pairwise([0, *range(count * 2 // 3, count + 1)]):
        part = torch.tensor([text[first:last]])
        cached_TV = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
        wrong = float((cached_TV[-1] - plain_TV[last - 1]).abs().max())
        if not wrong <= 10 * LARGEST_ERROR:
            raise _Difference(f"transformers' own logits with its cache are off by {wrong:.2g} from those without")


def _try_engine(model: PreTrainedModel) -> None:
    """Run three sequences of different lengths in chunks, together and alone, rewound; one leaves, another takes its
    slot."""
    _check_state(model.config)
    any_model: Any = model
    any_model.set_experts_implementation("eager")  # the grouped product has no float64
    _check_own_cache(model)
    most = _longest(model.config)
    local = LocalEngine(
        model, sessions=3, context=most, bucket=8, kv_limit_bytes=10**9, prefill_chunk=5, exact_rows=None
    )
    news = (1, max(1, most // 9), max(1, most // 20))
    texts = [_ids(length, seed) for seed, length in enumerate((max(1, most // 20), most // 2, most * 2 // 3))]
    sessions = [local.open([], Sampling.greedy()) for _ in texts]
    first = local.extend([(session, text) for session, text in zip(sessions, texts, strict=True)], "last")
    for text, step in zip(texts, first, strict=True):
        _compare_with_plain(model, text, 1, step.next_ids, [])
    for turn in range(4):
        if turn == 1:  # a slot that held a longer text
            sessions[2].close()
            sessions[2], texts[2] = local.open([], Sampling.greedy()), []
        if turn == 2:
            sessions[1].position = most // 3
            del texts[1][sessions[1].position :]
        requests: list[tuple[Session, list[int]]] = []
        for number, session in enumerate(sessions):
            if (turn + number) % 3 or turn == 0:
                new = _ids(news[(turn + number) % 3], 10 * turn + number)
                texts[number] += new
                requests.append((session, new))
        for (session, new), step in zip(requests, local.extend(requests, "all"), strict=True):
            text = texts[sessions.index(session)]
            _compare_with_plain(model, text, len(new), step.next_ids, step.nll)
    local.shutdown()


@torch.inference_mode()
def _compare_with_plain(
    model: Any, text: Sequence[int], new: int, next_ids: Sequence[int], known_nll: Sequence[float]
) -> None:
    logits_TV = model(input_ids=torch.tensor([text]), use_cache=False).logits[0].double()
    expected = [math.nan, *nll(logits_TV[:-1], list(text[1:]))][-new:]
    errors = [abs(said - right) for said, right in zip(known_nll, expected) if not math.isnan(said + right)]
    wrong = max(errors, default=0.0)
    if not wrong <= LARGEST_ERROR:
        raise _Difference(f"{_SETTING}, a token's cross-entropy is off by {wrong:.2g} nats")
    best_T = logits_TV[-new:].argmax(-1).tolist()
    leads_T2 = logits_TV[-new:].topk(2).values
    for said, best, lead in zip(next_ids, best_T, (leads_T2[:, 0] - leads_T2[:, 1]).tolist(), strict=True):
        if said != best and lead > LARGEST_ERROR:
            raise _Difference(f"{_SETTING}, the next token is {said} instead of {best}")


# Slices


class _Trial:
    """A twin in a folder, whole and in three slices read from there."""

    def __init__(
        self, model: PreTrainedModel, outline: Structure, folder: Path, bits: int | None = None, **placement: Any
    ) -> None:
        if bits is None:
            model.save_pretrained(folder)
        else:
            pack_model(model, outline, folder, bits, torch.float32)
        self._model, self._placement = model, {"dtype": torch.float32, **placement}
        self._folder, self._outline = folder, outline
        self._config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._count = ModelShape.of(self._config).layers
        self._most = _longest(self._config)

    def whole(self) -> PreTrainedModel:
        """The whole model, as transformers reads it."""
        found = AutoModelForCausalLM.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=False, **self._placement
        )
        return cast(PreTrainedModel, found.eval())

    def slices(self) -> list[PreTrainedModel]:
        """The first layer, the middle, the last one; two layers are two slices."""
        cuts = sorted({0, 1, self._count - 1, self._count})
        with ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for file in sorted(self._folder.glob("*.safetensors")):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return [
                read_slice(
                    self._config, tensors, self._outline, range(first, last),
                    embedding=first == 0, head=last == self._count, **self._placement,
                )
                for first, last in itertools.pairwise(cuts)
            ]  # fmt: skip

    @torch.inference_mode()
    def try_packed_whole(self) -> None:
        """Check that matrices are packed, that our packed weights are those of the model up to their rounding and all
        others to the bit, and that the logits of our packed layers are those of the same numbers in float, up to the
        rounding of bfloat16 products."""
        whole: Any = self.whole()
        if not any(weight.dtype is torch.uint8 for weight in whole.parameters()):
            raise _Difference("none of its matrices is packed")
        if not any(isinstance(part, IntLinear) for part in whole.modules()):
            return
        # Short texts: rounding may send a token to another expert, which all tokens behind it would see.
        ids_BT = torch.tensor([_ids(4, seed) for seed in range(8)])
        logits_TV = whole(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
        for name, part in list(whole.named_modules()):
            if isinstance(part, IntLinear):
                whole.set_submodule(name, part.in_float())
        self._check_weights(whole)
        exact_TV = whole(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
        wrong = float(((logits_TV - exact_TV).norm(dim=1) / exact_TV.norm(dim=1)).median())
        if not wrong <= LARGEST_ROUNDING:
            raise _Difference(f"its logits are off by {wrong:.1%} from those of the same numbers in float")

    def _check_weights(self, unpacked: PreTrainedModel) -> None:
        """`unpacked`: the packed model with its packed layers in float."""
        packed, found = linear_layers(self._model), unpacked.state_dict()
        for name, weight in self._model.state_dict().items():
            layer = packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is None:
                _check_same(found[name], weight, f"{name} of the packed model is not that of the model")
                continue
            wanted_NK = weight.t() if isinstance(layer, Conv1D) else weight
            wrong = float((found[name] - wanted_NK).norm() / wanted_NK.norm())
            if not wrong <= LARGEST_ROUNDING:
                raise _Difference(f"its packed {name} is off by {wrong:.1%}")

    @torch.inference_mode()
    def try_inference(self) -> None:
        """Check in three passes over two sequences that logits and caches of the slices are those of the whole."""
        whole: Any = self.whole()
        slices = self.slices()
        for model in (whole, *slices):
            # What counts is which matrices are packed, and how; bitsandbytes' kernels for a CPU want wider ones.
            keep_differentiable(model)
        uncut = _CachedModel(whole, run=lambda states, **options: whole(input_ids=states, **options).logits)
        parts = [_CachedModel(part, run=partial(run_slice, part)) for part in slices]
        for slots, counts in (([0], [self._most // 6]), ([0, 1], [1, self._most // 2]), ([0, 1], [1, 1])):
            texts = [_ids(count, 7 * slot + count) for slot, count in zip(slots, counts, strict=True)]
            width = max(counts)
            ids_BT = torch.tensor([text + [1] * (width - len(text)) for text in texts])
            expected, states = uncut.forward(ids_BT, slots, counts), ids_BT
            for part in parts:
                states = part.forward(states, slots, counts)
            _check_same(states, expected, "logits of slices are not those of the whole model")
        held = {name: stored for part in parts for name, stored in part.cached_states().items()}
        for name, stored in uncut.cached_states().items():
            if name not in held:
                raise _Difference(f"{name} of the cache is held by no slice")
            _check_same(held[name], stored, f"{name} of the cache of a slice is not that of the whole model")

    def try_training(self) -> None:
        """Check with two sequences, one of them padded, that gradients of the slices are those of the whole, to the
        bit."""
        if dropping := _layer_drop_key(self._config):
            raise _Difference(f"{dropping} drops whole layers at random, and with them the input of a slice")
        whole: Any = self.whole()
        width = min(20, self._most)
        ids_BT = torch.tensor([_ids(width, 1), _ids(width, 2)])
        attention_BT = (torch.arange(width)[None] < torch.tensor([[width], [width * 2 // 3]])).long()
        options: dict[str, Any] = {"attention_mask": attention_BT, "use_cache": False}
        logits_BTV = whole(input_ids=ids_BT, **options).logits
        pull_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(3))
        logits_BTV.backward(pull_BTV)
        expected = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
        parts, states, links = self.slices(), ids_BT, []
        for part in parts:
            for name, weight in part.named_parameters():
                weight.requires_grad_(cut_of(part).owns(name))
            leaf = states if cut_of(part).layers.start == 0 else states.detach().requires_grad_()
            states = run_slice(part, leaf, **options)
            links.append((leaf, states))
        _check_same(states, logits_BTV, "logits of slices that learn are not those of the whole model")
        gradient = pull_BTV
        for leaf, states in reversed(links):
            states.backward(gradient)
            if leaf.grad is not None:
                gradient = leaf.grad
        self._compare_gradients(parts, expected, is_tied=cut_of(parts[0]).is_tied)

    def _compare_gradients(
        self, parts: Sequence[PreTrainedModel], expected: Mapping[str, Tensor], *, is_tied: bool
    ) -> None:
        outline = self._outline
        found: dict[str, Tensor] = {}
        for part in parts:
            for name, weight in part.named_parameters():
                if outline.layer_of(name) is not None and not cut_of(part).owns(name):
                    raise _Difference(f"a slice holds {name}, which is not its own")
                if weight.grad is not None:
                    same = f"{outline.embedding}.weight" if is_tied and name == f"{outline.head}.weight" else name
                    found[same] = found[same] + weight.grad if same in found else weight.grad
        if missing := sorted(expected.keys() ^ found.keys()):
            raise _Difference(f"the gradient of {missing[0]} is there in one of slices and whole model only")
        for name, gradient in expected.items():
            if name == f"{outline.embedding}.weight" and is_tied:
                if not torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5):
                    raise _Difference(f"the gradient of the tied {name} is not the whole model's")
            else:
                _check_same(found[name], gradient, f"the gradient of {name} is not that of the whole model")


def _layer_drop_key(config: PreTrainedConfig) -> str | None:
    """The key of the config by which layers are left out at random in training, if there is one."""
    parts = (config, config.get_text_config(decoder=True))
    return next(
        (f"{name}={getattr(part, name)}" for part in parts for name in _DROPPING if getattr(part, name, 0)), None
    )


_DROPPING = ("layerdrop", "decoder_layerdrop")


class _CachedModel:
    """A model or slice with a cache of its own layers."""

    def __init__(self, model: PreTrainedModel, run: Callable[..., Tensor]) -> None:
        self._run = run
        is_later = hasattr(model, "cut") and cut_of(model).layers.start > 0
        hidden = ModelShape.of(model.config).hidden_size
        one = torch.zeros(1, 1, hidden) if is_later else torch.ones(1, 1, dtype=torch.long)
        at = torch.zeros(1, 1, dtype=torch.long)
        shapes = layer_shapes(lambda cache: run(one, position_ids=at, past_key_values=cache, use_cache=True))
        self._cache = SlotCache(
            shapes, slots=2, bucket=8, limit_bytes=10**9, dtype=torch.float32, device=torch.device("cpu"), exact=None
        )
        self._slots = [self._cache.acquire(LONGEST), self._cache.acquire(LONGEST)]

    def forward(self, states: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """One pass; rows in the order of slots."""
        plan = self._cache.begin(slots, counts)
        leaving = self._run(states, position_ids=plan.position_ids_BT, past_key_values=self._cache, use_cache=True)
        self._cache.commit()
        return leaving

    def cached_states(self) -> dict[str, Tensor]:
        """Keys and values, by the name of their layer."""
        return self._cache.tensors()


def _check_same(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape or not torch.equal(found, expected):
        wrong = (
            f" by {float((found - expected).detach().abs().max()):.2g}"
            if found.shape == expected.shape
            else " in shape"
        )
        raise _Difference(f"{what}, but off{wrong}")
