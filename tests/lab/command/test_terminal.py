"""A text as it comes: whole characters, exactly the text into a pipe, and nothing that a terminal obeys."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lab.command.terminal import TextStream, has_room, masked, one_line
from lab.models.conversion import BYTE_EOS, byte_tokenizer
from lab.text.generation import decoder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def shown(text: bytes, stream: io.StringIO) -> str:
    written = TextStream(decode_bytes, stream)
    for byte in text:
        written.add([byte])
    written.finish()
    return stream.getvalue()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
@example(
    "\u6771\u4eac\u3000\u5927 10\u00a0000 \U0001f468\u200d\U0001f469 soft\u00adhyphen a\r\nb\rc\x1b[2J\x00\ufffd\u202e"
)
def test_a_pipe_gets_exactly_the_text(text: str) -> None:
    assert shown(text.encode(), io.StringIO(newline="")) == text + "\n"


def test_a_character_is_written_once_it_is_whole() -> None:
    stream = io.StringIO()
    written = TextStream(decode_bytes, stream)
    for byte in "é€x".encode():
        written.add([byte])
        assert "\N{REPLACEMENT CHARACTER}" not in stream.getvalue()
    written.finish()
    assert stream.getvalue() == "é€x\n"


def test_a_terminal_gets_what_it_does_not_obey() -> None:
    assert shown(b"a\x1b[2Jb\n\tc\x07\x7f", Terminal()) == "a?[2Jb\n\tc??\n"
    assert shown("\u9b31\u202eabc\u200d\u3000\u0085".encode(), Terminal()) == "\u9b31?abc\u200d\u3000?\n"
    assert masked("one\r\ntwo\rthree") == "one\ntwo\nthree"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece's: words that begin with a space, and bytes of what it has no word for."""
    words = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "\u2581b", "c"]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_what_is_shown_is_the_text_of_the_last_line() -> None:
    """Bytes of several characters in a row, special tokens within, first tokens that lose their space."""
    tokenizer = fallback_tokenizer()
    decode = decoder(tokenizer, [0])
    emoji = [1 + byte for byte in "\U0001f468\U0001f469é".encode()]
    letters = [257, 258, 259]
    for seed in range(50):
        rng = random.Random(seed)
        ids = [token for _ in range(6) for token in rng.choice([emoji, letters, [0], [rng.randrange(257, 260)]])]
        stream = io.StringIO(newline="")
        written = TextStream(decode, stream)
        for token in ids:
            written.add([token])
        written.finish()
        assert stream.getvalue() == decode(ids) + "\n", ids


def test_the_name_of_the_end_token_is_no_part_of_the_text() -> None:
    assert decoder(byte_tokenizer(), [BYTE_EOS])([*b"ab", BYTE_EOS]) == "ab"
    assert decoder(byte_tokenizer(), [ord("b")])(b"ab") == "a", "also one that no tokenizer calls special"


def test_a_message_is_one_line() -> None:
    assert one_line("a\nb\x1b[1mc") == "a b?[1mc"


@pytest.mark.parametrize(
    ("variables", "fits"),
    [
        ({}, True),
        ({"COLUMNS": "20"}, False),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_bars_and_columns_need_a_terminal_for_them(
    variables: dict[str, str], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"COLUMNS": "100"} | variables).items():
        monkeypatch.setenv(name, value)
    assert has_room(Terminal()) is fits
    assert not has_room(io.StringIO())
