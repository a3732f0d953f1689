"""Every part of the benchmark runs, at toy size, over real processes. No time is asserted: machines are shared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lab.command.entry import Run, compose_settings
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.models.sources import load_tokenizer_only
from lab.settings import ModelSettings, UserError
from lab.wire.frames import encode
from lab.wire.tokens import pack_tokens
from speculative.bench import __main__ as bench
from speculative.bench import loops
from speculative.bench.rig import Case, Reading, Rig, for_engine, model_overrides, text_bytes
from speculative.drafter.loop import Round, speculate
from speculative.drafter.sources import EngineDrafts
from speculative.drafter.tally import Tally
from speculative.drafter.target import join
from speculative.drafts import RandomDrafts
from speculative.messages import TABLE, CloseFrame, MessageType, OpenFrame, Reason
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.shared import made_once
from tests.speculative.in_process import InProcess, request, speculated
from tests.speculative.in_process import bench as verifiers_on
from tests.speculative.processes import Role, wait_until

TOY = (
    "tracking=none",
    "device.threads=1",
    "project.bench.rtt_seconds=[0.0,0.03]",
    "project.bench.draft_lengths=[3]",
    "project.bench.fixed_lengths=[2]",
    "project.bench.new_tokens=36",
    "project.bench.alone_tokens=12",
    "project.bench.repeats=1",
    "project.bench.text_repeats=1",
    "project.bench.low_acceptances=[0.5]",
    "project.bench.far_rtt_seconds=[]",
    "project.bench.frame_rounds=20",
    "project.bench.neighbour_tokens=60",
    "project.bench.crowd=2",
    "project.bench.crowd_tokens=8",
    "project.bench.text_tokens=8",
    "project.bench.layers=[1]",
    "project.bench.history_tokens=300",
    "project.synthetic.step_seconds=0.008",
    "project.synthetic.row_seconds=0.0001",
    "project.synthetic.draft_step_seconds=0.001",
)
EVERY_ROW = {"part", "mode", "drafter", "rtt_seconds", "alpha", "draft_length", "tokens_per_second", "speedup"}
EVERY_ROW |= {"predicted_speedup", "n"}


def _rows(folder: Path, *words: str) -> list[dict[str, Any]]:
    settings = compose_settings("spec_decoding", " ".join((*TOY, *words)), SpeculativeSettings)
    result = bench.run(settings, Run(folder))
    assert json.loads(Path(result["report"]).read_text())["rows"] == result["rows"]
    assert all(Path(picture).stat().st_size > 10_000 for picture in result["pictures"])
    return list(result["rows"])


def _reported(folder: Path, *parts: str) -> list[dict[str, Any]]:
    """The rows of these parts."""
    (report,) = folder.glob("speculative-*.json")
    return [row for row in json.loads(report.read_text())["rows"] if row["part"] in parts]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all parts of the synthetic engines, over one verifier, have left their report and pictures."""
    return made_once(tmp_path_factory, "speculative_bench", _rows)


def test_loops_beside_their_formulas_and_pictures(synthetic: Path) -> None:
    rows = _reported(synthetic, "loops", "busy", "frame")
    loops = [row for row in rows if row["part"] == "loops"]
    assert [(row["mode"], row["rtt_seconds"]) for row in loops] == [
        (mode, rtt) for rtt in (0.0, 0.03) for mode in ("target_only", "sync", "async")
    ]
    assert all(row.keys() >= EVERY_ROW for row in loops)
    alone, sync, asynchronous = ([row for row in loops if row["mode"] == m] for m in ("target_only", "sync", "async"))
    assert all(row["speedup"]["median"] == 1 for row in alone)
    assert all(0 < row["formula_over_measured"]["median"] < 1.05 for row in sync), "faster than its own formula"
    assert sync[1]["tokens_per_second"]["median"] < sync[0]["tokens_per_second"]["median"], "the delay was not there"
    assert all(0.5 < row["alpha"] <= 1 for row in asynchronous)
    assert all(0 < row["over_optimum"]["median"] < 1.1 for row in asynchronous), "faster than any policy can be"
    assert all(row["bytes_per_accepted_token"] > 4 for row in sync)
    busy = {row["mode"]: row for row in rows if row["part"] == "busy"}
    assert busy["async"]["target_busy"] > busy["sync"]["target_busy"], "the target waits in the synchronous loop"
    assert [row["part"] for row in rows].count("frame") == 1
    assert {path.name for path in synthetic.glob("*.png")} == {"speedup.png", "busy.png"}


def test_lengths_near_and_useless_drafters(synthetic: Path) -> None:
    rows = _reported(synthetic, "lengths", "near", "useless")
    assert [row["draft_length"] for row in rows if row["part"] == "lengths"] == [2, "auto"] * 2
    judged = [row for row in rows if "holds" in row]
    assert [row["part"] for row in judged] == ["lengths", "lengths", "near", "near", "useless"]


def test_neighbours_of_a_hostile_client(synthetic: Path) -> None:
    rows = _reported(synthetic, "neighbours")
    assert [row["fourth"] for row in rows] == ["like them", "like them, again", "stalled", "hostile"]
    assert all(row["n"] > 100 for row in rows)


def test_a_real_pair_beside_transformers(tmp_path: Path) -> None:
    rows = _rows(
        tmp_path,
        "model=random",
        "project.bench.engine=real",
        "project.bench.rtt_seconds=[0.0]",
        "'project.bench.texts=[{name: edit, prompt: one two one two one, repeats: true},"
        "{name: prose, prompt: three, repeats: false}]'",
    )
    parts = [row["part"] for row in rows]
    assert sorted(set(parts)) == ["crowd", "second_turn", "sources", "texts"]
    texts = [row for row in rows if row["part"] == "texts"]
    assert [row["mode"] for row in texts] == ["assisted", "target_only", "sync", "async"] * 2
    crowds = [(row["text"], row["drafters"]) for row in rows if row["part"] == "crowd"]
    assert crowds == [(text, drafters) for text in ("edit", "prose", "all") for drafters in (1, 2)]
    assert all(row["tokens_per_second"]["median"] > 0 for row in rows if row["part"] != "second_turn")
    [chat] = [row for row in rows if row["part"] == "second_turn"]
    assert (chat["history_tokens"], chat["prompt_tokens"], chat["cached_tokens"]) == (300, 328, 256)
    assert chat["over_cold"]["median"] > 0


class _Peer:
    """A llama.cpp that makes 100 tokens a second alone and 200 with n-grams, prompts included."""

    closed: ClassVar[list[bool]] = []

    def __init__(self, model: ModelSettings, threads: int, slots: int, context: int, speculation: str | None) -> None:
        self._factor = 2 if speculation == "NGRAM_CACHE" else 1

    def complete(self, ids: list[int], new_tokens: int, *, ignore_end: bool) -> dict[str, float]:
        assert not ignore_end
        milliseconds = 1000 * new_tokens / (100 * self._factor)
        return {"predicted_n": new_tokens, "prompt_ms": 0.25 * milliseconds, "predicted_ms": 0.75 * milliseconds}

    def close(self) -> None:
        self.closed.append(True)


def test_a_real_pair_beside_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "model=random",
        "project.bench.engine=real",
        "project.bench.parts=[llama_cpp]",
        "'project.bench.texts=[{name: edit, prompt: one two one two one, repeats: true}]'",
    )
    monkeypatch.setattr("speculative.bench.loops.open_llama_cpp", _Peer)
    [row] = _rows(tmp_path, *words)
    assert len(_Peer.closed) == 1 + len(loops.LLAMA_CPP_DRAFTS)
    assert row["its_best"] == "NGRAM_CACHE"
    assert row["llama_cpp_tokens_per_second"]["alone"]["median"] == pytest.approx(100)
    assert row["over_llama_cpp"]["median"] == pytest.approx(row["tokens_per_second"]["median"] / 100, rel=0.2)
    assert row["holds"] == (row["over_llama_cpp"]["median"] >= 2 and row["over_its_best"]["median"] >= 1)


@pytest.mark.parametrize("model", ["smollm2_135m", "random"])
def test_without_its_wheel_or_a_gguf_file_llama_cpp_is_left_out(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr("lab.models.gguf.file.gguf_file", lambda model: tmp_path)
    assert loops.llama_cpp(Rig(_settings(f"model={model}", "project.bench.engine=real"), tmp_path)) == []


def test_the_verifier_has_the_model_that_was_asked_for(tmp_path: Path) -> None:
    words = f"model=random model.cache_dir={tmp_path} model.dtype=bfloat16 model.quantization=int4 device.compile=true"
    asked = compose_settings("spec_decoding", words, SpeculativeSettings)
    got = compose_settings("spec_decoding", model_overrides(asked), SpeculativeSettings)
    assert (got.model, got.device.compile) == (asked.model, True)
    adapted = compose_settings("spec_decoding", f"model=random model.adapter={tmp_path}/it", SpeculativeSettings)
    got = compose_settings("spec_decoding", model_overrides(adapted), SpeculativeSettings)
    assert got.model.adapter == adapted.model.adapter


@pytest.mark.parametrize("word", ["model.adapter=folder", "model.quantization=int8", "device.compile=true"])
def test_an_engine_without_a_model_refuses_what_only_a_model_has(word: str) -> None:
    with pytest.raises(UserError, match=rf"^{word.partition('=')[0]} must be .* for project.bench.engine=synthetic"):
        for_engine(_settings(word))


def test_the_seed_is_that_of_the_texts(tmp_path: Path) -> None:
    rig = Rig(_settings("model=random", "seed=7"), tmp_path)
    assert rig.settings_of(Case(mode=Mode.sync, rtt_seconds=0.0, new_tokens=1, seed=2)).seed == 9


def test_parts_belong_to_engines(tmp_path: Path) -> None:
    parts = "sources, texts, crowd, llama_cpp, second_turn"
    with pytest.raises(UserError, match=rf"project\.bench\.parts must be of {parts} for engine=real"):
        _rows(tmp_path, "project.bench.engine=real", "project.bench.parts=[loops]")


def test_which_guesses_of_a_text_were_right() -> None:
    def done(guesses: list[int], right: int, ids: list[int]) -> Round:
        return Round(
            draft_ids=guesses,
            accepted=right,
            right=right,
            ids=ids,
            draft_nll=[],
            margins=[],
            place=0,
            made=len(guesses),
            sent=len(guesses),
            draft_seconds=0.0,
            stale=0,
            epoch=0,
        )

    tally = Tally()
    for one in (done([], 0, [5]), done([6, 7, 1], 2, [8]), done([9], 1, [4]), done([1], 0, [2])):
        tally.add(one)
    guess = Reading(tally, 0).is_right()
    assert [place for place in range(10) if not guess(place, 0)] == [3, 6]


def _settings(*words: str) -> SpeculativeSettings:
    return compose_settings("spec_decoding", " ".join(("tracking=none", *words)), SpeculativeSettings)


def _bytes_per_accepted_guess(length: int) -> float:
    """Of a text at acceptance 0.8."""
    target, drafter = (
        SyntheticEngine(
            vocabulary_size=50_000, context=2**14, sessions=1, step_seconds=0, row_seconds=0, agreement=agreement
        )
        for agreement in (1.0, 0.8)
    )
    with verifiers_on(target) as verifiers:
        drafts = EngineDrafts(drafter, Sampling.greedy(), 50_000)
        rounds = speculated(InProcess(verifiers), drafts, request([1], 4000, Sampling.greedy(), length=length))
    return text_bytes(1, rounds) / sum(done.accepted for done in rounds)


def test_an_accepted_token_costs_at_most_25_bytes_both_ways() -> None:
    assert _bytes_per_accepted_guess(8) <= 25
    assert _bytes_per_accepted_guess(1) > 25, "the check sees a loop that is chattier"


def test_these_bytes_are_the_ones_that_cross_the_socket(random_verifier: Role) -> None:
    settings = _settings("model=random", "model.dtype=float64", f"network.port={random_verifier.port}")
    asked = request([1, 2, 3], 40, Sampling.greedy(), length=8)
    opened = OpenFrame(
        name=2**64 - 1,
        owner=bytes(16),
        seed=0,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        logit_rules=None,
        top_tokens=0,
        max_new_tokens=40,
        mode=Mode.sync,
        draft_length=8,
        threshold=None,
        report=False,
        logprobs=False,
    )
    expected = len(encode(TABLE, MessageType.open, 1, opened, pack_tokens(asked.prompt_ids)))
    for reason in (Reason.length, Reason.left):  # the verifier's word and ours cross on the way
        expected += len(encode(TABLE, MessageType.close, 1, CloseFrame(reason=reason, text="")))
    with join(settings, token_texts(load_tokenizer_only(settings.model))) as target:
        before = target.bytes_sent + target.bytes_received
        rounds = list(speculate(target, RandomDrafts(1, 256), asked, []))
        expected += text_bytes(3, rounds)
        wait_until(lambda: target.bytes_sent + target.bytes_received - before >= expected, "the verifier's CLOSE")
        more = target.bytes_sent + target.bytes_received - before - expected
    assert more % 18 == 0, "not heartbeats"
    assert more < 200
