"""Streams that are closed, left, full or in the way: a command ends quietly, and its result is kept."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lab.command import streams
from lab.command.streams import print_last_line

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 120.0
SCRIPT = """
import sys
from lab.command import entry
from lab.decode import DecodeSettings
from lab.command.terminal import TextStream

def run(settings, place):
    place.so_far = lambda: {"said": said}
    said, stream = [], TextStream(lambda ids: bytes(ids).decode(), sys.stdout)
    print("it begins", file=sys.stderr, flush=True)
    for word in range(settings.seed):
        said.append(word)
        stream.add([*b"a\\n"])
    print("it ends", file=sys.stderr, flush=True)
    return {"said": said, "device": "cpu"}

entry.main("decode", DecodeSettings, run)
"""


def run(folder: Path, redirections: str, tokens: int) -> tuple[int, str, str, dict[str, Any]]:
    """A command below a shell: its exit code (0 where the shell keeps it), stdout, stderr and result.json."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    words = f"tracking=none model=random model.dtype=float32 seed={tokens} hydra.run.dir={folder}/run"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script} {words} {redirections}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, json.loads((folder / "run" / "result.json").read_text())


def test_a_reader_that_leaves_ends_the_text_quietly(tmp_path: Path) -> None:
    code, out, err, result = run(tmp_path, "| head -1", tokens=1_000_000)
    assert (code, out, err) == (141, "a\n", "it begins\n")
    assert (result["status"], result["ended_by"]) == ("failed", "closed")
    assert 0 < len(result["said"]) < 1_000_000


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&- <&-", "2>&-"])
def test_closed_streams_change_nothing(redirection: str, tmp_path: Path) -> None:
    code, out, err, result = run(tmp_path, redirection, tokens=3)
    assert (code, result["status"], result["said"]) == (0, "ok", [0, 1, 2])
    assert "Traceback" not in err
    assert (out[:6] == "a\na\na\n") is (redirection == "2>&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code, _, err, result = run(tmp_path, "> /dev/full", tokens=3)
    assert (code, result["status"], result["said"]) == (1, "ok", [0, 1, 2])
    line = f"standard output could not be written (No space left on device); {tmp_path}/run/result.json has the result"
    assert err == f"it begins\nit ends\n{line}\n"


def test_standard_error_on_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    code, out, _, _ = run(tmp_path, "2> /dev/full", tokens=3)
    assert (code, json.loads(out.splitlines()[-1])["said"]) == (0, [0, 1, 2])


def opened(file: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    return streams.open_streams()


def test_a_pipe_that_does_not_block_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that node or ssh has made so: writing more than it holds raises BlockingIOError elsewhere."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    came = bytearray()

    def take() -> None:
        while piece := os.read(read, 65536):
            came.extend(piece)

    reader = threading.Thread(target=take)
    reader.start()
    with os.fdopen(write, "w") as file:
        out = opened(file, monkeypatch)
        out.write("é" * 300_000)
        out.flush()
    reader.join(SECONDS)
    os.close(read)
    assert came == ("é" * 300_000).encode()


def test_a_signal_in_the_middle_of_a_write_writes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe is full when the signal is raised; what is written afterwards comes behind what was."""
    read, write = os.pipe()
    came, text = bytearray(), "".join(f"{number}," for number in range(40_000))
    main = threading.main_thread().ident
    assert main is not None

    def take() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        while piece := os.read(read, 65536):
            came.extend(piece)

    reader = threading.Timer(0.3, take)
    with os.fdopen(write, "w") as file:
        out = opened(file, monkeypatch)
        reader.start()
        try:
            out.write(text)
            out.flush()
        except KeyboardInterrupt:
            print_last_line("{}", out)
        else:
            pytest.fail("it was not in the middle")
    reader.join(SECONDS)
    os.close(read)
    *shown, last = came.decode().splitlines()
    assert last == "{}"
    assert text.startswith("".join(shown))


def test_the_last_line_stands_on_a_line_of_its_own_and_nothing_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "out").open("w") as file:
        stream = opened(file, monkeypatch)
        stream.write("in the middle of a l")
        print_last_line("{}", stream)
        stream.write("a thread that is late")
        stream.flush()
    assert (tmp_path / "out").read_bytes() == b"in the middle of a l\n{}\n"


@pytest.mark.parametrize("named", [None, "cp1252", "ascii:strict"])
def test_what_a_stream_cannot_encode_is_escaped(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        monkeypatch.setenv("PYTHONIOENCODING", named)
    else:
        monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    with (tmp_path / "out").open("w", encoding="ascii", newline="\r\n") as file, (tmp_path / "err").open("w") as errors:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", errors)
        out = streams.open_streams()
        out.write("é\u3000\r\n\n")
        out.flush()
    encoding = (named or "utf-8").partition(":")[0]
    assert (tmp_path / "out").read_bytes() == "é\u3000\r\n\n".encode(encoding, "backslashreplace")
