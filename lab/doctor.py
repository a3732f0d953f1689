"""A report of this machine, with the remedy for what it lacks: `python -m lab.doctor [model=...] [device.name=...]`.

Only looks: nothing is downloaded, converted or sent. A check that fails is a line of the table, and ends nothing.
"""

import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lab.command import entry
from lab.device import (
    GIB,
    TORCH_DTYPES,
    available,
    best_dtype,
    lacks_sixteen_bits,
    open_device,
    read_memory,
    synchronize,
)
from lab.environment import describe_environment
from lab.settings import (
    Dtype,
    LabSettings,
    ModelSettings,
    ModelSource,
    Quantization,
    UserError,
    WandbMode,
    register,
    require,
)

PRODUCTS = (Dtype.float32, Dtype.bfloat16, Quantization.int8, Quantization.int4)
"""Precisions of weights that an engine multiplies by."""
OUTPUTS, INPUTS = 1536, 576
"""The largest matrix in a layer of a small model, SmolLM2-135M."""
MATRICES = 16
"""Matrices that are multiplied in turn: a token, too, reads every weight once."""
PRODUCT_SECONDS = 0.2
LARGEST_ERROR = 0.15
"""NF4 rounds normal weights by about 9 % of their size (arXiv 2305.14314), int4 by 8 %; rubbish is off by > 100 %."""


@dataclass(kw_only=True)
class DoctorProjectSettings:
    """Checks in addition to those of the common settings."""

    ports: list[int]
    """TCP ports to try on `network.host`, in addition to `network.port` and one that the system chooses."""
    matrix_size: int
    """Rows and columns of the matrices that precisions are compared with."""

    def __post_init__(self) -> None:
        require(all(1 <= port <= 65535 for port in self.ports), "ports must be in [1, 65535]", self.ports)
        require(64 <= self.matrix_size <= 8192, "matrix_size must be in [64, 8192]", self.matrix_size)
        require(self.matrix_size % 64 == 0, "matrix_size must be a multiple of NF4's block, 64", self.matrix_size)


@register("doctor")
@dataclass(kw_only=True)
class DoctorSettings(LabSettings):
    """All settings of `lab.doctor`."""

    project: DoctorProjectSettings

    compiles_layers = True
    takes_adapter = True


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    found: str
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures for the last line."""
    remedy: str | None = None
    """None when nothing is missing."""


def run(settings: DoctorSettings, place: entry.Run) -> dict[str, Any]:
    """Show the table on stderr; return every finding, with `missing` naming the lines that have a remedy."""
    findings = examine(settings)
    show(findings)
    missing = [name for name, finding in findings.items() if finding.remedy]
    return {"missing": missing} | {
        "checks": {
            name: {"found": finding.found, "remedy": finding.remedy, **finding.figures}
            for name, finding in findings.items()
        }
    }


def examine(settings: DoctorSettings) -> dict[str, Finding]:
    """Every check's finding, by name, in the order of the table."""
    device, threads = open_device(settings.device), settings.device.threads or 1
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": check_packages,
        "device": lambda: check_device(device),
        "dtypes": lambda: check_dtypes(device, settings.project.matrix_size),
        "memory": lambda: check_memory(device),
        "cores": check_cores,
        "instructions": lambda: check_instructions(device),
        "compiler": check_compiler,
        **{f"{kind.name}_product": partial(check_product, device, kind, threads) for kind in PRODUCTS},
        "nf4": lambda: check_nf4(device, settings.project.matrix_size),
        "torch_rpc": check_torch_rpc,
        "model": lambda: check_model(settings.model),
        "ports": lambda: check_ports(settings.network.host, [settings.network.port, *settings.project.ports]),
        "wandb": lambda: check_wandb(settings.tracking.wandb),
    }
    return {name: _guarded(check) for name, check in checks.items()}


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except UserError as error:  # contains its own remedy
        return Finding("missing", {"ok": False}, str(error))
    except Exception as error:  # the reader wants to see whatever is broken
        return Finding(f"failed: {type(error).__name__}", {"ok": False}, " ".join(str(error).split())[:300] or "-")


def show(findings: dict[str, Finding]) -> None:
    """The table, on stderr: stdout belongs to the last line."""
    table = Table(title=f"distributed-llm-lab on {platform.node()}", title_justify="left")
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for name, finding in findings.items():
        table.add_row("!" if finding.remedy else "+", name.replace("_", " "), finding.found, finding.remedy or "")
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160  # a log file has no width of its own
    console.print(table, markup=False)


def check_python() -> Finding:
    """The interpreter."""
    enough = sys.version_info >= (3, 11)
    version = platform.python_version()
    remedy = None if enough else "install Python 3.11 or later: make setup PYTHON=python3.11"
    return Finding(f"{version} ({sys.executable})", {"version": version}, remedy)


def check_packages() -> Finding:
    """Versions of the packages that the pillars need."""
    versions: dict[str, str | None] = describe_environment()["versions"]
    absent = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version or '-'}" for name, version in versions.items() if name != "python")
    remedy = f"pip install --constraint constraints.txt {' '.join(absent)}" if absent else None
    return Finding(found, {"absent": absent}, remedy)


def check_device(device: torch.device) -> Finding:
    """The device that `device.name` selects."""
    names = [name.name for name in available()]
    kind = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else describe_environment()["machine"]["processor"]
    )
    return Finding(f"{device.type}: {kind} (available: {', '.join(names)})", {"name": device.type, "available": names})


def check_dtypes(device: torch.device, size: int) -> Finding:
    """Which precisions work, and how much faster than float32 a product of two matrices is in each."""
    seconds = {dtype: _product_seconds(device, dtype, size) for dtype in TORCH_DTYPES}
    base = seconds[Dtype.float32] or float("nan")
    speed = {dtype.name: base / taken for dtype, taken in seconds.items() if taken}
    found = "speed against float32: " + ", ".join(f"{name} {ratio:.2g}" for name, ratio in speed.items())
    return Finding(found, {"speed_over_float32": speed})


def _product_seconds(device: torch.device, dtype: Dtype, size: int) -> float | None:
    try:
        matrix = torch.ones(size, size, dtype=TORCH_DTYPES[dtype], device=device)
        return statistics.median(_seconds(lambda: matrix @ matrix, device) for _ in range(5))
    except (RuntimeError, TypeError):  # torch raises either if the device lacks the dtype
        return None


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def check_memory(device: torch.device) -> Finding:
    """Main memory, and the device's own."""
    main, own = psutil.virtual_memory(), read_memory(device).device_total_bytes
    found = f"{main.available / GIB:.1f} of {main.total / GIB:.1f} GiB free"
    figures = {"total_bytes": main.total, "available_bytes": main.available, "device_total_bytes": own}
    return Finding(found + (f", {device.type} {own / GIB:.1f} GiB" if own else ""), figures)


def check_cores() -> Finding:
    """Cores, and the threads that torch would use of them."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    remedy = f"device.threads={cores}, or 1 for each of several processes" if threads > cores else None
    return Finding(f"{cores} cores, torch uses {threads} threads", {"cores": cores, "threads": threads}, remedy)


def check_instructions(device: torch.device) -> Finding:
    """What the processor can do, as far as torch's kernels use it, and whether `device` computes in bfloat16."""
    kinds = {"avx512_bf16": "avx512_bf16", "avx512_vnni": "vnni", "amx": "amx_tile"}
    has = [name for name, torchs in kinds.items() if getattr(torch.cpu, f"_is_{torchs}_supported", bool)()]
    level, best = torch.backends.cpu.get_cpu_capability(), best_dtype(device)
    found = f"torch's kernels for {level}, {', '.join(has) or 'nothing more'}; model.dtype=auto is {best.name}"
    return Finding(found, {"capability": level, "instructions": has, "auto_dtype": best})


def check_compiler() -> Finding:
    """The C++ compiler that compiled layers need."""
    from lab.engine.compiled import COMPILERS

    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        remedy = f"layers run uncompiled: install one of {', '.join(COMPILERS)}"
        return Finding("not installed", {"path": None}, remedy)
    return Finding(f"{found}, for compiled layers", {"path": found})


def check_product(device: torch.device, kind: Dtype | Quantization, threads: int = 1) -> Finding:
    """How fast one row is multiplied by weights in a precision, as for each new token, and whether rightly; on one
    thread, as the pillars' commands compute, where `device.threads` says no other number."""
    from lab.models.packed import kernel_fault

    if isinstance(kind, Quantization) and (fault := kernel_fault(device)):
        return Finding(f"not used on {device.type}: {fault}", {"ok": False})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _time_product(device, kind)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _time_product(device: torch.device, kind: Dtype | Quantization) -> Finding:
    generator = torch.Generator().manual_seed(0)
    weight, row = (torch.randn(count, INPUTS, generator=generator) for count in (OUTPUTS, 1))
    layers = [_layer(weight, kind, device) for _ in range(MATRICES)]
    given = row.to(device, torch.bfloat16 if isinstance(kind, Quantization) else TORCH_DTYPES[kind])
    error = _relative_error(layers[0](given).float().cpu(), row @ weight.t())
    until, seconds = time.perf_counter() + PRODUCT_SECONDS, list[float]()
    while len(seconds) <= MATRICES or time.perf_counter() < until:
        seconds += [_seconds(partial(layer, given), device) for layer in layers]
    fastest = min(seconds)  # other programs only make it slower
    speed = sum(tensor.nbytes for tensor in layers[0].state_dict().values()) / fastest
    ok = error < LARGEST_ERROR
    return Finding(
        f"{1e6 * fastest:.0f} µs for a row and {OUTPUTS} x {INPUTS} weights ({speed / 1e9:.1f} GB/s), {error:.1%} off",
        {"ok": ok, "seconds": fastest, "weights_bytes_per_second": speed, "relative_error": error},
        None if ok else f"another precision than {kind.name}: its kernel is wrong on this device",
    )


def _layer(weight: Tensor, kind: Dtype | Quantization, device: torch.device) -> nn.Module:
    """A layer as engines have it (`lab.models.sources.prepared`)."""
    from lab.engine.wide_products import widen_products
    from lab.models.packed import IntLinear

    if isinstance(kind, Quantization):
        assert kind.bits is not None, "nf4 has a check of its own"
        return IntLinear.of(weight.to(device), kind.bits)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False, device=device, dtype=TORCH_DTYPES[kind])
    layer.weight.copy_(weight)
    if lacks_sixteen_bits(device, TORCH_DTYPES[kind]):
        widen_products(layer)
    return layer


def _relative_error(product: Tensor, exact: Tensor) -> float:
    return float((product - exact).norm() / exact.norm())


def check_nf4(device: torch.device, size: int) -> Finding:
    """Stores a matrix in 4 bits with bitsandbytes on `device` and multiplies with it."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return Finding("bitsandbytes is not installed", {"ok": False}, "pip install bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(device)
    rows = torch.randn(4, size, generator=generator).to(device)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    product, exact = bnb.matmul_4bit(rows, packed.t(), quant_state=state), rows @ weight.t()
    error = _relative_error(product, exact)
    ok = error < LARGEST_ERROR
    found = f"works on {device.type}: {packed.numel() * 8 / weight.numel():.0f} bits a weight, {error:.1%} off"
    figures = {"ok": ok, "relative_error": error}
    return Finding(found, figures, None if ok else "model.quantization=none: this device's NF4 kernel is wrong")


def check_torch_rpc() -> Finding:
    """torch.distributed.rpc, which `split` can use between trusted machines."""
    if torch.distributed.is_available() and torch.distributed.rpc.is_available():
        return Finding("built in", {"ok": True})
    return Finding("not built into torch on this system", {"ok": False}, "use the tcp transport")


def check_model(model: ModelSettings) -> Finding:
    """Whether the model's files are on this machine; UserError with the remedy if they are not."""
    from lab.models.conversion import converted_folder, packed_path
    from lab.models.gguf.file import gguf_file
    from lab.models.sources import model_identity

    title = f"{model.name} ({model.source.name})"
    if model.source is ModelSource.hub:
        return _check_hub_cache(model, title)
    identity = model_identity(model)
    if model.source is ModelSource.path:
        return Finding(f"{title}: {model.path}", {"ok": True, "identity": identity, "folder": model.path})
    done, place = ("packed", packed_path) if model.quantization.bits is not None else ("converted", converted_folder)
    folder = place(model, identity)
    origin = f"{gguf_file(model).name} installed" if model.source is ModelSource.gguf else "made from its seed"
    state = f"{done} to {folder}" if folder.exists() else f"{done} once at its first use"
    figures = {"ok": True, "identity": identity, "folder": folder, "converted": folder.exists()}
    return Finding(f"{title}: {origin}, {state}", figures)


def _check_hub_cache(model: ModelSettings, title: str) -> Finding:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from lab.models.folder import ModelFolder

    try:
        folder = Path(snapshot_download(str(model.repo), revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        remedy = f"its first use downloads it, or now: hf download {model.repo}"
        return Finding(f"{title}: not on this machine", {"ok": False}, remedy)
    here = ModelFolder(folder, "model.repo")
    absent = here.missing_files() if here.has_weights else []
    state = "without weights" if not here.has_weights else f"{len(here.weight_files) - len(absent)} of its weight files"
    if here.has_weights and not absent:
        state = "whole"
    return Finding(f"{title}: {folder} ({state})", {"ok": True, "folder": folder, "absent": absent})


def check_ports(host: str, ports: list[int]) -> Finding:
    """Which ports a role could listen on, at `host`."""
    busy = [port for port in ports if not _is_free(host, port)]
    named = [str(port) for port in ports if port and port not in busy]
    found = f"free on {host}: {', '.join(named) or '-'}" + (" and one of the system's choice" if 0 not in busy else "")
    remedy = f"something listens on {', '.join(map(str, busy))}: end it, or choose another port" if busy else None
    return Finding(found, {"host": host, "busy": busy}, remedy)


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family, backlog=1):
            return True
    except OSError:
        return False


def check_wandb(mode: WandbMode) -> Finding:
    """Whether Weights & Biases would get figures; metrics.jsonl does without it."""
    version = describe_environment()["versions"]["wandb"]
    figures = {"mode": mode.name, "version": version}
    if version is None and mode is not WandbMode.disabled:
        return Finding(f"not installed, mode {mode.name}", figures, "pip install wandb, or tracking=none")
    return Finding(f"mode {mode.name}, version {version or '-'}", figures)


main = entry.command("doctor", DoctorSettings, run)

if __name__ == "__main__":
    main()
