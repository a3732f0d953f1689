"""The warm worker beside a SuperNode: the replies of a process per message, from a process that stays."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typing_extensions import override

from fl.adapters import AdapterIndex, PackedAdapter
from fl.messages import ARRAYS, CONFIG, METRICS, SERVER_ROUND, to_records
from fl.server import first_adapter
from fl.settings import FederatedSettings
from fl.warm import __main__ as warm
from fl.warm import stub
from fl.warm.frames import endpoint, packed, unpacked
from fl.warm.place import WATCH_SECONDS, Place, require_private
from lab.command.entry import compose_settings
from lab.command.starts import start_of
from lab.settings import UserError
from lab.wire.faults import WireError
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import Buffer, Frame, Head
from tests.federated import CANARY, SMALL, files_below, leaks, serialised, small_settings, write_dialogues

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
    return Place(process.pid, start_of(psutil.Process(process.pid)), folder)


def context_of(data: Path, *overrides: str, **run_config: Any) -> Context:
    words = [*SMALL.split(), "project.num_clients=1", "project.data.source=jsonl", *overrides]
    config = {"config-name": "fed_learn", "overrides": shlex.join(words), **run_config}
    return Context(7, 9, {"partition-id": 0, "data-path": str(data)}, RecordDict(), config)


def train_message(settings: FederatedSettings, server_round: int) -> Message:
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


CLIENT = """
import time
from flwr.app import Context, RecordDict
from fl.warm import stub
stub.{work} = lambda *arguments: print("at work", flush=True) or time.sleep(600)
stub.answer(None, Context(7, 9, {{}}, RecordDict(), {{"warm": "{warm}"}}))
"""


@pytest.mark.parametrize(("work", "warm"), [("ask", "true"), ("answer_here", "false")])
def test_a_client_process_ends_with_its_supernode_whatever_it_waits_for(tmp_path: Path, work: str, warm: str) -> None:
    program = tmp_path / "flower-supernode"
    program.write_text("import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])")
    command = [sys.executable, str(program), CLIENT.format(work=work, warm=warm)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supernode:
        assert supernode.stdout is not None
        assert supernode.stdout.readline() == b"at work\n"
        client = psutil.Process(supernode.pid)
        try:
            (client,) = client.children()
            time.sleep(2 * WATCH_SECONDS)
            assert client.is_running(), "a negative control: it does not end by itself"
            supernode.kill()
            supernode.wait()
            assert psutil.wait_procs([client], ENDS_WITHIN_SECONDS)[1] == []
        finally:
            supernode.kill()
            with suppress(psutil.NoSuchProcess):
                client.kill()


EXECUTOR = "import os, subprocess, sys; subprocess.run([sys.executable, sys.argv[1], '--parent-pid', str(os.getpid())])"
SUPERNODE = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_client_processes_that_fetch_their_message_end_with_the_supernode(tmp_path: Path) -> None:
    """Nothing of ours runs in them yet: the worker ends them."""
    program = tmp_path / "flwr-clientapp"
    program.write_text("import time; time.sleep(600)")
    other = subprocess.Popen([sys.executable, str(program), "--parent-pid", "1"])
    supernode = subprocess.Popen([sys.executable, "-c", SUPERNODE, EXECUTOR, str(program)])
    place = place_of(supernode, tmp_path / "warm")
    place.make()
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while len(started) < 2:  # the executor and its client
            started = psutil.Process(supernode.pid).children(recursive=True)
            assert time.monotonic() < deadline
        worker = stub.start(place)
        while place.worker() is None:
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        supernode.kill()
        supernode.wait()
        worker.wait(ENDS_WITHIN_SECONDS)
        assert psutil.wait_procs(started[1:], ENDS_WITHIN_SECONDS)[1] == []
        assert other.poll() is None, "that of another SuperNode runs on"
    finally:
        for process in (other, supernode, *started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        supernode.wait()
        other.wait()


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
    return Place(os.getpid(), start_of(psutil.Process()), folder)


def test_a_worker_that_is_too_large_ends_after_its_reply(tmp_path: Path) -> None:
    data, place = tmp_path / "none.jsonl", own_place(tmp_path / "warm")
    message = train_message(compose_settings("fed_learn", SMALL, FederatedSettings), 1)
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
    message = train_message(compose_settings("fed_learn", SMALL, FederatedSettings), 1)
    assert not stub.ask(place, message, context_of(tmp_path)).has_error()
    assert len(asked) == 1


def note(message: Message, context: Context) -> Message:
    """A worker that lets the site's text go."""
    return Message(RecordDict({"note": ConfigRecord({"note": CANARY})}), reply_to=message)


@pytest.mark.timeout(300)
def test_no_frame_and_no_file_of_a_warm_worker_holds_the_sites_text(
    tmp_path: Path,
    supernode: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = write_dialogues(tmp_path / "own.jsonl", 20, CANARY)
    place, frames = place_of(supernode, tmp_path / "warm"), bytearray()

    class Watched(FrameSocket):
        @override
        def send(self, number: int, session: int, head: Head, *body: Buffer) -> None:
            frames.extend(b"".join([msgspec.json.encode(head), *body]))
            super().send(number, session, head, *body)

        @override
        def poll(self, timeout_seconds: float) -> Frame | None:
            if (frame := super().poll(timeout_seconds)) is not None:
                frames.extend(msgspec.json.encode(frame.head) + bytes(frame.body))
            return frame

    monkeypatch.setattr(stub, "FrameSocket", Watched)
    context = context_of(data, f"model.cache_dir={tmp_path / 'models'}")
    message = train_message(small_settings(data, 1), 1)
    adapter, _ = result(stub.ask(place, message, context))
    assert adapter in frames, "every byte of a frame was seen"
    assert not leaks([frames])
    assert not leaks(files_below(place.folder, tmp_path / "models"))
    output = capfd.readouterr()
    assert not leaks([output.out.encode(), output.err.encode()])

    leaking = own_place(tmp_path / "leaking")
    Serving(leaking, note)
    stub.ask(leaking, message, context)
    assert "text" in leaks([frames])
    assert "text" in leaks(files_below(tmp_path)), "it is in the site's own file"


def test_place_and_worker_stay_when_the_clock_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: ["flower-supernode"])
    place = Place.of_this_process()
    assert place is not None
    place.make()
    place.announce(1)
    worker = place.worker()
    assert worker is not None
    set_clock(5.0)
    assert Place.of_this_process() == place
    assert place.worker() == worker
    assert not place.is_over()


def files_of(place: Place) -> set[Path]:
    """One file of every kind that a place has."""
    place.folder.mkdir(mode=0o700, exist_ok=True)
    unfinished = [place.folder / f".{place.name}.7", place.folder / f".{place.name}.json.7"]
    files = {place.key_file, place.address_file, place.lock_file, *unfinished}
    for file in files:
        file.touch()
    return files


def test_files_of_supernodes_that_have_ended_go_when_the_next_place_is_made(
    tmp_path: Path, supernode: subprocess.Popen[bytes]
) -> None:
    place, folder = own_place(tmp_path / "warm"), tmp_path / "warm"
    living = files_of(place_of(supernode, folder))
    ended = files_of(Place(place.pid, place.created - 10, folder))  # its number has come again
    other = folder / "notes-7.txt"
    other.touch()
    place.make()
    assert {*folder.iterdir()} == living | {other, place.key_file}
    supernode.kill()
    supernode.wait()
    place.make()
    assert living < {*folder.iterdir()}, "only a new place looks"
    place.remove()
    place.make()
    assert {*folder.iterdir()} == {other, place.key_file}
    assert not any(file.exists() for file in ended)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users of files")
def test_files_of_other_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, user = own_place(tmp_path / "warm"), os.getuid()
    theirs = files_of(Place(place.pid, place.created - 10, place.folder))
    monkeypatch.setattr("fl.warm.place.require_private", lambda path: None)
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    place.make()
    assert theirs < {*place.folder.iterdir()}


def test_a_key_that_cannot_be_named_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError("this file system has no links")

    place = own_place(tmp_path / "warm")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PermissionError):
        place.make()
    assert list(place.folder.iterdir()) == []


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
    message = train_message(compose_settings("fed_learn", SMALL, FederatedSettings), 1)
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
    message = train_message(compose_settings("fed_learn", SMALL, FederatedSettings), 3)
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
