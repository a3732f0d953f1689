"""Compiled layers: what transformers computes, row by row, to the same bits in every company."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.modeling_utils import PreTrainedModel

from lab.engine import compiled
from lab.engine.base import Session, TargetStep
from lab.engine.compiled import COMPILERS, Compiler, NotCompiled
from lab.engine.graphs import Graphs
from lab.engine.local import LocalEngine
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling, nll
from lab.engine.wide_products import widen_products
from lab.models.packed_folder import pack_model
from lab.models.slices import read_slice
from lab.models.structure import find_structure
from lab.settings import UserError
from split.inference.messages import Piece
from split.inference.shard import FirstShard, LastShard, OnlyShard, PassInput, ShardLimits
from tests import reuse
from tests.lab.engine.test_graphs import Recorder
from tests.random_models import random_model

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CACHE: dict[str, Any] = {"context": 200, "bucket": 32, "kv_limit_bytes": 10**8, "prefill_chunk": 64, "exact_rows": None}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled layers of all tests: those of other workers are here, too."""
    return tmp_path_factory.getbasetemp().parent / "compiled"


@pytest.fixture(autouse=True)
def _awkward_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's inductor puts paths into command lines without quotes. Nothing is left in these folders."""
    temporary, of_torch = (tmp_path_factory.mktemp(f'José\'s "{name}" folder') for name in ("temporary", "torch"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(of_torch))
    yield
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(of_torch)
    assert [*temporary.iterdir(), *of_torch.iterdir()] == []


def _model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    config = CONFIG_MAPPING[family](**SIZES | SPECIAL | changes)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for weight in made.parameters():  # every weight matters
        noise = torch.randn_like(weight)
        weight.data = weight.data + 0.2 * noise if weight.dim() == 1 else noise * weight.shape[1] ** -0.5
    return made.requires_grad_(False)  # type: ignore[no-any-return]


def _packed(model: PreTrainedModel, place: Path, bits: int = 4) -> PreTrainedModel:
    place.mkdir(exist_ok=True)
    pack_model(model, find_structure(model), place, bits, torch.bfloat16)
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, local_files_only=True)
    return read.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _engine(model: PreTrainedModel, folder: Path, sessions: int = 4) -> LocalEngine:
    engine = LocalEngine(model, sessions=sessions, compiler=Compiler(True, False, True, folder), **CACHE)
    assert engine.is_compiled
    return engine


def _ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 99) for _ in range(count)]


AS_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 512,
}
"""Sizes whose float32 products round alike in MKL for up to 15 rows; those of smaller matrices do not."""


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen2": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 20,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(family: str, folder: Path) -> None:
    """In chunks, rewound, beside neighbours: cross-entropies of plain forward passes, in float32."""
    model: Any = _model(family, **FAMILIES[family])
    engine = _engine(model, folder)
    texts = [_ids(90, 0), _ids(70, 1)]
    with engine.open([], Sampling.greedy()) as one, engine.open([], Sampling.greedy()) as two:
        engine.extend([(one, texts[0][:7])], "all")
        engine.extend([(one, _ids(5, 7)), (two, texts[1][:17])], "all")
        one.position = 7
        found: list[list[float]] = [[], []]
        while one.position < 90 or two.position < 70:
            requests = [
                (session, text[session.position : session.position + step])
                for session, text, step in ((one, texts[0], 11), (two, texts[1], 3))
                if session.position < len(text)
            ]
            for (session, _), step in zip(requests, engine.extend(requests, "all"), strict=True):
                found[session is two] += step.nll
    for text, ours in zip(texts, found, strict=True):
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        exact = nll(logits_TV[:-1], text[1:])[-len(ours) :]
        wrong = [abs(one - other) for one, other in zip(ours, exact, strict=True) if one == one]
        assert len(wrong) > 30
        assert max(exact) - min(exact) > 1, "it says nothing"
        assert max(wrong) < 1e-3


TOLD = replace(Sampling.greedy(), top_tokens=3)


def _greedy(engine: LocalEngine, prompt: Sequence[int], count: int) -> list[TargetStep]:
    with engine.open(prompt, TOLD) as text:
        assert text.step is not None
        steps = [text.step]
        while len(steps) < count:
            steps += engine.extend([(text, steps[-1].next_ids[-1:])], "last")
    return steps


@pytest.mark.parametrize("weights", [4, 8, torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_in_every_company(weights: int | torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Alone, among three others, and as one of up to 16 draft tokens: cross-entropies are equal to the last bit."""
    if isinstance(weights, int):
        engine = _engine(_packed(_model("qwen3"), tmp_path / "m", weights), folder)
        assert engine.row_invariant
    else:
        engine = _engine(_model("qwen3", weights, **AS_SMOLLM2), folder)
        if not engine.row_invariant:
            pytest.skip(f"products in {weights} depend on their number of rows on this processor")
    prompts = [_ids(count, count) for count in (3, 40, 30, 9)]
    alone = [_greedy(engine, prompt, 60) for prompt in prompts]
    sessions = [engine.open(prompt, TOLD) for prompt in prompts]
    draw, place = random.Random(0), [0] * len(prompts)
    while min(place) < 40:
        requests: list[tuple[Session, list[int]]] = []
        for number, session in enumerate(sessions):
            guesses = [step.next_ids[-1] for step in alone[number]][place[number] : place[number] + draw.randint(1, 17)]
            if draw.random() < 0.3:
                guesses[-1] = (guesses[-1] + 1) % 99  # a wrong one is checked, and forgotten
            requests.append((session, guesses))
        chosen = draw.sample(requests, draw.randint(1, 4))
        for (session, guesses), step in zip(chosen, engine.extend(chosen, "all"), strict=True):
            number = sessions.index(session)
            known = alone[number][place[number] : place[number] + len(guesses) + 1]
            right = next((at for at, guess in enumerate(guesses) if guess != known[at].next_ids[-1]), len(guesses))
            for at in range(right):
                if place[number] + at + 1 < 60:
                    assert step.next_nll[at] == known[at + 1].next_nll[-1]
                    assert step.top[at] == known[at + 1].top[-1]
                    assert len(step.top[at]) == 3
                    assert step.next_ids[at] == known[at + 1].next_ids[-1]
            session.position -= len(guesses) - right
            place[number] += right
            if place[number] > 42:
                session.position -= place[number] - 42
                place[number] = 42
    for session in sessions:
        session.close()


@pytest.mark.parametrize("among_others", [False, True])
def test_a_text_that_goes_on_from_another_ones_session_has_the_same_bits(
    among_others: bool, folder: Path, tmp_path: Path
) -> None:
    """In int4, where rows stand alone: whatever shares the passes of either."""
    engines = [_engine(_packed(_model("qwen3"), tmp_path / "m", 4), folder) for _ in range(2)]
    assert engines[0].row_invariant
    for engine in engines:
        engine._chunk = reuse.CHUNK
    rules = reuse.sampled(reuse.SECOND_TOKENS)
    for before, sampling in ((rules, reuse.PLAIN), (reuse.PLAIN, rules)):
        found = reuse.again(engines[0], before, sampling, among_others=among_others)
        assert found == reuse.anew(engines[1], sampling, among_others=not among_others)
    wrong, right = reuse.again(engines[0], rules, rules, beyond=1), reuse.anew(engines[1], rules)
    assert not all(one.equal(other) for one, other in zip(wrong.held, right.held, strict=True))


def test_recorded_passes_have_the_bits_of_plain_ones(folder: Path, tmp_path: Path) -> None:
    """As on CUDA, with a recorder that stands in for it: alone, among others, while the cache grows and moves."""
    model = _packed(_model("qwen3"), tmp_path / "m", 4)
    recorder, found = Recorder(), []
    for is_recorded in (False, True):
        engine = _engine(model, folder)
        assert engine._compiled is not None
        engine._compiled._graphs = Graphs(recorder) if is_recorded else None
        alone = _greedy(engine, _ids(9, 9), 50)
        sessions = [engine.open(_ids(count, count), TOLD) for count in (3, 40)]
        steps = [session.step for session in sessions]
        for turn in range(40):
            requests = [(session, _ids(1 + turn % 3, turn)) for session in sessions]
            steps += engine.extend(requests, "all")
        for session in sessions:
            session.close()
        found.append([*alone, *steps])
    assert found[0] == found[1]
    assert recorder.recorded > 5
    assert recorder.replayed > 2 * recorder.recorded


def test_a_code_that_looks_at_its_neighbours_is_not_invariant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama")
    found = _changed(_engine(model, folder), monkeypatch, lambda hidden_NC: hidden_NC + 1e-3 * len(hidden_NC))
    plan = compiled.plan_of(model.model.layers[0], torch.float32)
    assert not found._invariant_rows(0, plan)


def _changed(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> compiled.CompiledModel:
    """The compiled layers of an engine, with `change` behind each."""
    found = engine._compiled
    assert found is not None
    for number, code in list(found._codes.items()):

        def changed(given: list[torch.Tensor], code: Any = code) -> list[torch.Tensor]:
            return [change(hidden_NC) for hidden_NC in code(given)]

        monkeypatch.setitem(found._codes, number, changed)
    return found


@pytest.mark.parametrize("bucket", [16, 20])
def test_columns_that_do_not_fill_vectors_promise_nothing(bucket: int, folder: Path, tmp_path: Path) -> None:
    model = _packed(_model("qwen3"), tmp_path / "m")
    compiler = Compiler(True, False, True, folder)
    engine = LocalEngine(model, sessions=1, compiler=compiler, **CACHE | {"bucket": bucket})
    assert engine.is_compiled
    assert engine.row_invariant is (bucket == 16)


def test_products_without_instructions_for_their_dtype_are_not_compiled(folder: Path) -> None:
    model = _model("llama", torch.bfloat16)
    widen_products(model)
    assert not _open(model, folder, "auto")
    with pytest.raises(UserError, match=r"got true: this processor has no instructions for model\.dtype=bfloat16"):
        _open(model, folder, True)


def test_products_are_as_wide_as_their_rows_round_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that rounds otherwise from 20 rows on is given at most 14; what it computes is that of single rows."""
    model = _model("qwen3", **AS_SMOLLM2)
    engine = _engine(model, folder)
    found = _changed(engine, monkeypatch, lambda rows_NC: rows_NC + 1e-3 if len(rows_NC) >= 20 else rows_NC)
    plan = compiled.plan_of(model.model.layers[0], torch.float32)
    width = found._invariant_rows(0, plan)
    if width != 14:
        pytest.skip("float32 products depend on their number of rows on this processor")
    monkeypatch.setattr(found, "_most_rows", width)
    ids = _ids(24, 3)
    with engine.open([], Sampling.greedy()) as one, engine.open([], Sampling.greedy()) as other:
        [together] = engine.extend([(one, ids)], "all")
        alone = [engine.extend([(other, [token])], "all")[0].next_nll[0] for token in ids]
    assert together.next_nll == alone


@pytest.mark.parametrize("prompt_tokens", [3, 25, 64, 65, 100, 128, 150])
@pytest.mark.parametrize("fed", [64, 1000])
def test_a_text_that_is_computed_anew_gets_the_same_bits(
    prompt_tokens: int, fed: int, folder: Path, tmp_path: Path
) -> None:
    """From its prompt and new tokens, as after a loss, however they are fed; a prompt is in chunks of 64."""
    engine = _engine(_packed(_model("qwen3"), tmp_path / "m"), folder)
    prompt = _ids(prompt_tokens, prompt_tokens)
    steps = _greedy(engine, prompt, 45)
    text = prompt + [step.next_ids[-1] for step in steps[:40]]
    with engine.open([], Sampling.greedy()) as anew:
        anew.prompt_tokens = prompt_tokens
        for start in range(0, len(text), fed):
            engine.extend([(anew, text[start : start + fed])], "last")
        assert anew.step is not None
        assert anew.step.next_nll[-1:] == steps[40].next_nll[-1:]
        for step, token in zip(steps[41:], [step.next_ids[-1] for step in steps[40:]], strict=False):
            assert engine.extend([(anew, [token])], "last")[0].next_nll == step.next_nll


def test_a_neighbour_that_meets_nan_changes_no_bit(folder: Path) -> None:
    """To find its first position it is computed once more, it alone."""
    model: Any = _model("llama")
    model.model.embed_tokens.weight[98] = math.nan
    engine = _engine(model, folder)
    found = []
    for spoils in (False, True):
        with engine.open(_ids(30, 1), Sampling.greedy()) as good, engine.open(_ids(9, 2), Sampling.greedy()) as bad:
            requests = [(good, [7, 8, 9]), (bad, [5, 98 if spoils else 6])]
            if spoils:
                with pytest.raises(NotFinite):
                    engine.extend(requests, "all")
                assert "position 10" in bad.fault
            else:
                engine.extend(requests, "all")
            found.append(engine.extend([(good, [10, 11])], "all")[0].next_nll)
    assert found[0] == found[1]


@pytest.mark.parametrize("want", ["last", "all"])
def test_shards_say_what_the_whole_says(want: Any, folder: Path, tmp_path: Path) -> None:
    whole = _packed(_model("qwen3"), tmp_path / "m")
    engine = _engine(whole, folder)
    structure = find_structure(_model("qwen3"))
    config = AutoConfig.from_pretrained(tmp_path / "m", local_files_only=True)
    tensors = _tensors(tmp_path / "m")
    limits = ShardLimits(sessions=4, context=200, bucket=32, kv_limit_bytes=10**8, idle_seconds=60.0)
    shards = []
    for kind, layers in ((FirstShard, range(1)), (LastShard, range(1, 3))):
        part = read_slice(
            config, tensors, structure, layers, embedding=kind is FirstShard, head=kind is LastShard,
            dtype=torch.bfloat16,
        )  # fmt: skip
        shards.append(kind(part, layers, limits, compiler=Compiler(True, True, True, folder)))
        assert shards[-1]._compiled is not None
    sessions = [engine.open([], Sampling.greedy()) for _ in range(3)]
    for shard in shards:
        for key in range(3):
            shard.open(key, Sampling.greedy(), 200)
    # The longest is part of a prompt: it is computed alone, by transformers' own forward.
    for turn, counts in enumerate(([30, 7, 2], [1, 5, 40], [4, 1, 1], [1, 1, 1])):
        texts = [_ids(count, 10 * turn + count) for count in counts]
        pieces = [
            Piece(session=key, position=session.position, count=count, is_first=True, is_last=True)
            for key, (session, count) in enumerate(zip(sessions, counts, strict=True))
        ]
        ids = [token for text in texts for token in text]
        hidden = shards[0].forward(range(3), PassInput(pieces, want, ids))
        assert isinstance(hidden, torch.Tensor)
        found = shards[1].forward(range(3), PassInput(pieces, want, ids if want == "all" else (), hidden))
        expected = engine.extend(list(zip(sessions, texts, strict=True)), want)
        assert isinstance(found, list)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.next_ids == theirs.next_ids
            assert ours.next_nll == theirs.next_nll


def test_a_pass_that_fails_leaves_every_request_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short pieces were computed before the long one failed."""
    limits = ShardLimits(sessions=4, context=200, bucket=32, kv_limit_bytes=10**8, idle_seconds=60.0)
    _packed(_model("qwen3"), tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m", local_files_only=True)
    tensors, structure = _tensors(tmp_path / "m"), find_structure(_model("qwen3"))
    part = read_slice(config, tensors, structure, range(3), embedding=True, head=True, dtype=torch.bfloat16)
    shard = OnlyShard(part, range(3), limits, compiler=Compiler(True, True, True, folder))
    for key in range(2):
        shard.open(key, Sampling.greedy(), 200)

    def pass_of(position: int, counts: Sequence[int]) -> Any:
        pieces = [
            Piece(session=key, position=position, count=count, is_first=position == 0, is_last=True)
            for key, count in enumerate(counts)
        ]
        return shard.forward(range(2), PassInput(pieces, "all", _ids(sum(counts), sum(counts))))

    pass_of(0, [3, 3])

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(shard, "_pass", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            pass_of(3, [2, 40])
    again = pass_of(3, [2, 40])[0].nll
    for key in range(2):
        shard.close(key)
        shard.open(key, Sampling.greedy(), 200)
    pass_of(0, [3, 3])
    assert str(again) == str(pass_of(3, [2, 40])[0].nll)
    assert not math.isnan(again[0]), "the nll of the first draft token is known from the pass before"


def test_a_second_start_compiles_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama")
    _engine(model, folder)

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiled, "_compile", never)
    _engine(model, folder)
    torch.set_num_threads(2)  # code for another number of threads is other code
    with pytest.raises(AssertionError, match="compiled again"):
        _engine(model, folder)


def test_code_that_others_can_change_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    model = _model("llama")
    _engine(model, folder)
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    _engine(model, own)
    for places in ([own], list(own.glob("*.pt2"))):
        for place in places:
            place.chmod(place.stat().st_mode | 0o020)
        with pytest.raises(
            UserError, match=r"other users can change '.*', which holds machine code: .* \(chmod go-w\)"
        ):
            _engine(model, own)
        for place in places:
            place.chmod(place.stat().st_mode & ~0o022)
    _engine(model, own)


def _spoil(package: Path, kind: str) -> None:
    data = bytearray(package.read_bytes())
    if kind == "flipped":  # in machine code
        data[len(data) // 2] ^= 0xFF
    package.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "noise": data[::-1]}.get(kind, data))


@pytest.mark.parametrize("kind", ["empty", "cut", "noise", "flipped"])
def test_a_damaged_package_is_compiled_again(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model("llama")
    _engine(model, folder)
    own = tmp_path / "own"
    own.mkdir()
    plan = compiled.plan_of(model.model.layers[0], torch.float32)
    good = folder / f"{compiled._digest(plan, torch.device('cpu'))}.pt2"
    package = own / good.name
    shutil.copy(good, package)
    _spoil(package, kind)
    assert not _open(model, own, "auto", lasts=False)
    monkeypatch.setattr(compiled, "_compile", lambda plan, tensors, package: shutil.copy(good, package))
    _engine(model, own)


def test_a_list_of_parts_before_the_file_is_damage(tmp_path: Path) -> None:
    """zipfile meets it with an OSError, as if the place could not be used."""
    package = tmp_path / "a.pt2"
    with ZipFile(package, "w") as parts:
        parts.writestr("a", "b" * 100)
    assert compiled._is_whole(package)
    data = bytearray(package.read_bytes())
    data[-5] ^= 1
    package.write_bytes(data)
    with pytest.raises(OSError, match="Invalid argument"), ZipFile(package) as parts:
        parts.testzip()
    assert not compiled._is_whole(package)


def test_a_package_that_does_not_load_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose temporary folder may hold no machine code."""
    caplog.set_level("INFO")
    model = _model("llama")
    _engine(model, folder)

    def fail(package: str, *options: object) -> None:
        raise RuntimeError("failed to map\na segment")

    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", fail)
    assert not _open(model, folder, "auto")
    assert (
        "layers are not compiled: a compiled layer does not load: RuntimeError: failed to map a segment" in caplog.text
    )


def test_a_compiler_that_can_work_nowhere_is_not_called(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert not _open(_model("llama"), tmp_path / "it's own", "auto")
    line = "layers are not compiled: TMPDIR or model.cache_dir must be a path without spaces and quotes, got "
    assert line in caplog.text
    assert [file.suffix for file in (tmp_path / "it's own").iterdir()] == [".lock"]


def test_a_compiler_that_fails_is_quoted_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its pages, which begin with its whole command line, the first complaint."""
    caplog.set_level("INFO")
    own = next(filter(None, map(shutil.which, COMPILERS)))
    script = f"test $1 = --version && exec {own} --version\necho 'cc1plus: error: no space left' >&2\nexit 1\n"
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{script}")
    (tmp_path / "g++").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert not _open(_model("llama"), tmp_path / "own", "auto")
    assert "layers are not compiled: a layer did not compile: " in caplog.text
    assert "cc1plus: error: no space left\n" in caplog.text
    assert "Command" not in caplog.text


def test_a_full_disk_keeps_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose files cannot grow: torch's writer would end this one."""
    script = """
import logging, resource, signal, sys, torch
from pathlib import Path
from lab.engine import compiled
from tests.lab.engine.test_compiled import _model, _open

def full(*given, package_path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    writer = torch._C.PyTorchFileWriter(package_path)
    writer.write_record("code", b"x" * 10**6, 10**6)
    writer.write_end_of_file()

import torch._inductor
torch._inductor.aoti_compile_and_package = full
logging.basicConfig(level="INFO", stream=sys.stdout)
assert not _open(_model("llama"), Path(sys.argv[1]), "auto")
assert [file.suffix for file in Path(sys.argv[1]).iterdir()] == [".lock"]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "own")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compiled layers cannot be kept in" in done.stdout
    assert "File too large" in done.stdout


def test_a_place_that_cannot_be_written_compiles_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    model = _model("llama")
    assert not _open(model, tmp_path / "file" / "compiled", "auto")
    assert "layers are not compiled: compiled layers cannot be kept in" in caplog.text
    with pytest.raises(UserError, match=r"device\.compile must be false or auto here, got true: .*cannot be kept in"):
        _open(model, tmp_path / "file" / "compiled", True)


def test_code_that_computes_something_else_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compiler with a fault makes it: here, of a layer with another epsilon."""
    model: Any = _model("llama", **{"rms_norm_eps": 1e-6})
    _engine(model, folder)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    digest = compiled._digest
    monkeypatch.setattr(
        compiled, "_digest", lambda plan, device: digest(replace(plan, scaling=plan.scaling / 2), device)
    )
    with pytest.raises(UserError, match=r"compiled layer 0 differs from what it was made of, .* times too much"):
        _engine(model, folder)


def _open(model: Any, tmp_path: Path, wanted: bool | str, *, is_packed: bool = True, lasts: bool = True) -> bool:
    compiler = Compiler(wanted, is_packed, lasts, tmp_path)
    return LocalEngine(model, sessions=1, compiler=compiler, **CACHE).is_compiled


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"device\.compile must be false or auto here, got true: .* no C\+\+ compiler"):
        _open(_model("llama"), tmp_path, True)
    assert not _open(_model("llama"), tmp_path, "auto")
    assert "layers are not compiled: this machine has no C++ compiler" in caplog.text


def test_auto_compiles_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def code(*_: object, may_compile: bool) -> None:
        asked.append(may_compile)
        raise NotCompiled("only asked")

    monkeypatch.setattr(compiled, "compiled_code", code)
    model = _model("llama")
    assert not _open(model, tmp_path, False)
    assert not _open(model, tmp_path, "auto", is_packed=False)
    assert asked == []
    assert not _open(model, tmp_path, "auto", lasts=False)
    assert not _open(model, tmp_path, "auto", lasts=True)
    assert asked == [False, True]


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_other_layers_are_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"device\.compile must be false or auto here, got true: "):
        _open(random_model(family, torch.float32), tmp_path, True)


def test_a_model_of_another_build_runs_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not _open(model, tmp_path, "auto")
    assert "layers are not compiled: no code is compiled for a GPT2Model" in caplog.text


def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UserError, match="depend on the length of a text"):
        _open(_model("llama", rope_parameters=scaling), tmp_path, True)


def test_float64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bfloat16 or float32, not in torch\.float64"):
        _open(_model("llama", torch.float64), tmp_path, True)


def test_a_plan_says_all_that_decides_the_code() -> None:
    layers = [layer for family, own in FAMILIES.items() for layer in _model(family, **own).model.layers]
    assert len({compiled.plan_of(layer, torch.float32) for layer in layers}) == len(FAMILIES) + 1  # Qwen2 has two
