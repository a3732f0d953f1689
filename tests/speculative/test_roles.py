"""Verifier and drafter as real processes: texts, last lines, both protocols, Ctrl+C, faults, what users get wrong."""

from __future__ import annotations

import functools
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from lab.command.entry import Run, compose_settings
from lab.device import open_device
from lab.engine.sampling import Sampling
from lab.faults import EndedBy, Fault
from lab.models.conversion import BYTE_EOS
from lab.models.sources import LoadedModel, load_model
from lab.settings import UserError
from lab.text.grammars import Grammars
from lab.text.logit_rules import LogitRules
from lab.wire.faults import PeerGone, PeerMismatch, TlsRefused
from speculative.acceptance import until_end
from speculative.drafter.connection import VerifierConnection
from speculative.drafter.loop import RequestFailed, speculate
from speculative.drafter.target import RemoteTarget, join
from speculative.drafts import NgramDrafts, RandomDrafts
from speculative.messages import WelcomeFrame
from speculative.request import Outcome, Verdict
from speculative.settings import Mode, SpeculativeSettings
from speculative.verifier import __main__ as verifier_role
from speculative.vocabulary import token_texts
from tests.schemas import PERSON, is_valid
from tests.speculative.in_process import decoded_alone, local_engine, request
from tests.speculative.processes import END_SECONDS, RANDOM, Role, drafted, drafter_process, verifier, wait_until

PROMPT = "def add(a, b):\n    return a"
NEEDED = {
    *("status", "text", "token_ids", "new_tokens", "tokens_per_second", "ms_per_token_p50"),
    *("time_to_first_token_seconds", "alpha", "alpha_by_position", "mean_accepted_length", "draft_waste"),
    *("rtt_seconds", "bytes_sent", "bytes_received", "predicted_tokens_per_second"),
    *("epochs", "resumes", "drafts_sent", "drafts_stale"),
}
SAMPLING = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
SAMPLED = ("project.temperature=1.0", "seed=7", "project.top_k=60", "project.top_p=0.98")


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _settings() -> SpeculativeSettings:
    return compose_settings("spec_decoding", " ".join(RANDOM), SpeculativeSettings)


@functools.cache
def _target() -> LoadedModel:
    return load_model(_settings().model, open_device(_settings().device))


def _own_text(prompt: str, sampling: Sampling, count: int) -> list[int]:
    """The target's text by a loop of our own, without any verifier."""
    loaded = _target()
    ids = list(loaded.tokenizer(prompt)["input_ids"])
    engine = local_engine(loaded.model, sessions=1, grammars=Grammars(lambda: (loaded.tokenizer, (BYTE_EOS,))))
    return until_end(decoded_alone(engine, ids, sampling, count), frozenset({BYTE_EOS}))


EVERY_DRAFT = ("project.mode=sync", "project.draft.length=4")
"""The target waits for each draft: in mode async it may be done before the first arrives, so nothing can be counted."""


@pytest.mark.parametrize(
    "source",
    [
        ("project.draft.source=ngram",),
        ("project.draft.source=random", "project.draft.length=16"),
        ("project.draft.source=none",),
        ("project.draft.source=layers", "project.draft.layers=3", "project.draft.length=3"),
        ("project.draft.source=noisy", "project.draft.noise=0.05"),
        ("project.draft.source=model", "project.draft.model=random", "project.draft.dtype=bfloat16", *EVERY_DRAFT),
        ("project.mode=target_only",),
    ],
    ids=lambda words: words[0].rpartition("=")[2],
)
def test_every_source_gives_the_targets_own_text(
    random_verifier: Role, source: tuple[str, ...], tmp_path: Path
) -> None:
    sampling = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
    result = drafted(random_verifier.port, (*RANDOM, *SAMPLED, *source, "project.max_new_tokens=40"), tmp_path)
    assert result["token_ids"] == _own_text(PROMPT, sampling, 40)
    if source[0].endswith("=model"):
        assert result["alpha"] > 0.8, "bfloat16 weights of the target itself"


WORDS = (
    *("project.min_p=0.02", "project.repetition_penalty=1.2", "project.presence_penalty=0.1"),
    *("project.frequency_penalty=0.1", "project.logit_bias={101:0.3,32:-0.2}", "project.bad_words=[e,in]"),
)


def _with_words(prompt: str) -> Sampling:
    words = LogitRules(
        prompt_tokens=len(prompt),
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias=((101, 0.3), (32, -0.2)),
        bad_words=tuple(tuple(word) for word in (b" e", b"e", b" in", b"in")),
    )
    return Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98, min_p=0.02, logit_rules=words)


def test_logit_rules_and_a_stop_string_over_the_wire(random_verifier: Role, tmp_path: Path) -> None:
    words = (*RANDOM, *SAMPLED, *WORDS, *EVERY_DRAFT, "project.draft.source=layers", "project.draft.layers=3")
    expected = _own_text(PROMPT, _with_words(PROMPT), 40)
    result = drafted(random_verifier.port, (*words, "project.max_new_tokens=40"), tmp_path / "whole")
    assert result["token_ids"] == expected
    assert 101 not in expected
    assert result["drafts_accepted"] > 0
    plain = drafted(random_verifier.port, (*RANDOM, *SAMPLED, "project.max_new_tokens=40"), tmp_path / "plain")
    assert plain["token_ids"] != expected

    tokenizer = _target().tokenizer
    at = next(place for place in range(8, 30) if all(32 < token < 127 for token in expected[place : place + 1]))
    stop = str(tokenizer.decode(expected[at : at + 1]))
    stopped = drafted(
        random_verifier.port,
        (*words, "project.max_new_tokens=40", "project.check=true", f'project.stop="{stop}"'),
        tmp_path,
    )
    whole = str(tokenizer.decode(expected, skip_special_tokens=True))
    assert (stopped["ended_by"], stopped["text"]) == ("stop", whole[: whole.index(stop)])
    assert stopped["token_ids"] == expected[: len(stopped["token_ids"])]
    assert stop not in tokenizer.decode(stopped["token_ids"])
    assert stopped["flips"] == []


@pytest.mark.parametrize("source", ["ngram", "model"])
def test_json_under_a_schema_over_the_wire(random_verifier: Role, tmp_path: Path, source: str) -> None:
    """Forced tokens are draft tokens of the drafter, and of the verifier's own."""
    words = ("project.draft.model=random", f"project.draft.source={source}", "project.max_new_tokens=130")
    sampled = replace(SAMPLING, logit_rules=LogitRules(prompt_tokens=len(PROMPT), schema=json.dumps(PERSON)))
    result = drafted(
        random_verifier.port, (*RANDOM, *SAMPLED, *words, f"project.schema={json.dumps(PERSON)}"), tmp_path
    )
    expected = _own_text(PROMPT, sampled, 130)
    assert result["token_ids"] == expected
    assert expected[-1] == BYTE_EOS
    assert is_valid(result["text"], PERSON)
    with pytest.raises(UserError, match=r"^project\.schema must be one that llguidance can compile, got: Invalid type"):
        drafted(random_verifier.port, (*RANDOM, 'project.schema={"type": "zzz"}'), tmp_path)


def test_a_drawn_seed_is_said_and_draws_the_same_again(random_verifier: Role, tmp_path: Path) -> None:
    words = (*RANDOM, "project.temperature=1.0", "project.max_new_tokens=20")
    drawn = drafted(random_verifier.port, (*words, "seed=-1"), tmp_path / "drawn")
    again = drafted(random_verifier.port, (*words, f"seed={drawn['seed']}"), tmp_path / "again")
    assert again["token_ids"] == drawn["token_ids"]
    with pytest.raises(
        UserError, match=r"^seed must be the one that the text was begun with for project.resume, got -1$"
    ):
        drafted(random_verifier.port, (*words, "seed=-1", "project.resume=text.json"), tmp_path)


def test_a_text_may_fill_the_context(random_verifier: Role, tmp_path: Path) -> None:
    words = (*RANDOM, "project.max_new_tokens=-1")
    result = drafted(random_verifier.port, words, tmp_path, "x" * 1015)
    assert result["new_tokens"] == 9 or result["ended_by"] == "end_token"
    with pytest.raises(UserError, match=r"^prompt must leave room in the context of 1024 tokens, got 1024$"):
        drafted(random_verifier.port, words, tmp_path, "x" * 1024)


def test_logit_rules_with_ids_that_the_target_does_not_have_are_refused(random_verifier: Role, tmp_path: Path) -> None:
    words = (*RANDOM, "project.logit_bias={259:1}")
    with pytest.raises(UserError, match=r"^project.logit_bias and bad_words must name ids in \[0, 259\), got 259$"):
        drafted(random_verifier.port, words, tmp_path)


def test_the_last_line_of_a_drafter(random_verifier: Role, tmp_path: Path) -> None:
    words = [*RANDOM, *SAMPLED, "project.check=true", f"network.port={random_verifier.port}", 'prompt=Say "a, b" [c]']
    words.remove("tracking=none")
    process = drafter_process(*words, folder=tmp_path)
    out, errors = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert result.keys() >= NEEDED
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["status"] == "ok"
    assert result["new_tokens"] == len(result["token_ids"]) == 64
    assert result["flips"] == []
    sampling = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
    assert result["token_ids"] == _own_text('Say "a, b" [c]', sampling, 64)
    assert result["bytes_sent"] > 0 < result["bytes_received"]
    # A verdict passes the verifier's event loop by, a PONG does not: on a busy machine the text can end before it.
    assert result["rtt_seconds"] is None or 0 < result["rtt_seconds"] < 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = next(row for row in rows if row.get("result"))
    assert {key: result[key] for key in NEEDED - {"status"}}.items() <= kept.items()
    assert len(rows) == result["rounds"] + 1
    assert list(tmp_path.glob("wandb/offline-run-*")), "no offline W&B run"
    others = [str(path) for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077 and not path.is_symlink()]
    assert not others, "the prompt is in these, and others than the owner may read them"
    wait_until(lambda: " left after 2 requests\n" in random_verifier.stderr(), "what the verifier says of it")


def test_the_same_without_wandb(random_verifier: Role, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('absent on purpose')\n")
    words = [*RANDOM, *SAMPLED, f"network.port={random_verifier.port}", f"prompt={PROMPT}", "tracking=offline"]
    words.remove("tracking=none")
    process = drafter_process(*words, folder=tmp_path / "run", environment={"PYTHONPATH": str(tmp_path)})
    out, errors = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0, errors
    assert "Weights & Biases is off for this run" in errors
    sampling = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
    assert json.loads(out.splitlines()[-1])["token_ids"] == _own_text(PROMPT, sampling, 64)
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def _joined(port: int, resume_seconds: float | None = None) -> RemoteTarget:
    settings = replace(_settings(), network=replace(_settings().network, port=port))
    if resume_seconds is not None:
        settings = replace(settings, project=replace(settings.project, resume_seconds=resume_seconds))
    return join(settings, token_texts(_target().tokenizer))


@pytest.mark.parametrize("source", ["random", "ngram"])
@pytest.mark.parametrize("mode", [Mode.sync, Mode["async"]], ids=lambda mode: mode.name)
def test_drafters_at_once_each_get_their_own_text(random_verifier: Role, source: str, mode: Mode) -> None:
    tokenizer = _target().tokenizer
    prompts = [f"text number {number}: " + "ab" * number for number in range(8)]
    samplings = [Sampling(seed=number, temperature=1.0, top_k=0, top_p=1.0) for number in range(8)]
    targets = [_joined(random_verifier.port) for _ in prompts]

    def draft(number: int) -> list[int]:
        asked = request(list(tokenizer(prompts[number])["input_ids"]), 30, samplings[number], mode, length=number + 1)
        with targets[number] as target:
            drafts = RandomDrafts(number, 256) if source == "random" else NgramDrafts(3, 1)
            rounds = speculate(target, drafts, asked, [BYTE_EOS])
            return [token for done in rounds for token in done.tokens]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(draft, range(8)))
    assert texts == [_own_text(prompt, sampling, 30) for prompt, sampling in zip(prompts, samplings)]


def first_protocol_client(port: int, prompts: list[str]) -> list[list[int]]:
    """A client of the first protocol that knows nothing of ours: ten lines, standard library only."""
    answers = []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as server:
        stream = server.makefile("rb")
        for prompt in prompts:
            text = prompt.encode()
            server.sendall(struct.pack("!I", len(text)) + text)
            (count,) = struct.unpack("!I", stream.read(4))
            answers.append(list(struct.unpack(f"!{count}i", stream.read(4 * count))))
    return answers


def test_the_first_protocol_on_the_same_port(random_verifier: Role, tmp_path: Path) -> None:
    answers = first_protocol_client(random_verifier.port, [PROMPT, "é, \n"])
    assert answers == [_own_text(prompt, Sampling.greedy(), 64) for prompt in (PROMPT, "é, \n")]
    greedy = drafted(random_verifier.port, RANDOM, tmp_path)
    assert greedy["token_ids"] == answers[0]


@pytest.mark.parametrize("request_bytes", [struct.pack("!I", 2**31), struct.pack("!I", 0), b"\x00\x00\x00\x02\xff\xff"])
def test_a_bad_request_of_the_first_protocol_closes_its_connection_only(
    random_verifier: Role, request_bytes: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", random_verifier.port), timeout=30) as server:
        server.sendall(request_bytes)
        assert server.recv(1) == b""
    assert len(first_protocol_client(random_verifier.port, ["x"])[0]) == 64


def as_read(text: str) -> str:
    """`text` as it is read from a pipe in text mode, which makes all line ends one."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def test_ctrl_c_on_a_drafter_leaves_the_verifier_serving(random_verifier: Role, tmp_path: Path) -> None:
    words = [
        *RANDOM,
        *SAMPLED,
        "project.draft.source=random",
        f"network.port={random_verifier.port}",
        f"prompt={PROMPT}",
        "project.max_new_tokens=990",
    ]
    process = drafter_process(*words, folder=tmp_path)
    assert process.stdout is not None
    said = process.stdout.read(3)  # the text has begun
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    last = json.loads(out.split("\n")[-2])
    assert (last["status"], last["ended_by"]) == ("failed", "interrupted")
    assert last["new_tokens"] > 0
    known = _own_text(PROMPT, SAMPLING, 64)
    assert last["token_ids"][:64] == known[: last["new_tokens"]]
    assert as_read(last["text"]).startswith(said)
    assert json.loads((tmp_path / "result.json").read_text()) == last
    assert not [child for child in children if child.is_running()]
    assert drafted(random_verifier.port, RANDOM, tmp_path / "next")["new_tokens"] == 64


def test_ctrl_c_on_a_verifier(tmp_path: Path) -> None:
    with verifier(*RANDOM) as running:
        wait_until(lambda: f"network.port={running.port} model=random" in running.stderr(), "the peer's command")
        words = [
            *RANDOM,
            *SAMPLED,
            "project.draft.source=random",
            f"network.port={running.port}",
            f"prompt={PROMPT}",
            "project.max_new_tokens=990",
        ]
        words.append("project.resume_seconds=0")
        process = drafter_process(*words, folder=tmp_path)
        assert process.stdout is not None
        assert process.stdout.read(3)
        code, result = running.interrupt()
        assert (code, result["status"], result["texts"], result["unfinished"]) == (0, "ok", 1, 1)
        assert result["ended_by"] == "interrupted"
        assert result["new_tokens"] > 0
        out, errors = process.communicate(timeout=END_SECONDS)
        assert process.returncode == 1
        last = json.loads(out.split("\n")[-2])
        assert (last["ended_by"], last["error"]) == ("lost", errors.splitlines()[-1])
        assert last["new_tokens"] > 0
        assert "Traceback" not in errors
        # Reset, if a DRAFT was on its way.
        ended = rf"verifier 127\.0\.0\.1:{running.port} (closed|broke) the connection"
        assert re.search(ended, errors.splitlines()[-1])
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", running.port), timeout=5)


def test_a_verifier_that_is_killed_is_noticed_at_once() -> None:
    with verifier(*RANDOM) as running, _joined(running.port, resume_seconds=0.0) as target:
        rounds = speculate(target, RandomDrafts(1, 256), request([1, 2, 3], 900, Sampling.greedy()), [])
        next(rounds)
        running.process.kill()
        began = time.monotonic()
        with pytest.raises(PeerGone, match=rf"^verifier 127.0.0.1:{running.port} .* during DRAFT \(epoch "):
            list(rounds)
        assert time.monotonic() - began < 20


def test_a_verifier_that_comes_back_with_other_weights_ends_the_text_and_what_there_is_is_kept(
    random_verifier: Role, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The connection is lost after the sixth verdict; behind the same address there is another target then."""
    heard = 0
    listen = RemoteTarget.next

    def lose(target: RemoteTarget) -> Outcome:
        nonlocal heard
        heard += 1
        if heard == 7:
            welcome = target.welcome
            monkeypatch.setattr(target, "_connect", lambda: other(connect(), welcome))
            target.connection.frames.close()
        return listen(target)

    def other(connection: VerifierConnection, welcome: WelcomeFrame) -> VerifierConnection:
        changed = welcome.target | {"model": "random:another", "adapter": "one"}
        connection.welcome = msgspec.structs.replace(welcome, target=changed)
        return connection

    def connect() -> VerifierConnection:
        with _joined(random_verifier.port) as again:
            return again._connect()

    monkeypatch.setattr(RemoteTarget, "next", lose)
    words = (*RANDOM, *SAMPLED, "project.mode=target_only")
    place = Run(tmp_path)
    with pytest.raises(PeerMismatch) as ended:
        drafted(random_verifier.port, words, place)
    was = _joined_target(random_verifier.port)["model"]
    assert ended.value.exit_code == 2
    assert str(ended.value).endswith(
        f"is another target than before: its model was {was} and is random:another, its adapter was none and is one "
        "during WELCOME"
    )
    figures = place.so_far()
    sampling = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
    assert figures["token_ids"] == _own_text(PROMPT, sampling, 64)[: figures["new_tokens"]]
    assert figures["new_tokens"] >= 6
    assert figures["text"]
    assert ended.value.ended_by is EndedBy.lost
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["round_tokens"] for row in rows) == figures["new_tokens"], "rows are there as they come"


def _joined_target(port: int) -> dict[str, str]:
    with _joined(port) as target:
        return target.welcome.target


@pytest.mark.parametrize("verdicts", [1, 1000])
def test_a_drafter_that_misheard_asks_for_the_text_again_once(
    random_verifier: Role, verdicts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth VERDICT, or each from there on, arrives with another id than was sent."""
    sampling = Sampling(seed=7, temperature=1.0, top_k=60, top_p=0.98)
    with _joined(random_verifier.port) as target:
        prompt = list(_target().tokenizer(PROMPT)["input_ids"])
        heard = 0
        listen = target.next

        def mishear() -> Outcome:
            nonlocal heard
            outcome = listen()
            if not isinstance(outcome, Verdict) or not outcome.ids:
                return outcome
            heard += 1
            is_bent = 5 <= heard < 5 + verdicts
            return replace(outcome, ids=[outcome.ids[0] ^ 1, *outcome.ids[1:]]) if is_bent else outcome

        monkeypatch.setattr(target, "next", mishear)
        rounds = speculate(target, RandomDrafts(1, 256), request(prompt, 40, sampling, Mode["async"]), [BYTE_EOS])
        if verdicts == 1:
            ids = [token for done in rounds for token in done.tokens]
            assert ids == _own_text(PROMPT, sampling, 40)
        else:
            with pytest.raises(RequestFailed, match="hold different texts up to position"):
                list(rounds)
        assert target.resumes == 1


def test_texts_of_a_drafter_that_vanishes_are_forgotten(random_verifier: Role, tmp_path: Path) -> None:
    """Eight slots: nine texts whose drafter is gone would fill them."""
    for _ in range(9):
        target = _joined(random_verifier.port)
        target.open(request([1, 2, 3], 900, Sampling.greedy()))
        target.draft(0, 3, [4, 5])
        assert isinstance(target.next(), Verdict)
        target.close()
    assert drafted(random_verifier.port, (*RANDOM, "project.max_new_tokens=3"), tmp_path)["new_tokens"] == 3


# What users get wrong


def _refused(port: int, words: tuple[str, ...], folder: Path, prompt: str = PROMPT) -> str:
    with pytest.raises((UserError, Fault)) as refused:
        drafted(port, (*RANDOM, *words), folder, prompt)
    assert isinstance(refused.value, UserError) or refused.value.exit_code == 2
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_an_unreachable_verifier_is_named_with_time_and_attempt(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    text = _refused(port, ("network.connect_timeout_seconds=1.0",), tmp_path)
    assert text.startswith(f"verifier 127.0.0.1:{port} could not be reached ([Errno 111]")
    assert "gave up after 1." in text
    assert int(text.partition("attempt ")[2].split()[0]) > 2


@pytest.mark.parametrize(
    ("module", "word", "complaint"),
    [
        ("drafter", "draft.length=0", "draft.length must be auto or in [1, 64], got 0"),
        ("drafter", "draft.window=0", "draft.window must be in [1, 1024], got 0"),
        ("verifier", "client.texts=0", "client.texts must be at least 1, got 0"),
    ],
)
def test_bad_input_of_a_command_is_one_line_and_exit_code_2(
    module: str, word: str, complaint: str, tmp_path: Path
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", f"speculative.{module}", f"hydra.run.dir={tmp_path}", "prompt=x", f"project.{word}"],
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"error: project.{complaint}\n"


_DELAYS = "bench.rtt_seconds and far_rtt_seconds must be at least 0, got "
_COUNT = "max_new_tokens must be in [1, 2**32), or -1 to fill the context, got "


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("draft.window=1025", "draft.window must be in [1, 1024], got 1025"),
        ("bench.far_rtt_seconds=[-1]", f"{_DELAYS}[0.0, 0.02, 0.05, 0.1, -1.0]"),
        ("draft.length=9 project.draft.window=8", "draft.window must be in [9, 1024], got 8"),
        ("client.cache_bytes=1000", "client.cache_bytes must be at least 1 MiB, got 1000"),
        ("client.frames_per_second=0.5", "client.frames_per_second must be at least 1, got 0.5"),
        ("idle_seconds=0", "idle_seconds must be greater than 0, got 0.0"),
        ("resume_seconds=-1", "resume_seconds must be at least 0, got -1.0"),
        ("sessions=0", "sessions must be at least 1, got 0"),
        ("temperature=nan", "temperature must be finite and at least 0, got nan"),
        ("temperature=inf", "temperature must be finite and at least 0, got inf"),
        ("top_k=4294967296", "top_k must be in [0, 2**32), got 4294967296"),
        ("max_new_tokens=99999999999999999999", _COUNT + "99999999999999999999"),
        ("max_new_tokens=0", _COUNT + "0"),
        ("min_p=1.5", "min_p must be in [0, 1], got 1.5"),
        ("repetition_penalty=0", "repetition_penalty must be in [0.01, 100], got 0.0"),
        ("presence_penalty=3", "presence_penalty must be in [-2, 2], got 3.0"),
        ("frequency_penalty=-3", "frequency_penalty must be in [-2, 2], got -3.0"),
        ("logit_bias={5:101}", "logit_bias must be in [-100, 100], got 101.0 for token 5"),
        ("logit_bias=[5]", "logit_bias must be token ids with numbers, such as {5: -100}, got [5]"),
        ("stop=3", "stop must be a text or a list of texts, got 3"),
        ("stop=[\"''\"]", "stop must hold texts of 1 to 1024 characters, got ''"),
        ("bad_words=[\"' '\"]", "bad_words must hold texts with something in them, got ' '"),
        ("rule=cross_entropy project.schema=a.json", "rule must be exact with project.schema, got 'cross_entropy'"),
        ("messages=a.json project.system=b", "system must be null where messages holds the system's, too, got 'b'"),
    ],
)
def test_credit_and_limits_that_make_no_sense_are_refused(word: str, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_settings("spec_decoding", f"project.{word}", SpeculativeSettings)
    assert str(refused.value) == f"project.{complaint}"


def test_what_the_verifier_refuses_is_said_in_one_line(random_verifier: Role, tmp_path: Path) -> None:
    port = random_verifier.port
    assert _refused(port, ("project.draft.length=17",), tmp_path) == (
        "project.draft.length must be in [1, 16] for this verifier (its project.max_draft_length), got 17"
    )
    assert _refused(port, ("project.draft.window=65",), tmp_path) == (
        "project.draft.window must be in [1, 64] for this verifier (its project.draft.window), got 65"
    )
    assert _refused(port, (), tmp_path, "x" * 1000) == (
        "project.max_new_tokens must be at most 24 here for a prompt of 1000 tokens (a request to this verifier "
        "has room for 1024 tokens, its context), got 64"
    )
    assert _refused(port, (), tmp_path, "x" * 262145) == "prompt must be at most 262144 tokens, got 262145"
    assert _refused(port, (), tmp_path, "") == "prompt must not be empty, got ''"
    assert _refused(port, ("project.draft.source=layers", "project.draft.layers=9"), tmp_path) == (
        "project.draft.layers: layers must be a range within the model's 4 layers, got 0 to 9"
    )
    assert _refused(port, ("project.draft.source=model", "project.draft.model=nope"), tmp_path).startswith(
        "project.draft.model must be one of llama3_70b, "
    )


@pytest.mark.real
def test_other_tokenizers_are_refused_with_the_first_id_that_differs(random_verifier: Role, tmp_path: Path) -> None:
    other = ("model=smollm2_135m", "model.dtype=float32", "tracking=none")
    with pytest.raises(UserError) as refused:
        drafted(random_verifier.port, other, tmp_path)
    assert str(refused.value) == (
        "model SmolLM2-135M-Instruct must have the verifier's tokenizer: id 0 is '<|endoftext|>' here and 'Ā' there"
    )
    words = ("project.draft.source=model", "project.draft.model=smollm2_135m")
    assert _refused(random_verifier.port, words, tmp_path) == (
        "project.draft.model smollm2_135m must have the target's tokenizer: id 0 is '<|endoftext|>' here and 'Ā' there"
    )


def test_off_loopback_with_a_key_and_a_trusted_link_who_has_the_key_is_served(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("0123456789abcdef")
    wrong.write_text("fedcba9876543210")
    for file in (right, wrong):
        file.chmod(0o600)
    key = f"network.key_file={right}"
    with verifier(*RANDOM, "network.host=0.0.0.0", "network.trusted_link=true", key) as running:
        text = _refused(running.port, (f"network.key_file={wrong}",), tmp_path)
        assert text == (f"verifier 127.0.0.1:{running.port} does not hold the same key as we do during handshake")
        assert "same key" in _refused(running.port, (), tmp_path)
        with pytest.raises((OSError, struct.error)):
            first_protocol_client(running.port, ["no key, no answer"])
        assert drafted(running.port, (*RANDOM, key, "project.max_new_tokens=3"), tmp_path)["new_tokens"] == 3
        wait_until(lambda: "on the drafter's machine:" in running.stderr(), "the command for the other machine")
        command = running.stderr().partition("on the drafter's machine: ")[2].splitlines()[0]
        assert "network.host=0.0.0.0" not in command
        assert f"network.port={running.port} model=random" in command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("network.host=0.0.0.0", "network.key_file must be set (or network.host be a loopback address), got"),
        ("network.host=0.0.0.0 network.key_file=KEY", "network.trusted_link must be true (a VPN) or network.tls"),
        ("network.key_file=/nowhere", "network.key_file must be a readable file, got /nowhere"),
        ("network.tls_certificate=/nowhere", "network.tls_private_key must be set where network.tls_certificate is"),
        ("network.dead_after_seconds=1.5", "network.dead_after_seconds must be at least 2 x heartbeat_seconds = 2.0"),
    ],
)
def test_where_a_verifier_refuses_to_listen(words: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef")
    overrides = " ".join(RANDOM) + " " + words.replace("KEY", str(tmp_path / "key"))
    settings = compose_settings("spec_decoding", overrides, SpeculativeSettings)
    with pytest.raises(UserError) as refused:
        verifier_role.run(settings, Run(tmp_path))
    assert str(refused.value).startswith(why)


def test_off_loopback_over_tls(tmp_path: Path) -> None:
    certificate, private_key, key = tmp_path / "lab.pem", tmp_path / "lab.key", tmp_path / "key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(
        [*command, *names, "-keyout", str(private_key), "-out", str(certificate)],
        check=True,
        capture_output=True,
        timeout=30,
    )
    key.write_text("0123456789abcdef")
    secret = f"network.key_file={key}"
    own = (f"network.tls_certificate={certificate}", f"network.tls_private_key={private_key}")
    with verifier(*RANDOM, "network.host=0.0.0.0", secret, *own) as running:
        words = (*RANDOM, secret, "project.max_new_tokens=9")
        trusting = (*words, f"network.tls_authority={certificate}")
        plain = _own_text(PROMPT, Sampling.greedy(), 9)
        assert drafted(running.port, trusting, tmp_path / "tls")["token_ids"] == plain
        text = f"verifier 127.0.0.1:{running.port} takes TLS only (network.tls_authority must be set, got null)"
        with pytest.raises(TlsRefused, match=re.escape(text)) as refused:
            drafted(running.port, words, tmp_path / "plain")
        assert refused.value.exit_code == 2
        wait_until(lambda: "network.tls_authority=" in running.stderr(), "the command says that TLS is needed")


def test_a_taken_port_is_one_line(random_verifier: Role, tmp_path: Path) -> None:
    overrides = " ".join((*RANDOM, f"network.port={random_verifier.port}"))
    settings = compose_settings("spec_decoding", overrides, SpeculativeSettings)
    why = rf"^network.port must be free on 127.0.0.1, got {random_verifier.port} "
    with pytest.raises(UserError, match=why):
        verifier_role.run(settings, Run(tmp_path))
