"""The two frames between a client process of Flower and the warm worker: one message of Flower, and its reply.

    ASK       head: the context of the message; body: the message
    ANSWER    head: the parts of the reply;     body: the reply

A message travels as Flower serialises it: the bytes of all its nested objects, one after the other. Loads no torch.
"""

from enum import IntEnum
from typing import Annotated

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from msgspec import Meta

from lab.wire.endpoint import Deadlines, Endpoint
from lab.wire.frames import Buffer, Head, Limits, MessageKind, MessageTable

MAX_BYTES = 2**31 - 1
Part = tuple[Annotated[str, Meta(max_length=128)], Annotated[int, Meta(ge=0, lt=2**31)]]
"""Id and size of one nested object."""
Value = str | int | float | bool


class Type(IntEnum):
    """The frames' types."""

    ask = 16
    answer = 17


class Ask(Head):
    """A message, and what Flower's Context says about node and run."""

    run_id: int
    node_id: int
    task_id: int
    message_id: str
    node_config: dict[str, Value]
    run_config: dict[str, Value]
    parts: list[Part]


class Answer(Head):
    """The reply to a message."""

    message_id: str
    parts: list[Part]


TABLE = MessageTable(
    {
        Type.ask: MessageKind(head=Ask, max_bytes=MAX_BYTES, has_body=True),
        Type.answer: MessageKind(head=Answer, max_bytes=MAX_BYTES, has_body=True),
    }
)

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 2.0**30
"""A worker computes on the thread that it reads with, so it answers no heartbeat. The system tells when it dies."""


def endpoint(role: str, key: bytes, patience_seconds: float) -> Endpoint:
    """One side of the connection.

    patience_seconds: time limit of handshake and sending. A worker that is busy with another run's message takes no
    connection meanwhile, so a client process has as much patience as its message has time.
    """
    return Endpoint(
        role=role,
        peer_roles=frozenset({"warm worker" if role == "client process" else "client process"}),
        key=key,
        table=TABLE,
        protocol=range(1, 2),
        limits=Limits(handshake_bytes=4096, payload_bytes=MAX_BYTES, backlog_bytes=MAX_BYTES, outgoing_bytes=MAX_BYTES),
        deadlines=Deadlines(
            connect_seconds=CONNECT_SECONDS,
            handshake_seconds=patience_seconds,
            send_seconds=patience_seconds,
            ping_seconds=SILENT_SECONDS / 2,
            dead_seconds=SILENT_SECONDS,
        ),
    )


def packed(message: Message) -> tuple[str, list[Part], list[bytes]]:
    """The id of a message, and the id, size and bytes of each object that it consists of."""
    objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return message.object_id, [(name, len(data)) for name, data in objects.items()], [*objects.values()]


def unpacked(message_id: str, parts: list[Part], body: Buffer) -> Message:
    """The message that `packed` took apart. ValueError for parts that are not those of a message."""
    view, start, contents = memoryview(body), 0, {}
    for name, size in parts:
        contents[name] = bytes(view[start : start + size])
        start += size
    if start != len(view) or message_id not in contents:
        raise ValueError(f"message must consist of its {len(parts)} parts, got {len(view)} bytes for {start}")
    message = inflate_object_from_contents(message_id, contents)
    if not isinstance(message, Message):
        raise ValueError(f"message must be a Message, got {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = message_id  # travels beside the bytes, as in Flower
    return message
