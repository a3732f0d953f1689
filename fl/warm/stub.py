"""The Flower app of a client, in the process that Flower starts for every message: hands the message to a warm worker.

Loads no torch, so it takes about two seconds instead of eight. The worker is started at the first message of a
SuperNode, and again when it has ended; this process ends when the SuperNode does. Without a SuperNode above this
process, with `warm=false` in the run's configuration or in the node's, and for a message that is too large for a frame,
this process does the work itself.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable

from filelock import FileLock
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fl.warm.frames import MAX_BYTES, Answer, Ask, Type, endpoint, packed, unpacked
from fl.warm.place import CODE, Place, Worker
from lab.settings import UserError
from lab.wire.faults import WireError
from lab.wire.frame_socket import FrameSocket

log = logging.getLogger(__name__)

CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode
START_SECONDS = 120.0
"""Time limit for a worker to listen: its imports."""
LOOK_SECONDS = 0.02
TRIES = 3
"""Workers that one message may cost; then it has failed."""
ROOM_BYTES = 2**16


def make_stub(work: Callable[[Message, Context], Message]) -> ClientApp:
    """A ClientApp that answers every message with `work`."""
    client_app = ClientApp()
    client_app.train()(work)
    client_app.evaluate()(work)
    client_app.query()(work)
    return client_app


def answer(message: Message, context: Context) -> Message:
    """The reply of the SuperNode's worker, or that of this process."""
    place = Place.of_this_process()
    if place is not None:
        # Flower offers a reply again and again, also to a SuperNode that has ended. Its own watch looks for the
        # SuperExec between the two, which stays as a zombie where nobody reaps it.
        place.follow()
    if place is None or not is_warm(context):
        return answer_here(message, context)
    try:
        return ask(place, message, context)
    except UserError as error:
        return Message(Error(CLIENT_APP_RAISED, " ".join(str(error).split())), reply_to=message)


def is_warm(context: Context) -> bool:
    """Whether neither the run nor the node wants a process per message."""
    return all(str(config.get("warm", True)).lower() != "false" for config in (context.run_config, context.node_config))


def answer_here(message: Message, context: Context) -> Message:
    """Work on a message in this process."""
    from fl.client_app import app as cold  # loads torch

    return cold(message, context)


def ask(place: Place, message: Message, context: Context) -> Message:
    """Let the worker of a SuperNode answer a message. A worker that dies of it is started again: it keeps no state that
    the reply depends on. UserError for a key that others can read."""
    place.make()
    key = place.key()
    number, parts, body = packed(message)
    if sum(size for _, size in parts) > MAX_BYTES - ROOM_BYTES:
        return answer_here(message, context)
    asked = Ask(
        run_id=context.run_id,
        node_id=context.node_id,
        task_id=TaskIdentity.task_id or 0,
        message_id=number,
        node_config={**context.node_config},
        run_config={**context.run_config},
        parts=parts,
    )
    limit = message.metadata.created_at + message.metadata.ttl
    for left in reversed(range(TRIES)):
        try:
            worker = find_worker(place)
            end = endpoint("client process", key, max(1.0, limit - time.time()))
            with FrameSocket.connect("127.0.0.1", worker.port, end, tls=None) as wire:
                wire.send(Type.ask, 0, asked, *body)
                frame = wire.poll(max(1.0, limit - time.time()))
        except (WireError, OSError) as error:
            if place.is_over() or not left:  # nobody waits for the answer where the SuperNode has ended
                raise
            log.warning("the warm worker is gone (%s); it is started again", error)
            continue
        if frame is None:
            raise UserError("the warm worker must answer within the message's time to live, got nothing")
        assert isinstance(frame.head, Answer)
        return unpacked(frame.head.message_id, frame.head.parts, frame.body)
    raise AssertionError("the last try raises")


def find_worker(place: Place) -> Worker:
    """The running worker with this run's code; started if there is none. OSError if it does not begin in time."""
    with FileLock(place.lock_file, timeout=START_SECONDS, mode=0o600):
        worker = place.worker()
        if worker is not None and worker.code == str(CODE):
            return worker
        if worker is not None and worker.process is not None:  # of an earlier run, with other code
            worker.process.kill()
        place.address_file.unlink(missing_ok=True)
        started = start(place)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and started.poll() is None:
            if (worker := place.worker()) is not None:
                return worker
            time.sleep(LOOK_SECONDS)
        started.kill()
        raise OSError(f"the warm worker did not start within {START_SECONDS:g} s (exit code {started.poll()})")


def start(place: Place) -> "subprocess.Popen[bytes]":
    """A worker for the SuperNode; what it logs goes where the SuperNode's log goes."""
    paths = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "fl.warm", str(place.pid), str(place.created), str(place.folder)],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # it outlives this process, and hears no Ctrl+C of the SuperNode's terminal
    )


app = make_stub(answer)
