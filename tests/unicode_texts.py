"""Random texts through arguments, standard input, prompt files and pipes, in every encoding a locale may have: the same
text comes out, or one line that says why not; never another text.

A process a locale takes many texts (`python -m tests.unicode_texts many`), and each way is gone once by a whole command
(`python -m tests.unicode_texts command prompt=...`).
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lab.command import entry, streams
from lab.command.terminal import TextStream
from lab.decode import DecodeSettings
from lab.settings import UserError

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120.0
LOCALES: dict[str, dict[str, str]] = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "cp1252": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "cp1252"},
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
WAYS = ("argument", "stdin", "file", "pipe")
BATCH = 100
PLANES = [(0x80, 0xD7FF), (0xE000, 0xFFFF), *((plane << 16, (plane << 16) + 0xFFFF) for plane in range(1, 17))]
ODD = "\u200d\u200c\u3000\u00a0\u202f\u00ad\ufeff\u202e\u2028\u0085\ufffd\r\n\t\x0b\x1b\x7f\x00,'\"\\${}[]()=:#~*? -"


@dataclass
class Found:
    """What came of all texts."""

    texts: int = 0
    same: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    """Another text, or no line; the first ten."""

    def add(self, where: str, expected: str | None, came: str | None) -> None:
        """One text on one way. None: refused."""
        self.texts += 1
        self.same += expected == came is not None
        self.refused += expected is came is None
        if expected != came and len(self.faults) < 10:
            self.faults.append(f"{where}: {expected!a} came as {came!a}")


def random_text(rng: random.Random) -> bytes:
    """UTF-8 mostly; bytes that are none now and then."""
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        if kind < 0.4:
            pieces.append(chr(rng.randint(*rng.choice(PLANES))))
        elif kind < 0.7:
            pieces.append(rng.choice(ODD))
        else:
            pieces.append("".join(rng.choices("abc def\r\n", k=rng.randrange(1, 6))))
    data = "".join(pieces).encode()
    return data if rng.random() < 0.9 else data + bytes(rng.choices(range(0x80, 0x100), k=2))


def expected_of(data: bytes, way: str) -> str | None:
    """The text that the bytes are; None where they are none. Files and streams may begin with a byte order mark."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    text = text if way == "argument" else text.removeprefix("\ufeff")
    return None if text == "???" else text


def round_trip(count: int, seed: int, locales: Sequence[str] = tuple(LOCALES), *, commands: bool = True) -> Found:
    """`count` texts, each on every way in every locale; with `commands` the first of them through whole commands."""
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(count)]
    found = Found()
    for locale in locales:
        for begin in range(0, count, BATCH):
            _many(locale, texts[begin : begin + BATCH], found)
        for place, way in enumerate(WAYS if commands else WAYS[:1]):
            _command(locale, way, texts[place], found)
    return found


def _many(locale: str, texts: Sequence[bytes], found: Found) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(texts):
            (Path(folder) / f"é{index}").write_bytes(data)
        arguments = [data.replace(b"\0", b"") for data in texts]  # which the system has no way to hand on
        done = _run(locale, [b"many", os.fsencode(folder), *arguments])
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        came = [json.loads(line) for line in done.stdout.splitlines()]
        for line, (way, data) in zip(came, _cases(texts, arguments), strict=True):
            expected = expected_of(data, way)
            found.add(f"{locale}, {way}", expected, line["prompt"])
            if expected is not None:
                written = (Path(folder) / line["shown"]).read_bytes()
                encoding = LOCALES[locale].get("PYTHONIOENCODING", "utf-8")
                as_written = (expected + "\n").encode(encoding, "backslashreplace")
                found.add(f"{locale}, {way}, shown", as_written.hex(), written.hex())


def _cases(texts: Sequence[bytes], arguments: Sequence[bytes]) -> list[tuple[str, bytes]]:
    return [
        (way, argument if way == "argument" else data)
        for data, argument in zip(texts, arguments, strict=True)
        for way in WAYS[:3]
    ]


def _command(locale: str, way: str, data: bytes, found: Found) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt, é"
        file.write_bytes(data)
        data = data.replace(b"\0", b"") if way == "argument" else data
        word = {"argument": b"prompt=" + data, "file": b"prompt_file=" + os.fsencode(file)}.get(way, b"prompt=-")
        words = [b"command", word, b"hydra.run.dir=" + os.fsencode(f'"{folder}/é"'), b"tracking=none"]
        words += [b"model=random", b"model.dtype=float32"]
        if way == "stdin":
            with file.open("rb") as stdin:
                done = _run(locale, words, stdin=stdin)
        else:
            done = _run(locale, words, input=data)
        expected = expected_of(data, way)
        if expected is None or data == b"-":
            lines = done.stderr.splitlines()
            is_one_line = done.returncode == 2 and len(lines) == 1 and not done.stdout
            found.add(f"{locale}, {way}, command", None, None if is_one_line else done.stderr.decode(errors="replace"))
            return
        assert done.stdout, done.stderr.decode(errors="replace")
        last = json.loads(done.stdout.splitlines()[-1])
        found.add(f"{locale}, {way}, command", expected, last["prompt"])
        kept = json.loads(next(Path(folder).glob("*/result.json")).read_text(encoding="utf-8"))
        found.add(f"{locale}, {way}, result.json", expected, kept["prompt"])


def _run(locale: str, words: Sequence[bytes], **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [os.fsencode(sys.executable), b"-m", b"tests.unicode_texts", *words]
    return subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)} | LOCALES[locale],
        cwd=ROOT,
        capture_output=True,
        timeout=SECONDS,
        check=False,
        **options,
    )


@dataclass
class PromptAlone:
    """What Hydra does with an override, without the tenth of a second that it takes for all of conf/."""

    prompt: str


def prompt_of(word: str) -> str:
    """The prompt that a command would use."""
    config = OmegaConf.structured(PromptAlone)
    overrides = OverridesParser.create().parse_overrides(entry.literal_prompt([word]))
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
    text = OmegaConf.to_container(config)["prompt"]  # type: ignore[call-overload, index, unused-ignore]
    if text == "???":
        raise UserError("prompt must be set, got ???")
    return str(text)


def many(folder: str, arguments: Sequence[str]) -> None:
    """Each text by every way; a JSON line each, and what is shown in a file."""
    for index, argument in enumerate(arguments):
        path = f"{folder}/é{index}"
        for way, word in zip(WAYS, (f"prompt={argument}", "prompt=-", f"prompt_file={path}"), strict=False):
            shown, line = f"{way}-{index}", {"prompt": None}
            try:
                streams.check_arguments([word])
                if way == "argument" and argument == "-":
                    text = "-"  # which is a word of its own
                else:
                    _stdin_from(path)
                    text = prompt_of(word)
                line = {"prompt": text, "shown": shown}
                _show(text, f"{folder}/{shown}")
            except UserError:
                pass
            print(json.dumps(line))


def _stdin_from(path: str) -> None:
    with Path(path).open("rb") as file:
        os.dup2(file.fileno(), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (in the encoding of the locale, as the interpreter does)


def _show(text: str, path: str) -> None:
    """As a drafter shows a text on standard output that leads into a file."""
    keep, file = sys.stdout, io.TextIOWrapper(Path(path).open("wb"), encoding="ascii")  # noqa: SIM115
    sys.stdout = file
    try:
        streams.open_streams()
        stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), sys.stdout)
        stream.add(list(text.encode()))
        stream.finish()
    finally:
        sys.stdout = keep
        file.close()


def command(settings: DecodeSettings, place: entry.Run) -> dict[str, Any]:
    """A run that says what it was asked."""
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), sys.stdout)
    stream.add(list(settings.prompt.encode()))
    stream.finish()
    return {"prompt": settings.prompt, "device": "cpu"}


if __name__ == "__main__":
    if sys.argv.pop(1) == "command":
        entry.main("decode", DecodeSettings, command)
    streams.in_utf8_mode()
    many(sys.argv[1], sys.argv[2:])
