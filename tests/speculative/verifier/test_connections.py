"""What a verifier says to drafters that are not ours: each ends its own connection, with a reason, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab.command.entry import compose_settings
from lab.engine.sampling_head import LogitRulesHead
from lab.models.conversion import BYTE_EOS, byte_tokenizer
from lab.wire.faults import PeerRefused
from lab.wire.frame_socket import FrameSocket
from lab.wire.tokens import pack_tokens
from speculative.messages import (
    AskVocabularyFrame,
    CloseFrame,
    DraftFrame,
    MessageType,
    OpenFrame,
    Reason,
    ResumeFrame,
    VerdictFrame,
    WelcomeFrame,
    make_side,
)
from speculative.settings import Mode, SpeculativeSettings
from speculative.verifier.server import _to_ids
from speculative.vocabulary import fingerprint, token_texts
from tests.speculative.processes import RANDOM, Role, drafted

NAMES = itertools.count()
WELCOMES: dict[FrameSocket, WelcomeFrame] = {}
"""What each connection was told first."""
OURS = fingerprint(token_texts(byte_tokenizer()))


def _words(**changes: Any) -> LogitRulesHead:
    values: dict[str, Any] = {
        "prompt_tokens": 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0 if changes else 9.0,
        "frequency_penalty": 0.0,
        "logit_bias": [],
        "bad_words": [],
        "schema": "",
    }
    return LogitRulesHead(**values | changes)


def _open(**changes: Any) -> OpenFrame:
    values: dict[str, Any] = {
        "seed": 0,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "logit_rules": None,
        "top_tokens": 0,
        "max_new_tokens": 20,
        "name": next(NAMES),
        "owner": bytes(16),
        "mode": Mode.sync,
        "draft_length": 5,
        "threshold": None,
        "report": False,
        "logprobs": False,
    }
    return OpenFrame(**values | changes)


@contextmanager
def _connected(port: int, tokenizer: str = OURS) -> Iterator[FrameSocket]:
    settings = compose_settings("spec_decoding", " ".join(RANDOM), SpeculativeSettings)
    endpoint = make_side(settings.network, "drafter", tokenizer)
    with FrameSocket.connect("127.0.0.1", port, endpoint, tls=None) as frames:
        welcome = frames.recv().head
        assert isinstance(welcome, WelcomeFrame)
        WELCOMES[frames] = welcome
        yield frames


Send = Callable[[FrameSocket], None]


def _opened_twice(frames: FrameSocket) -> None:
    for _ in range(2):
        frames.send(MessageType.open, 1, _open(), pack_tokens([1]))


def _receive_until_the_end(frames: FrameSocket) -> None:
    while True:
        frames.recv()


def _opened_then(*ids: int) -> Send:
    def send(frames: FrameSocket) -> None:
        frames.send(MessageType.open, 1, _open(), pack_tokens([1, 2]))
        frames.send(MessageType.draft, 1, DraftFrame(epoch=0, position=2), pack_tokens(ids))

    return send


@pytest.mark.parametrize(
    ("send", "why"),
    [
        (_opened_twice, "opened request 1 twice"),
        (_opened_then(3, 259), "sent token id 259 at index 1, vocabulary is 259"),
        (_opened_then(-1), "sent token id -1 at index 0, vocabulary is 259"),
        (_opened_then(*range(17)), "sent 17 draft tokens, at most 16 are checked at once"),
        (lambda frames: frames.send(MessageType.open, 1, _open(top_p=0.0), pack_tokens([1])), "top_p must be in"),
        (lambda frames: frames.send(MessageType.open, 1, _open(min_p=2.0), pack_tokens([1])), "min_p must be in"),
        (
            lambda frames: frames.send(MessageType.open, 1, _open(logit_rules=_words()), pack_tokens([1])),
            "presence_penalty",
        ),
        (
            lambda frames: frames.send(
                MessageType.open, 1, _open(logit_rules=_words(bad_words=[[1] * 4096] * 2)), pack_tokens([1])
            ),
            "bad_words must be at most 1024 of 4096 tokens together, got 2 of 8192",
        ),
        (
            lambda frames: frames.send(
                MessageType.open, 1, _open(logit_rules=_words(schema="ü" * 8193)), pack_tokens([1])
            ),
            "schema must be at most 16384 bytes of JSON, got 16386",
        ),
        (
            lambda frames: frames.send(MessageType.open, 1, _open(temperature=-1.0), pack_tokens([1])),
            "temperature must",
        ),
        (lambda frames: frames.send(MessageType.open, 1, _open(), b"abc"), "sent 3 bytes of token ids"),
        (lambda frames: frames.send(MessageType.open, 1, _open(), pack_tokens([-1])), "sent token id -1"),
        (
            lambda frames: frames.send(MessageType.verdict, 1, VerdictFrame(epoch=0, position=0, accepted=0, prefix=0)),
            "sent VERDICT, which a verifier does not accept",
        ),
        (
            lambda frames: [frames.send(MessageType.ask_vocabulary, 0, AskVocabularyFrame()) for _ in range(2)],
            "sent ASK_VOCABULARY",
        ),
    ],
)
def test_nonsense_ends_the_connection_with_a_reason(
    random_verifier: Role, send: Send, why: str, tmp_path: Path
) -> None:
    with _connected(random_verifier.port) as frames:
        send(frames)
        with pytest.raises(PeerRefused, match=why):
            _receive_until_the_end(frames)
    words = (*RANDOM, "project.max_new_tokens=2")
    assert drafted(random_verifier.port, words, tmp_path)["new_tokens"] == 2


def test_another_tokenizer_may_ask_for_the_vocabulary_and_open_nothing(random_verifier: Role) -> None:
    with _connected(random_verifier.port, "another") as frames:
        frames.send(MessageType.ask_vocabulary, 0, AskVocabularyFrame())
        assert frames.recv().type == MessageType.vocabulary
        frames.send(MessageType.open, 1, _open(), pack_tokens([1]))
        with pytest.raises(PeerRefused, match="another tokenizer"):
            frames.recv()


@pytest.mark.parametrize("name", ["model", "adapter", "dtype", "quantization", "more"])
def test_a_text_is_not_resumed_at_another_target(random_verifier: Role, name: str) -> None:
    """The same name, other weights: the verifier says what differs, and the connection lives on."""
    with _connected(random_verifier.port) as frames:
        here = WELCOMES[frames]
        assert here.target.keys() == {"model", "adapter", "dtype", "quantization"}
        target = here.target | {name: "another"}
        head = ResumeFrame(**msgspec.structs.asdict(_open()), new_tokens=1, target=target)
        frames.send(MessageType.resume, 1, head, pack_tokens([1, 2]))
        closed = frames.recv().head
        assert closed.reason is Reason.refused
        assert closed.text == (
            f"request must be resumed at its own target: its {name} was another and is {here.target.get(name)}"
        )
        frames.send(MessageType.resume, 1, msgspec.structs.replace(head, target=here.target), pack_tokens([1, 2]))
        assert isinstance(frames.recv().head, VerdictFrame)


def test_ids_without_a_row_refuse_their_text_only(random_verifier: Role) -> None:
    with _connected(random_verifier.port) as frames:
        frames.send(MessageType.open, 1, _open(), pack_tokens([1, 259]))
        closed = frames.recv().head
        assert (closed.reason, closed.text) == (
            Reason.refused,
            "prompt must hold tokens that the target has rows for: ids must be in [0, 259), got 259",
        )
        frames.send(MessageType.open, 2, _open(mode=Mode.target_only), pack_tokens([1, 258]))
        assert isinstance(frames.recv().head, VerdictFrame)


def test_guesses_for_a_text_that_is_not_there_are_dropped(random_verifier: Role) -> None:
    with _connected(random_verifier.port) as frames:
        frames.send(MessageType.draft, 7, DraftFrame(epoch=0, position=2), pack_tokens([1]))
        frames.send(MessageType.close, 7, CloseFrame(reason=Reason.left, text=""))
        frames.send(MessageType.open, 7, _open(mode=Mode.target_only, max_new_tokens=1), pack_tokens([1]))
        assert frames.recv().head.accepted == 0
        assert frames.recv().head.reason is Reason.length


def test_several_texts_on_one_connection(random_verifier: Role) -> None:
    with _connected(random_verifier.port) as frames:
        for number in range(3):
            frames.send(
                MessageType.open, number, _open(mode=Mode.target_only, max_new_tokens=5), pack_tokens([number, 4])
            )
        texts: dict[int, list[int]] = {number: [] for number in range(3)}
        closed = 0
        while closed < 3:
            frame = frames.recv()
            if isinstance(frame.head, CloseFrame):
                closed += 1
            else:
                texts[frame.session] += list(memoryview(frame.body).cast("i"))
        assert [len(ids) for ids in texts.values()] == [5, 5, 5]


@pytest.mark.parametrize("special_tokens", [False, True])
def test_control_tokens_in_a_request_of_the_first_protocol_are_text(special_tokens: bool) -> None:
    words = f"model=random project.special_tokens={str(special_tokens).lower()}"
    settings, tokenizer = compose_settings("spec_decoding", words, SpeculativeSettings), byte_tokenizer()
    ids = _to_ids(settings, tokenizer)(f"a{tokenizer.eos_token}")
    assert (BYTE_EOS in ids) == special_tokens
