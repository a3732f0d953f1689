"""How full windows are timed: over any engine, with times that are known."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lab import decode
from lab.command.entry import Run, compose_settings
from lab.decode import DecodeSettings, time_tokens
from lab.engine.synthetic import SyntheticEngine
from lab.settings import DeviceName, UserError
from tests.in_process import exit_code


def synthetic(context: int = 64, sessions: int = 3, row_seconds: float = 0.0) -> SyntheticEngine:
    return SyntheticEngine(
        vocabulary_size=50,
        context=context,
        sessions=sessions,
        step_seconds=0.01,
        row_seconds=row_seconds,
        agreement=1.0,
    )


def test_times_are_those_of_the_engine() -> None:
    """10 ms a pass and 1 ms a further row: 3 texts in step, prompts of 56 tokens."""
    figures = time_tokens(synthetic(row_seconds=0.001), context=64, sessions=3, new_tokens=8)
    assert figures["token_seconds_p50"] >= 0.012
    assert figures["time_to_first_token_seconds"] >= 0.01 + 0.001 * (3 * 56 - 1)
    assert 0 < figures["tokens_per_second"] <= 3 / 0.012
    assert figures["prompt_tokens"] == 56


def test_windows_are_full_and_sessions_closed() -> None:
    lengths: list[int] = []

    class Watched(SyntheticEngine):
        def close(self, session):  # type: ignore[no-untyped-def]
            lengths.append(session.position)
            super().close(session)

    engine = Watched(
        vocabulary_size=50, context=32, sessions=2, step_seconds=0.0, row_seconds=0.0, agreement=1.0, sleep=time.sleep
    )
    time_tokens(engine, context=32, sessions=2, new_tokens=5)
    assert lengths == [31, 31], "the last token is said, not read"


def test_no_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"new_tokens must be at least 2 and below context=8, got 8"):
        time_tokens(synthetic(), context=8, sessions=1, new_tokens=8)


def test_the_command_times_a_whole_model(tmp_path: Path) -> None:
    words = "model=random tracking=none project.context=48 project.sessions=2 project.max_new_tokens=4 device.threads=1"
    settings = compose_settings("decode", words, DecodeSettings)
    figures = decode.run(settings, Run(tmp_path))
    assert (figures["context"], figures["sessions"], figures["prompt_tokens"]) == (48, 2, 44)
    assert figures["tokens_per_second"] > 0
    assert figures["peak_rss_bytes"] > 2**20
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tokens_per_second"] == figures["tokens_per_second"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "device.name=mps model.quantization=int4",
            "model.quantization must be none or nf4 on mps, got int4: there is no kernel for it",
        ),
        (
            "model.quantization=int8 model.architecture.intermediate_size=80",
            "model must have widths that int8 can pack, got a llama: model.layers.0.mlp.down_proj has 80 inputs, which "
            "is no multiple of 32",
        ),
        (
            "model.quantization=int4 model.dtype=float64",
            "model.dtype must be float32 or bfloat16 for int4, got float64",
        ),
        (
            "device.compile=true",
            "device.compile must be false or auto here, got true: this machine has no C++ compiler",
        ),
        ("device.compile=maybe", "device.compile must be true, false or auto, got 'maybe'"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line_and_exit_code_2(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lab.device.available", lambda: [DeviceName.mps, DeviceName.cpu])
    monkeypatch.setattr("lab.engine.compiled.shutil.which", lambda name: None)
    common = ("model=random", f"model.cache_dir={tmp_path}", "device.name=cpu", "device.threads=1", "tracking=none")
    assert exit_code(decode.main, *common, *words.split()) == 2
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("project.context=16", r"^project.context must be greater than max_new_tokens=16, got 16$"),
        ("project.context=4096", r"^project.context must be in \[1, 1024\], got 4096$"),
        ("project.cache_limit_bytes=65536 project.context=512", r"^project.cache_limit_bytes must have room"),
    ],
)
def test_what_does_not_fit_is_named(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        decode.run(compose_settings("decode", f"model=random tracking=none {words}", DecodeSettings), Run(tmp_path))
