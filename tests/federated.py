"""What tests of the federated pillar share: small settings and data, a grid in this process, a search for text."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.models.conversion import byte_tokenizer

CANARY = "kX93-vermilion-otter-Tz71-quartz-Lm08-sundial-Pq55-walrus-Gh26-f"
SMALL = (
    "model=random model.quantization=none model.dtype=float32 device.threads=1 tracking=none "
    "tracking.progress=false project.rounds=2 project.local_steps=2 project.workers=2 "
    "project.reply_timeout_seconds=200 project.data.sequence_length=64 project.data.max_held_out=4 "
    "project.data.held_out_fraction=0.3"  # of few lines each site needs one
)
"""A federation of seconds; a caller adds its data."""


def write_dialogues(path: Path, count: int, answer: str = "") -> Path:
    """A JSONL file of `count` different dialogues, each with `answer` in its response."""
    words = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            prompt = " ".join(words.choices(["river", "stone", "cloud", "paper", "engine", "garden"], k=3))
            response = f"{answer} {words.randrange(10**6)} {number}".strip()
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return path


def spoil(path: Path) -> None:
    """Makes one line of a JSONL file, the longest, no JSON any more."""
    lines = path.read_text().splitlines()
    longest = max(range(len(lines)), key=lambda number: len(lines[number]))
    lines[longest] = lines[longest][:-1]
    path.write_text("\n".join(lines) + "\n")


def on_jsonl(path: Path, num_clients: int, *overrides: str) -> list[str]:
    """Overrides of a small federation over a JSONL file."""
    data = ["project.data.source=jsonl", f"project.data.path={path}", f"project.num_clients={num_clients}"]
    return [*SMALL.split(), *data, *overrides]


def small_settings(path: Path, num_clients: int, *overrides: str) -> FederatedSettings:
    """Typed settings of a small federation over a JSONL file."""
    return compose_settings("fed_learn", " ".join(on_jsonl(path, num_clients, *overrides)), FederatedSettings)


def in_order(ids: list[str]) -> list[str]:
    """Replies in the order in which they were asked for."""
    return ids


class MemoryGrid(Grid):
    """A grid in this process: what is pushed waits until its reply is pulled, and is answered only then.

    `order` sorts what waits; only the first of it can be pulled.
    """

    def __init__(self, partitions: dict[int, int], order: Callable[[list[str]], list[str]] = in_order) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.partitions = partitions
        self.order = order
        self.sent: list[Message] = []
        self.waiting: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent.append(message)
            self.waiting[message.metadata.message_id] = self.carry(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        wanted = set(message_ids)
        while self.waiting and (first := self.order(list(self.waiting))[0]) in wanted:
            message = self.waiting.pop(first)
            answer = self.answer(message, self.partitions[message.metadata.dst_node_id])
            if answer is not None:
                yield self.carry(answer)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    @abstractmethod
    def answer(self, message: Message, partition: int) -> Message | None:
        """The reply of the node with that partition; None when it never comes."""

    def carry(self, message: Message) -> Message:
        """What arrives of a message."""
        return message


class InProcessGrid(MemoryGrid):
    """A client app in this process, behind Flower's own serialisation: messages become bytes and are read from them.

    `wire` keeps those bytes. A client app that raises is answered for as Flower's simulation does.
    """

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        super().__init__({1_000 + 7 * index: index for index in range(num_clients)})
        self.app = app
        self.wire: list[bytes] = []

    def answer(self, message: Message, partition: int) -> Message:
        node_id = message.metadata.dst_node_id
        node_config = {"partition-id": partition, "num-partitions": len(self.partitions)}
        context = Context(1, node_id, node_config, RecordDict(), {})  # type: ignore[arg-type]
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = f"reply to {message.metadata.message_id}"
        return reply

    def carry(self, message: Message) -> Message:
        contents = serialised(message)
        self.wire += contents.values()
        carried = inflate_object_from_contents(message.object_id, dict(contents))
        assert isinstance(carried, Message)
        carried.metadata.__dict__["_message_id"] = message.metadata.message_id  # travels beside the bytes
        return carried


def serialised(message: Message) -> dict[str, bytes]:
    """The message as Flower sends it: every nested object's bytes by its id."""
    return {name: item.deflate() for name, item in get_all_nested_objects(message).items()}


WINDOW = 8  # tokens: whatever holds 15 of the canary's in a row holds one of these windows whole


def leaks(blobs: Iterable[bytes], text: str = CANARY) -> set[str]:
    """In which forms a part of `text` stands in `blobs`: as text, or as token ids of the byte-level tokenizer."""
    needles = dict(forms(text))
    return {form for blob in blobs for form, parts in needles.items() if any(part in blob for part in parts)}


def forms(text: str) -> Iterator[tuple[str, list[bytes]]]:
    """Every form that is searched for, and its windows."""
    ids = byte_tokenizer()(text)["input_ids"]
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    yield "text", [text[start : start + WINDOW].encode() for start in starts]
    windows = [np.asarray(ids[start : start + WINDOW]) for start in starts]
    for kind in ("i4", "i8", "u2", "f2", "f4", "f8"):
        for order in "<>":
            yield order + kind, [window.astype(order + kind).tobytes() for window in windows]
    yield "bfloat16", [(window.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes() for window in windows]
    yield "varint", [b"".join(map(varint, window.tolist())) for window in windows]
    yield "zigzag", [b"".join(varint(2 * token) for token in window.tolist()) for window in windows]
    for separator in (",", ", ", " ", "\n"):
        yield f"decimal{separator!r}", [separator.join(map(str, window)).encode() for window in windows]


def varint(number: int) -> bytes:
    """Protobuf's integer, as Flower writes the lists of a record."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def files_below(*folders: Path) -> Iterator[bytes]:
    """The contents of every file below `folders`."""
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                yield file.read_bytes()
