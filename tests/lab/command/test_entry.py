"""What every command does around its work: last line, exit codes, one line for mistakes, prompts taken literally."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lab.command import entry
from lab.command.ending import Stopped, end_of
from lab.command.typed import to_settings
from lab.doctor import DoctorSettings
from lab.engine.base import TargetStep
from lab.engine.not_finite import NotFinite
from lab.environment import PACKAGES
from lab.faults import EndedBy, Lost
from lab.settings import Dtype, UserError, digest

Work = Callable[[DoctorSettings, entry.Run], dict[str, Any]]
ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 120.0


@pytest.fixture(autouse=True)
def _undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets variables and loggers of its whole process; results go to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [*entry.QUIET, "HYDRA_FULL_ERROR"]:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    GlobalHydra.instance().clear()


def command(monkeypatch: pytest.MonkeyPatch, work: Work, *arguments: str) -> int:
    """Runs a whole command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lab-test", "tracking=none", *arguments])
    with pytest.raises(SystemExit) as left:
        entry.main("doctor", DoctorSettings, work)
    assert isinstance(left.value.code, int)
    return left.value.code


def nothing(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
    return {}


def test_last_line_is_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        seen.append((settings, place))
        print("something on the way")
        return {"answer": 42, "adapter_path": Path("adapter"), "losses": [1.5, None]}

    assert command(monkeypatch, work, "seed=5") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    settings, place = seen[0]
    assert settings.seed == 5
    assert place.folder.is_absolute()
    assert place.folder.is_relative_to(tmp_path / "results" / "doctor")
    assert last == json.loads((place.folder / "result.json").read_text())
    assert (last["status"], last["ended_by"]) == ("ok", "done")
    assert (last["answer"], last["losses"]) == (42, [1.5, None])
    assert last["adapter_path"] == str(tmp_path / "adapter")
    assert last["run_folder"] == str(place.folder)
    assert last["settings_digest"] == digest(settings)
    assert last["device"] in ("cpu", "cuda", "mps")
    assert {"commit", "versions", "machine"} <= last.keys()


@pytest.mark.parametrize("best", [Dtype.float32, Dtype.bfloat16])
def test_a_work_sees_the_dtype_that_the_device_chose(best: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.device.best_dtype", lambda device: best)
    seen: list[Dtype] = []

    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        seen.append(settings.model.dtype)
        return {}

    assert command(monkeypatch, work, "model.dtype=auto") == 0
    assert command(monkeypatch, work, "model.dtype=float64") == 0
    seen.append(entry.compose_settings("doctor", "model.dtype=auto", DoctorSettings).model.dtype)
    assert seen == [best, Dtype.float64, best]


def test_figures_that_json_lacks_do_not_lose_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"eval_loss": math.nan, "by_round": [1.0, math.inf, -math.inf], "odd": object()}
    assert command(monkeypatch, lambda settings, place: figures) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert (last["eval_loss"], last["by_round"]) == ("nan", [1.0, "inf", "-inf"])
    assert last["odd"].startswith("<object")


def test_result_appears_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """result.json is only ever renamed to: whoever reads it finds all of it or nothing."""
    written: list[str] = []
    write = Path.write_text

    def watch(self: Path, *arguments: Any, **options: Any) -> int:
        written.append(self.name)
        return write(self, *arguments, **options)

    folders: list[Path] = []
    monkeypatch.setattr(Path, "write_text", watch)
    assert command(monkeypatch, lambda settings, place: folders.append(place.folder) or {}) == 0
    assert written == [f".result.json.{os.getpid()}"]
    assert [file.name for file in folders[0].glob("*result*")] == ["result.json"]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("seed=-1", "seed must be in [0, 2**31), got -1"),
        ("seed=abc", "seed must be an integer, got 'abc'"),
        ("sed=1", "sed must be a setting (did you mean seed?), got '1'"),
        ("+network.prot=1", "network.prot must be a setting (did you mean network.port?), got 1"),
        ("model=nope", "model must be one of "),
        ("prompt_file=nowhere.txt", "prompt_file must be readable UTF-8 text, got 'nowhere.txt' ("),
        ("project=fed_learn", "project must be "),
        ("-m", "a command must run once (run_matrix.py runs one for each value of key=a,b), got -m"),
        ("hydra.mode=MULTIRUN", "a command must run once (run_matrix.py runs one "),
        ("++hydra.mode=2", "a command must run once (run_matrix.py runs one "),
        ("-mr", "a command must run once (run_matrix.py runs one "),
        ("--multi", "arguments must be key=value or options that --hydra-help lists: unrecognized arguments: --multi"),
        ("--experimental-rerun=x", "settings must be words or YAML, got --experimental-rerun, which is pickle"),
        ("--nope", "arguments must be key=value or options that --hydra-help lists: unrecognized arguments: --nope"),
        ("--cfg=x", "arguments must be key=value or options that --hydra-help lists: argument --cfg/-c: invalid"),
        ("--config-name=nope", "Cannot find primary config 'nope'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, line: str
) -> None:
    assert command(monkeypatch, lambda settings, place: pytest.fail("must not run"), argument) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {line}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["a: [", "a:\tb\n\tc: 1", "name: a\nname: b", "a: !!python/object/apply:os.system ['true']"]
)
def test_a_broken_yaml_of_ones_own_is_one_line(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("own", "model", "mine.yaml")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    words = ("--config-dir=own", "model=mine")
    assert command(monkeypatch, lambda settings, place: pytest.fail("must not run"), *words) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "mine.yaml" in output.err


def test_a_part_of_the_settings_that_is_not_there_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, nothing, "--cfg=job", "--package=nope") == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "package 'nope' not found in config\n")


@pytest.mark.parametrize("word", ["--help", "--cfg=job"])
def test_what_hydra_answers_by_itself_is_no_failure(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, lambda settings, place: pytest.fail("must not run"), word) == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/dev/null/x", "file/x"])
def test_results_that_cannot_be_written_are_a_mistake(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert command(monkeypatch, nothing, f"hydra.run.dir={folder}") == 2
    line = capsys.readouterr().err.strip().splitlines()
    assert len(line) == 1
    assert line[0].startswith("error: hydra.run.dir must be a folder that can be written, got '")


def full() -> OSError:
    return OSError(28, "No space left on device", "somewhere")


def wrapped() -> RuntimeError:
    error = RuntimeError("could not save")
    error.__cause__ = full()
    return error


@pytest.mark.parametrize("error", [full(), wrapped(), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_is_one_line_and_what_there_is_is_kept(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        place.so_far = lambda: {"steps": 3}
        raise error

    assert command(monkeypatch, fails) == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["status"], result["ended_by"], result["steps"]) == ("failed", "disk_full", 3)
    assert output.err.startswith("the disk is full: ")
    assert output.err.count("\n") == 1


def test_a_result_that_cannot_be_written_is_a_line_and_the_last_line_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(target: Path, text: str) -> None:
        raise full()

    monkeypatch.setattr(entry, "write_whole", fail)
    assert command(monkeypatch, lambda settings, place: {"answer": 42}) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["status"], result["answer"]) == ("ok", 42)
    assert output.err == (
        f"result.json could not be written to '{result['run_folder']}' (No space left on device): "
        "the last line has all\n"
    )


def test_mistake_found_while_running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        raise UserError("model.adapter must be a PEFT folder, got 'x'")

    assert command(monkeypatch, work) == 2
    assert capsys.readouterr().err == "error: model.adapter must be a PEFT folder, got 'x'\n"


@pytest.mark.parametrize("code", [1, 2])
def test_what_a_run_has_before_it_fails_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        place.so_far = lambda: {"token_ids": [1, 2], "ended_by": "length", "status": "ok"}
        fault = Lost("the verifier is gone")
        fault.exit_code = code
        raise fault

    assert command(monkeypatch, work) == code
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["status"], result["error"], result["token_ids"]) == ("failed", "the verifier is gone", [1, 2])
    assert result["ended_by"] == ("refused" if code == 2 else "lost")
    assert json.loads((Path(result["run_folder"]) / "result.json").read_text()) == result
    assert output.err == f"{'error: ' if code == 2 else ''}the verifier is gone\n"


def test_numbers_that_are_none_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        raise NotFinite([TargetStep([], [], [], [], "the logits for position 3 hold NaN or infinity")])

    assert command(monkeypatch, work) == 1
    assert capsys.readouterr().err == "the logits for position 3 hold NaN or infinity\n"


FAULTY = """
import sys, time
from lab.command import entry
from lab.doctor import DoctorSettings

def work(settings, place):
    if settings.seed == 1:
        raise RuntimeError("the disk is on fire")
    print("working", flush=True)
    time.sleep(100)

entry.main("doctor", DoctorSettings, work)
"""


def start(tmp_path: Path, *arguments: str, text: str = FAULTY) -> subprocess.Popen[str]:
    script = tmp_path / "faulty.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_fault_and_interrupt_of_real_processes(tmp_path: Path) -> None:
    fault, interrupted = start(tmp_path, "seed=1"), start(tmp_path, "seed=2")
    try:
        _, errors = fault.communicate(timeout=DEADLINE)
        assert fault.returncode == 1
        assert "Traceback" in errors
        assert errors.rstrip().endswith("RuntimeError: the disk is on fire")

        assert interrupted.stdout is not None
        assert interrupted.stdout.readline() == "working\n"
        interrupted.send_signal(signal.SIGINT)
        output, errors = interrupted.communicate(timeout=DEADLINE)
        assert (interrupted.returncode, errors) == (130, "interrupted\n")
        result = json.loads(output)
        assert (result["status"], result["ended_by"]) == ("failed", "interrupted")
        assert json.loads((Path(result["run_folder"]) / "result.json").read_text()) == result
    finally:
        for process in (fault, interrupted):
            process.kill()
            process.wait(DEADLINE)


def test_a_signal_that_comes_twice_is_one_and_a_later_one_ends_at_once(tmp_path: Path) -> None:
    begin = "def work(settings, place):\n"
    slow = FAULTY.replace(begin, begin + "    place.so_far = lambda: time.sleep(2) or {'a': 1}\n")
    for gap, kept in ((0.02, True), (0.8, False)):
        process = start(tmp_path, "seed=2", text=slow)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            process.send_signal(signal.SIGINT)
            time.sleep(gap)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
            process.wait(DEADLINE)
        assert (process.returncode, '"a": 1' in output) == (130, kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_in_a_finalizer(tmp_path: Path, number: signal.Signals) -> None:
    """Python drops what a finalizer raises; the run would go on until it is ended by force, after seven seconds."""
    lost = """
class Slow:
    def __del__(self):
        print("working", flush=True)
        time.sleep(100)

def work(settings, place):
    place.so_far = lambda: {"a": 1}
    slow = Slow()
    del slow
    time.sleep(100)
    """
    process = start(tmp_path, "seed=2", text=FAULTY.replace("def work(", f"{lost.strip()}\n\ndef unused("))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait(DEADLINE)
    assert json.loads(output)["a"] == 1
    assert (process.returncode, errors.splitlines()[-1]) == (128 + number, json.loads(output)["ended_by"])
    assert "Exception ignored" not in errors


TURNED = """
class Named:
    def __set_name__(self, owner, name):
        try:
            print("working", flush=True)
            time.sleep(100)
        except BaseException as error:  # as Python 3.11 does, and as libraries do
            raise RuntimeError("Error calling __set_name__") from error

def work(settings, place):
    class Owner:
        name = Named()
    """
IMPORTS = """
def work(settings, place):
    source = "print('working', flush=True); import time; time.sleep(2); print('imported', flush=True)"
    exec(compile(source, "torch/part.py", "exec"), {"__name__": "torch.part"})
    time.sleep(100)
    """


def test_a_signal_that_a_reader_takes_for_a_bad_file_is_still_a_signal() -> None:
    try:
        try:
            raise Stopped(signal.SIGINT)
        except BaseException as error:
            raise UserError("model.path must be a file that can be read") from error
    except UserError as error:
        end = end_of(error)
    assert (end.code, end.by, end.line) == (130, EndedBy.interrupted, "interrupted")
    assert end_of(UserError("a bad value")).code == 2


@pytest.mark.parametrize(("text", "after"), [(TURNED, ""), (IMPORTS, "imported\n")], ids=["turned", "put off"])
def test_a_signal_that_hits_a_library_is_still_a_signal(tmp_path: Path, text: str, after: str) -> None:
    """What it raises may become another exception there; in torch's imports it would abort the process."""
    process = start(tmp_path, "seed=2", text=FAULTY.replace("def work(", f"{text.strip()}\n\ndef unused("))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait(DEADLINE)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert output.startswith(after)
    assert json.loads(output.removeprefix(after))["ended_by"] == "interrupted"


def test_ctrl_c_after_the_last_line_is_no_traceback(tmp_path: Path) -> None:
    """Libraries take their time to exit."""
    slow = "import atexit, time\natexit.register(time.sleep, 60)\n" + FAULTY.replace("time.sleep(100)", "return {}")
    process = start(tmp_path, "seed=2", text=slow)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert json.loads(process.stdout.readline())["status"] == "ok"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait(DEADLINE)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("package", "raised", "said"),
    [*((package, "KeyboardInterrupt", False) for package in PACKAGES), ("lab", "RuntimeError('broken')", True)],
)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(package: str, raised: str, said: bool) -> None:
    """Whatever a command imports first: its package comes before that."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}\nraise {raised}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == (1 if said else -signal.SIGINT)
    assert ("Traceback" in done.stderr) is said


def test_the_file_of_another_command_in_a_real_process(tmp_path: Path) -> None:
    """Here the other command's settings are not even registered."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "simulations" / "fed_sim.py"), "--config-name=doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --config-name must name this command's file, got 'doctor'\n"


def prompt_of(arguments: list[str]) -> str:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("doctor", overrides=entry.literal_prompt(arguments))
    return to_settings(config, DoctorSettings).prompt


@dataclass
class PromptAlone:
    """What Hydra does with an override, without the tenth of a second that it takes for all of conf/."""

    prompt: str


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("ab ,'\"\\\n${}[]()=:-\t\r+~*?#@!"), st.characters()), max_size=12))
@example("a,b'c\"d[e]\n${x} \\")
@example("${a}\\${b}\\\\${c}")
@example("\\\\\n\\")
@example("null")
@example("42")
@example("")
def test_prompt_is_taken_literally(text: str) -> None:
    if text not in ("-", "???"):
        config = OmegaConf.structured(PromptAlone)
        overrides = OverridesParser.create().parse_overrides(entry.literal_prompt([f"prompt={text}"]))
        ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
        assert OmegaConf.to_object(config) == PromptAlone(text)


def test_the_one_prompt_that_cannot_be_said() -> None:
    """`???` is what OmegaConf calls a missing value, quoted or not: refused, never read as something else."""
    with pytest.raises(UserError, match=r"^prompt must be set, got \?\?\?$"):
        prompt_of(["prompt=???"])


LITERAL = 'Dear [reader], "it\'s" 5 = {five}: ${HOME}, \\\n\n#end '


def test_prompt_from_stdin_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin_of(monkeypatch, LITERAL.encode())
    assert prompt_of(["prompt=-"]) == LITERAL
    (tmp_path / "prompt, with comma.txt").write_bytes(LITERAL.encode())
    assert prompt_of([f"prompt_file={tmp_path}/prompt, with comma.txt"]) == LITERAL


def stdin_of(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def test_bytes_of_a_prompt_are_utf8_whatever_the_locale_and_keep_their_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\xef\xbb\xbfcaf\xc3\xa9 \xe2\x82\xac\r\nb\rc\n"
    stdin_of(monkeypatch, data, "cp1252")
    (tmp_path / "prompt").write_bytes(data)
    (tmp_path / "name é").write_bytes(data)
    assert prompt_of(["prompt=-"]) == prompt_of([f"prompt_file={tmp_path}/name é"]) == "café €\r\nb\rc\n"
    assert prompt_of([f"++prompt_file={tmp_path}/prompt"]) == "café €\r\nb\rc\n"


@pytest.mark.parametrize("second", ["prompt=a", "prompt_file=somewhere", "++prompt=a"])
def test_two_prompts_are_refused(second: str) -> None:
    with pytest.raises(UserError, match=r"^prompt must be given once, as prompt= or prompt_file=, got 2 of them$"):
        prompt_of(["prompt=b", second])


def test_prompt_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"^prompt_file must be readable UTF-8 text, got '.*picture' \("):
        prompt_of([f"prompt_file={tmp_path}/picture"])
    stdin_of(monkeypatch, b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"^prompt must be readable UTF-8 text, got '-' \("):
        prompt_of(["prompt=-"])


@pytest.mark.parametrize("argument", ["prompt=a\udcff", "hydra.run.dir=a\udcff", "model.path=a\ud800"])
def test_an_argument_that_is_no_text_is_one_line(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, nothing, argument) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: arguments must be UTF-8 text, got ")
    assert line.isascii()
    assert line.count("\n") == 1


def test_a_setting_that_holds_half_a_character_is_refused(tmp_path: Path) -> None:
    """YAML has a word for lone surrogates, and tokenizers have none."""
    config = compose_with(tmp_path, 'prompt: "a\\ud800"')
    with pytest.raises(UserError, match=r"^prompt must be text, got 'a\\ud800'"):
        entry.settle(config, DoctorSettings)


def compose_with(folder: Path, line: str) -> Any:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("doctor")
    return OmegaConf.merge(config, OmegaConf.create(line))


def test_unquoted_prompt_would_fail() -> None:
    """The negative control: Hydra itself does not take such a prompt."""
    with initialize_config_module("conf", version_base="1.3"), pytest.raises(OverrideParseException):
        compose("doctor", overrides=[f"prompt={LITERAL}"])


def test_other_arguments_pass_unchanged() -> None:
    arguments = ["seed=3", "model=random", "--cfg", "job", "project.ports=[1,2]", "+prompts=x", "prompt"]
    assert entry.literal_prompt(arguments) == arguments


def test_prompt_reaches_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        return {"prompt": settings.prompt}

    assert command(monkeypatch, work, f"prompt={LITERAL}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt"] == LITERAL


def test_nothing_phones_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in entry.QUIET:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert command(monkeypatch, nothing) == 0
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1", "what the user set stays"


def test_logs_go_to_stderr_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
        logging.getLogger("lab.test").info("told")
        logging.getLogger("somebody.else").info("not told")
        return {}

    assert command(monkeypatch, work) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    assert output.err.rstrip().endswith("INFO lab.test: told")
    assert output.err.count("\n") == 1
