"""Wrong requests of every kind, beside clients that mean well: these get their own texts, and the verifier lives."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import psutil

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.conversion import BYTE_EOS
from lab.models.sources import load_model, load_tokenizer_only
from lab.wire.endpoint import Endpoint
from lab.wire.faults import WireError
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import MAGIC, Head
from lab.wire.tokens import pack_tokens
from speculative.acceptance import until_end
from speculative.drafter.loop import speculate
from speculative.drafter.target import join
from speculative.drafts import NgramDrafts
from speculative.messages import (
    AskVocabularyFrame,
    CachedFrame,
    CloseFrame,
    DraftFrame,
    MessageType,
    OpenFrame,
    Reason,
    ResumeFrame,
    ScoresFrame,
    VerdictFrame,
    VocabularyFrame,
    WaitingFrame,
    WelcomeFrame,
)
from speculative.request import GenerationRequest
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.speculative.in_process import decoded_alone, local_engine
from tests.speculative.serving_here import client_endpoint, connected, first_protocol

GOOD = 4
GOOD_TOKENS = 40
ANSWER_SECONDS = 30.0
LARGEST_GROWTH_BYTES = 10 * 10**6
ROWS = 259


@dataclass
class Misuse:
    """What came of it."""

    wrong: int = 0
    kinds: int = 0
    unanswered: list[str] = field(default_factory=list)
    """Kinds whose connection the verifier neither answered nor closed."""
    good_texts: int = 0
    good_tokens: int = 0
    same_texts: bool = True
    lives: bool = False
    rss_growth_bytes: int = 0


@dataclass
class Ground:
    """Where the wrong requests go."""

    port: int
    endpoint: Endpoint
    draws: random.Random

    def open(self, **changes: Any) -> OpenFrame:
        """A request that is right but for the changes."""
        values: dict[str, Any] = {
            "seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logit_rules": None, "top_tokens": 0,
            "max_new_tokens": 20, "threshold": None,
            "name": self.draws.getrandbits(64), "owner": bytes(16), "mode": Mode.target_only, "draft_length": 5,
            "report": False, "logprobs": False,
        }  # fmt: skip
        return OpenFrame(**values | changes)

    def raw(self, data: bytes) -> None:
        """Bytes that are no frame; waits for the end of the connection."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS)
        with client, contextlib.suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(2**16):
                pass

    def frames(self, *frames: tuple[MessageType, int, Head, bytes], endpoint: Endpoint | None = None) -> None:
        """Frames on one connection; waits until it ends, or its first text does."""
        client = connected(self.port, endpoint or self.endpoint)
        with client, contextlib.suppress(WireError):
            for number, session, head, body in frames:
                client.send(number, session, head, body)
            while not _is_end(client):
                pass

    def opened(self, ids: Sequence[int] = (1, 2), *after: tuple[MessageType, int, Head, bytes], **changes: Any) -> None:
        """A text with something wrong about it, or about what comes behind it."""
        self.frames((MessageType.open, 1, self.open(**changes), pack_tokens(ids)), *after)

    def drafted(self, guesses: Sequence[int], epoch: int = 0, position: int = 2) -> None:
        """Guesses that are wrong."""
        draft = (MessageType.draft, 1, DraftFrame(epoch=epoch, position=position), pack_tokens(guesses))
        self.opened((1, 2), draft, mode=Mode.sync)


def _is_end(client: FrameSocket) -> bool:
    frame = client.poll(ANSWER_SECONDS)
    if frame is None:
        raise TimeoutError
    return isinstance(frame.head, CloseFrame | VocabularyFrame)


def _resumed(ground: Ground, ids: Sequence[int], new_tokens: int, **changes: Any) -> None:
    target = changes.pop("target", {})
    head = ResumeFrame(**msgspec.structs.asdict(ground.open(**changes)), new_tokens=new_tokens, target=target)
    ground.frames((MessageType.resume, 1, head, pack_tokens(ids)))


def _twice(ground: Ground) -> None:
    frame = (MessageType.open, 1, ground.open(), pack_tokens([1]))
    ground.frames(frame, frame)


def _many(ground: Ground) -> None:
    opens = [(MessageType.open, number, ground.open(), pack_tokens([1])) for number in range(40)]
    ground.frames(*opens)


def _same_name(ground: Ground) -> None:
    head = ground.open(name=1, mode=Mode.sync)
    ground.frames(*((MessageType.open, number, head, pack_tokens([1])) for number in (1, 2)))


def _of_a_verifier(head: Head, number: MessageType) -> Callable[[Ground], None]:
    return lambda ground: ground.frames((number, 1, head, b""))


def _torn(ground: Ground) -> None:
    ground.frames((MessageType.open, 1, ground.open(), b"abc"))


def _leaves_in_a_frame(ground: Ground) -> None:
    client = connected(ground.port, ground.endpoint)
    client._socket.setblocking(True)
    client._socket.sendall(MAGIC + bytes(8))
    client.close()


def _leaves_in_a_text(ground: Ground) -> None:
    client = connected(ground.port, ground.endpoint)
    client.send(MessageType.open, 1, ground.open(max_new_tokens=900), pack_tokens([1] * 50))
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _leaves_in_a_first_protocol_text(ground: Ground) -> None:
    with socket.create_connection(("127.0.0.1", ground.port), timeout=ANSWER_SECONDS) as client:
        client.sendall(first_protocol("a text that nobody waits for"))


def _asks_twice(ground: Ground) -> None:
    ask = (MessageType.ask_vocabulary, 0, AskVocabularyFrame(), b"")
    ground.frames(ask, ask)


def _another(**changes: Any) -> Callable[[Ground], None]:
    """A client with another key, role or version."""

    def shake(ground: Ground) -> None:
        with contextlib.suppress(WireError):
            connected(ground.port, replace(ground.endpoint, **changes)).close()

    return shake


VERDICT = VerdictFrame(epoch=0, position=0, accepted=0, prefix=0)
WELCOME = WelcomeFrame(
    model="", dtype="", vocabulary_size=1, context=1, max_draft_length=1, window=1, end_ids=[], target={}
)
KINDS: dict[str, Callable[[Ground], None]] = {
    "v0: longer than may be": lambda ground: ground.raw(struct.pack("!I", 2**31)),
    "v0: no UTF-8": lambda ground: ground.raw(struct.pack("!I", 2) + b"\xff\xff"),
    "v0: no text": lambda ground: ground.raw(first_protocol("")),
    "v0: beyond the context": lambda ground: ground.raw(first_protocol("x" * 5000)),
    "v0: cut off": lambda ground: ground.raw(first_protocol("hello")[:7]),
    "v0: left": _leaves_in_a_first_protocol_text,
    "v0: half-closed": lambda ground: ground.raw(first_protocol("hello")),
    "no protocol": lambda ground: ground.raw(b"GET / HTTP/1.1\r\n\r\n"),
    "noise": lambda ground: ground.raw(ground.draws.randbytes(5000)),
    "nothing": lambda ground: ground.raw(b""),
    "frame: noise": lambda ground: ground.raw(MAGIC + ground.draws.randbytes(500)),
    "frame: another key": _another(key=b"k" * 32),
    "frame: another role": _another(role="shard"),
    "frame: another version": _another(protocol=range(1, 2)),
    "frame: another tokenizer": lambda ground: ground.frames(
        (MessageType.open, 1, ground.open(), pack_tokens([1])),
        endpoint=replace(ground.endpoint, fingerprints={"tokenizer": "x"}),
    ),
    "frame: left within": _leaves_in_a_frame,
    "open: left": _leaves_in_a_text,
    "open: no prompt": lambda ground: ground.opened(()),
    "open: id without a row": lambda ground: ground.opened((1, ROWS)),
    "open: largest id": lambda ground: ground.opened((2**31 - 1,)),
    "open: negative id": lambda ground: ground.opened((1, -1)),
    "open: prompt beyond the context": lambda ground: ground.opened([1] * 2000),
    "open: longest prompt": lambda ground: ground.opened([1] * 2**16),
    "open: no new tokens": lambda ground: ground.opened(max_new_tokens=0),
    "open: new tokens beyond the context": lambda ground: ground.opened(max_new_tokens=2**32 - 1),
    "open: top_p 0": lambda ground: ground.opened(top_p=0.0),
    "open: top_p NaN": lambda ground: ground.opened(top_p=float("nan")),
    "open: temperature -1": lambda ground: ground.opened(temperature=-1.0),
    "open: temperature NaN": lambda ground: ground.opened(temperature=float("nan")),
    "open: temperature infinite": lambda ground: ground.opened(temperature=float("inf")),
    "open: temperature tiny": lambda ground: ground.opened(temperature=5e-324, seed=2**63 - 1),
    "open: threshold NaN": lambda ground: ground.opened(threshold=float("nan")),
    "open: threshold infinite": lambda ground: ground.opened(threshold=float("-inf")),
    "open: longest drafts": lambda ground: ground.opened(draft_length=2**32 - 1, mode=Mode["async"]),
    "open: largest k": lambda ground: ground.opened(top_k=2**32 - 1, temperature=1.0),
    "open: torn ids": _torn,
    "open: twice": _twice,
    "open: a name twice": _same_name,
    "open: more texts than may be": _many,
    "resume: another target": lambda ground: _resumed(ground, [1, 2], 1, target={"model": "x"}),
    "resume: more new than all": lambda ground: _resumed(ground, [1, 2], 3),
    "resume: ids without a row": lambda ground: _resumed(ground, [1, ROWS], 1),
    "draft: another epoch": lambda ground: ground.drafted([1], epoch=7),
    "draft: before the text": lambda ground: ground.drafted([1], position=0),
    "draft: beyond the text": lambda ground: ground.drafted([1], position=2**32 - 1),
    "draft: id without a row": lambda ground: ground.drafted([1, ROWS]),
    "draft: negative id": lambda ground: ground.drafted([-5]),
    "draft: too long": lambda ground: ground.drafted([1] * 64),
    "draft: of no text": lambda ground: ground.frames(
        (MessageType.draft, 9, DraftFrame(epoch=0, position=0), pack_tokens([1])),
        (MessageType.close, 9, CloseFrame(reason=Reason.left, text="x" * 1000), b""),
        (MessageType.open, 1, ground.open(max_new_tokens=1), pack_tokens([1])),
    ),
    "sent VERDICT": _of_a_verifier(VERDICT, MessageType.verdict),
    "sent SCORES": _of_a_verifier(
        ScoresFrame(position=0, draft_tokens=0, margins=0, logprobs=0, top_tokens=0), MessageType.scores
    ),
    "sent WELCOME": _of_a_verifier(WELCOME, MessageType.welcome),
    "sent WAITING": _of_a_verifier(WaitingFrame(place=1), MessageType.waiting),
    "sent CACHED": _of_a_verifier(CachedFrame(tokens=1), MessageType.cached),
    "asked for the vocabulary twice": _asks_twice,
}


def misuse(port: int, pid: int, words: Sequence[str], wrong: int, seed: int) -> Misuse:
    """So many wrong requests, every kind in turn, three at once, at a verifier of `model=random`, beside four clients
    that have one text after the other.

    Args:
        port: Of the verifier.
        pid: Its process.
        words: Its settings.
        wrong: How many.
        seed: Of what is random.
    """
    settings = compose_settings("spec_decoding", " ".join(words), SpeculativeSettings)
    settings = replace(settings, network=replace(settings.network, port=port))
    process = psutil.Process(pid)
    came = Misuse(wrong=wrong, kinds=min(wrong, len(KINDS)))
    endpoint = client_endpoint(settings)
    alone = local_engine(load_model(settings.model, open_device(settings.device)).model, 1, context=1024)
    names = token_texts(load_tokenizer_only(settings.model))
    with ThreadPoolExecutor(GOOD) as pool:  # the cache of so many texts at once is there from now on
        list(pool.map(lambda seed_of_text: _good_text(settings, names, seed_of_text), range(GOOD)))
    before = process.memory_info().rss
    is_over = threading.Event()

    def do(number: int) -> None:
        name = list(KINDS)[number % len(KINDS)]
        try:
            KINDS[name](Ground(port, endpoint, random.Random(seed * 10**6 + number)))
        except TimeoutError:
            came.unanswered.append(name)

    with ThreadPoolExecutor(GOOD + 3) as pool:
        good = [pool.submit(_good_texts, settings, names, number, is_over) for number in range(GOOD)]
        try:
            list(pool.map(do, range(wrong)))
        finally:
            is_over.set()
        texts = [text for job in good for text in job.result()]
    time.sleep(0.2)
    came.rss_growth_bytes = process.memory_info().rss - before
    came.lives = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    own = {number: _own(alone, number) for number in {number for number, _ in texts}}
    came.same_texts = all(ids == own[number] for number, ids in texts)
    came.good_texts, came.good_tokens = len(texts), sum(len(ids) for _, ids in texts)
    return came


def _request(number: int) -> GenerationRequest:
    draws = random.Random(number)
    return GenerationRequest(
        prompt_ids=[draws.randrange(256) for _ in range(20)],
        sampling=Sampling(seed=number, temperature=1.0, top_k=50, top_p=0.95),
        max_new_tokens=GOOD_TOKENS,
        mode=Mode["async"],
        threshold=None,
    )


def _good_text(settings: SpeculativeSettings, names: list[str], number: int) -> list[int]:
    with join(settings, names) as target:
        rounds = speculate(target, NgramDrafts(3, 1), _request(number), [BYTE_EOS])
        return [token for done in rounds for token in done.tokens]


def _good_texts(
    settings: SpeculativeSettings, names: list[str], number: int, is_over: threading.Event
) -> list[tuple[int, list[int]]]:
    """At least one, and the next as long as there are wrong requests."""
    texts = [(number, _good_text(settings, names, number))]
    while not is_over.is_set():
        texts.append((number, _good_text(settings, names, number)))
    return texts


def _own(alone: LocalEngine, number: int) -> list[int]:
    request = _request(number)
    ids = decoded_alone(alone, request.prompt_ids, request.sampling, request.max_new_tokens)
    return until_end(ids, frozenset({BYTE_EOS}))
