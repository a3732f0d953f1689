"""Other servers with the same weights, on the server's core and with as many threads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx

from lab.bench import pinned
from lab.faults import Fault
from lab.llama_cpp import MODULE as LLAMA_CPP
from lab.models.gguf.file import gguf_file
from lab.models.sources import fetch
from lab.settings import ModelSource, Quantization
from serve.bench.client import Client
from serve.bench.rig import MODEL_CORE, Rig

LOOK_SECONDS = 0.1
LOG = "peer.log"


class LeftOut(Fault):
    """A peer cannot be measured here; its text says why."""


def llama_cpp(rig: Rig, port: int, slots: int) -> tuple[list[str], str]:
    """The command of llama.cpp's server with the GGUF file of the model, and the model's id there. Raises LeftOut."""
    if rig.settings.model.source is not ModelSource.gguf:
        raise LeftOut("the model is no GGUF file")
    if find_spec("xllamacpp") is None:
        raise LeftOut("pip install '.[peers]' brings xllamacpp")
    numbers = [rig.settings.device.threads, slots, rig.project.context]
    file = gguf_file(rig.settings.model)
    return ["-m", LLAMA_CPP, str(file), *map(str, numbers), f"--port={port}"], "default"


def transformers(rig: Rig, port: int, slots: int) -> tuple[list[str], str]:
    """The command of `transformers serve` with the model's unpacked weights, and the model's id there."""
    folder = str(_with_architecture(rig))
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", rig.settings.model.dtype.name]
    return ["-m", "transformers.cli.transformers", "serve", folder, *where], folder


def _with_architecture(rig: Rig) -> Path:
    """The unpacked model's folder as links, but for its config, which names the class that `transformers serve` asks
    for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    stored = fetch(replace(rig.settings.model, quantization=Quantization.none), None)
    folder = rig.new_folder("unpacked").absolute()
    folder.mkdir(parents=True)
    for file in stored.path.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.absolute())
    config = json.loads((stored.path / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [CLASSES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


PEERS: dict[str, Callable[[Rig, int, int], tuple[list[str], str]]] = {
    "llama_cpp": llama_cpp,
    "transformers": transformers,
}


@contextmanager
def serving(name: str, rig: Rig, slots: int) -> Iterator[Client]:
    """A peer with room for so many concurrent requests, until the end of the block. Raises LeftOut."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments, model = PEERS[name](rig, port, slots)
    folder = rig.new_folder(name)
    folder.mkdir(parents=True)
    address = f"http://127.0.0.1:{port}"
    process = _start([sys.executable, *arguments], folder / LOG, rig.settings.device.threads)
    try:
        _wait(process, address, folder / LOG, rig.project.start_seconds)
        with Client(address, model, rig.project.request_seconds, slots) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


def _start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | offline
    with pinned(MODEL_CORE), log.open("wb") as out:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path, seconds: float) -> None:
    """Wait until a server answers. Raises LeftOut if it ends first, or takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise LeftOut(f"it ended with code {process.returncode}: {said[-1] if said else 'it said nothing'}")
        try:
            if httpx.get(f"{address}/health", timeout=seconds).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(LOOK_SECONDS)
    raise LeftOut(f"it was not ready within {seconds:g} s ({log} says why)")
