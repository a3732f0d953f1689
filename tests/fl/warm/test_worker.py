"""The warm worker beside a SuperNode: the replies of a process per message, from a process that stays."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import PackedAdapter
from fl.messages import ARRAYS, CONFIG, METRICS, SERVER_ROUND, to_records
from fl.server import first_adapter
from fl.settings import FederatedSettings
from fl.warm import __main__ as warm
from fl.warm import stub
from fl.warm.frames import endpoint, packed, unpacked
from fl.warm.place import Place, require_private
from lab.command.entry import compose_settings
from lab.settings import UserError
from lab.wire.faults import WireError
from lab.wire.frame_socket import FrameSocket
from tests.federated import serialised, small_settings, write_dialogues

ENDS_WITHIN_SECONDS = 60.0


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@pytest.fixture
def supernode() -> Iterator[subprocess.Popen[bytes]]:
    """A process for a worker to follow."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def place_of(process: subprocess.Popen[bytes], folder: Path) -> Place:
    return Place(process.pid, psutil.Process(process.pid).create_time(), folder)


def context_of(data: Path, *overrides: str, **run_config: Any) -> Context:
    words = [*small_words(), "project.num_clients=1", "project.data.source=jsonl", *overrides]
    config = {"config-name": "fed_learn", "overrides": shlex.join(words), **run_config}
    return Context(7, 9, {"partition-id": 0, "data-path": str(data)}, RecordDict(), config)


def small_words() -> list[str]:
    from tests.federated import SMALL

    return SMALL.split()


def train_message(settings: FederatedSettings, server_round: int) -> Message:
    from fl.adapters import AdapterIndex

    adapter = first_adapter(settings)
    content = to_records(PackedAdapter.pack(adapter, AdapterIndex.of(adapter, settings.project.wire_dtype)))
    content[CONFIG] = ConfigRecord({SERVER_ROUND: server_round})
    message = Message(content, 9, "train", ttl=300.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def result(reply: Message) -> tuple[bytes, float]:
    """The trained adapter and its loss: all of a reply that is not time or memory."""
    assert not reply.has_error(), reply.error
    arrays, metrics = reply.content[ARRAYS], reply.content[METRICS]
    assert isinstance(metrics, MetricRecord)
    return arrays["adapter"].data, float(str(metrics["train_loss"]))  # type: ignore[index, union-attr]


@pytest.mark.timeout(300)
def test_a_worker_gives_the_same_bytes_lives_on_and_is_replaced_when_it_dies(
    tmp_path: Path, supernode: subprocess.Popen[bytes]
) -> None:
    data = write_dialogues(tmp_path / "own.jsonl", 20)
    settings, context = small_settings(data, 1), context_of(data)
    place = place_of(supernode, tmp_path / "warm")
    messages = [train_message(settings, number) for number in (1, 2)]
    here = [result(stub.answer_here(message, context)) for message in messages]
    assert here[0] != here[1], "a negative control: the replies depend on the message"
    assert result(stub.ask(place, messages[0], context)) == here[0]
    first = place.worker()
    assert first is not None
    assert result(stub.ask(place, messages[1], context)) == here[1]
    assert place.worker() == first, "the same process"
    assert result(stub.ask(place, messages[0], context)) == here[0], "whatever it has done before"

    assert first.process is not None
    stopper = threading.Timer(0.05, first.process.kill)
    stopper.start()
    assert result(stub.ask(place, messages[1], context)) == here[1], "killed before or while it worked"
    stopper.join()
    replies = [result(stub.ask(place, message, context)) for message in messages]
    second = place.worker()
    assert second is not None
    assert second.pid != first.pid
    assert replies == here

    assert second.process is not None
    following = second.process
    supernode.kill()
    supernode.wait()
    following.wait(ENDS_WITHIN_SECONDS)
    assert list((tmp_path / "warm").iterdir()) == [], "its key is gone too"


class Serving:
    """A worker in a thread of this process, with `work` of its own."""

    def __init__(self, place: Place, work: Any) -> None:
        place.make()
        self.thread = threading.Thread(target=warm.serve, args=[place, work], daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while place.worker() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict({METRICS: MetricRecord({"ttl": message.metadata.ttl})}), reply_to=message)


def own_place(folder: Path) -> Place:
    return Place(os.getpid(), psutil.Process().create_time(), folder)


def test_a_worker_that_is_too_large_ends_after_its_reply(tmp_path: Path) -> None:
    data, place = tmp_path / "none.jsonl", own_place(tmp_path / "warm")
    message = train_message(compose_settings("fed_learn", small_words(), FederatedSettings), 1)
    serving = Serving(place, echo)
    assert stub.ask(place, message, context_of(data)).content[METRICS] == MetricRecord({"ttl": 300.0})
    assert place.worker() is not None
    stub.ask(place, message, context_of(data, "project.warm_limit_bytes=1000"))
    serving.thread.join(30)
    assert not serving.thread.is_alive()
    assert place.worker() is None


def test_strangers_get_nothing_and_the_worker_goes_on(tmp_path: Path) -> None:
    place, asked = own_place(tmp_path / "warm"), []
    Serving(place, lambda message, context: asked.append(message) or echo(message, context))
    worker = place.worker()
    assert worker is not None
    with pytest.raises(WireError):
        FrameSocket.connect("127.0.0.1", worker.port, endpoint("client process", b"0" * 64, 5.0), tls=None)
    assert asked == []
    message = train_message(compose_settings("fed_learn", small_words(), FederatedSettings), 1)
    assert not stub.ask(place, message, context_of(tmp_path)).has_error()
    assert len(asked) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("which", ["key", "folder"])
def test_a_key_that_others_can_read_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    place = own_place(tmp_path / "warm")
    monkeypatch.setattr(Place, "of_this_process", classmethod(lambda cls: place))
    monkeypatch.setattr(stub, "find_worker", lambda place: pytest.fail("it was not refused"))
    place.make()
    assert place.key_file.stat().st_mode & 0o777 == 0o600
    require_private(place.key_file)
    (place.key_file if which == "key" else place.folder).chmod(0o750 if which == "folder" else 0o640)
    message = train_message(compose_settings("fed_learn", small_words(), FederatedSettings), 1)
    reply = stub.answer(message, context_of(tmp_path))
    assert reply.has_error()
    reason = str(reply.error.reason)
    assert reason.startswith("the key of the warm worker must be readable by its owner alone, got ")
    assert "\n" not in reason
    with pytest.raises(UserError, match="readable by its owner alone"):
        place.key()


@pytest.mark.parametrize(
    ("run", "node", "expected"),
    [
        ({}, {}, True),
        ({"warm": False}, {}, False),
        ({}, {"warm": "false"}, False),
        ({"warm": True}, {"warm": True}, True),
    ],
)
def test_run_and_node_can_each_say_no(run: dict[str, Any], node: dict[str, Any], expected: bool) -> None:
    assert stub.is_warm(Context(1, 1, node, RecordDict(), run)) is expected


def test_a_message_is_read_as_it_was_written() -> None:
    message = train_message(compose_settings("fed_learn", small_words(), FederatedSettings), 3)
    number, parts, body = packed(message)
    again = unpacked(number, parts, b"".join(body))
    assert serialised(again) == serialised(message)
    assert again.metadata.message_id == number
    with pytest.raises(ValueError, match="message must consist of its"):
        unpacked(number, parts[:-1], b"".join(body))


def test_the_stub_loads_no_torch() -> None:
    code = "import sys, fl.warm.stub; print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
