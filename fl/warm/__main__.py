"""The warm worker beside a SuperNode: answers the messages that client processes hand it, and keeps model and data.

Started by `fl.warm.stub`: `python -m fl.warm <pid of the SuperNode> <its start> <folder>`. It ends when the SuperNode
does, and after a reply that leaves it larger than `project.warm_limit_bytes`. What it computes does not depend on the
messages that it has answered before, so a new worker gives the same replies.
"""

import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl.client_app import app, log_beside_flower, settings_from_run
from fl.warm.frames import Answer, Ask, Type, endpoint, packed, unpacked
from fl.warm.place import Place
from lab.command.entry import for_owner_alone
from lab.settings import UserError
from lab.wire.faults import Peer, PeerGone, WireError
from lab.wire.frame_socket import FrameSocket

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
"""Time limit of a client process for its handshake, for its message, and to take the reply."""


def serve(place: Place, work: Callable[[Message, Context], Message] = app) -> None:
    """Answer messages, one after the other, until the process is too large."""
    key = place.key()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place.announce(listener.getsockname()[1])
        while True:
            connected, address = listener.accept()
            peer = Peer(role="client process", address=f"{address[0]}:{address[1]}", phase="handshake")
            try:
                with FrameSocket(
                    connected, endpoint("warm worker", key, PATIENCE_SECONDS), peer, listening=True
                ) as wire:
                    asked = _answer(wire, work)
            except WireError as error:  # a client process that was killed, or a stranger without the key
                log.info("%s", error)
                continue
            if asked is not None and is_too_large(asked):
                place.address_file.unlink(missing_ok=True)
                return


def _answer(wire: FrameSocket, work: Callable[[Message, Context], Message]) -> Ask | None:
    frame = wire.poll(wire.endpoint.deadlines.handshake_seconds)
    if frame is None or not isinstance(frame.head, Ask):
        return None
    asked = frame.head
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = asked.task_id, asked.run_id, asked.node_id
    message = unpacked(asked.message_id, asked.parts, frame.body)
    number, parts, body = packed(work(message, context_of(asked)))
    wire.send(Type.answer, 0, Answer(message_id=number, parts=parts), *body)
    with suppress(PeerGone):  # it closes first: closing a socket with unread heartbeats would discard the reply
        wire.poll(wire.endpoint.deadlines.send_seconds)
    return asked


def context_of(asked: Ask) -> Context:
    """Flower's context of a message."""
    return Context(
        run_id=asked.run_id,
        node_id=asked.node_id,
        node_config={**asked.node_config},
        state=RecordDict(),
        run_config={**asked.run_config},
    )


def is_too_large(asked: Ask) -> bool:
    """Whether this process has grown beyond what the run allows it."""
    import psutil

    try:
        limit = settings_from_run(context_of(asked)).project.warm_limit_bytes
    except UserError:  # the reply has said so
        return False
    size: int = psutil.Process().memory_info().rss
    if size > limit:
        log.info("the warm worker ends: it has %d bytes, project.warm_limit_bytes is %d", size, limit)
    return bool(size > limit)


def main(arguments: list[str]) -> None:
    """Run a worker until its SuperNode ends."""
    place = Place(int(arguments[0]), int(arguments[1]), Path(arguments[2]))
    place.follow()
    with for_owner_alone():
        log_beside_flower()
        serve(place)


if __name__ == "__main__":
    main(sys.argv[1:])
