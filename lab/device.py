"""The device that computes: cuda > mps > cpu, its precision, threads and memory."""

import ctypes
import logging
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lab.environment import describe_environment
from lab.settings import DeviceName, DeviceSettings, Dtype, UserError

log = logging.getLogger(__name__)

GIB = 2**30

TORCH_DTYPES = {
    Dtype.float64: torch.float64,
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
}


@dataclass(frozen=True)
class Memory:
    """One reading, in bytes; figures of the device are None if it is the CPU."""

    rss_bytes: int
    """Resident now (memory-mapped weights included)."""
    peak_rss_bytes: int
    """Largest resident size of this process so far."""
    device_used_bytes: int | None
    device_peak_bytes: int | None
    """Largest so far; MPS keeps no such counter, there it is the driver's allocation now."""
    device_total_bytes: int | None


def available() -> list[DeviceName]:
    """Devices of this machine, best first; always includes the CPU."""
    found = []
    if torch.cuda.is_available():
        found.append(DeviceName.cuda)
    if torch.backends.mps.is_available():
        found.append(DeviceName.mps)
    return [*found, DeviceName.cpu]


def choose_device(settings: DeviceSettings) -> torch.device:
    """The device that `settings` select; UserError if this machine lacks it."""
    present = available()
    name = present[0] if settings.name is DeviceName.auto else settings.name
    if name not in present:
        names = ", ".join(device.name for device in present)
        raise UserError(f"device.name must be one of auto, {names} on this machine, got {name.name}")
    return torch.device(name.name)


def open_device(settings: DeviceSettings) -> torch.device:
    """`choose_device`, with this process's thread count set."""
    device = choose_device(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return device


def hardware(device: torch.device) -> str:
    """The device as titles name it: the GPU's name, or the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = describe_environment()["machine"]
    return f"{device.type}: {machine['processor']}, {machine['cores']} cores"


def check_dtype(device: torch.device, dtype: Dtype) -> torch.dtype:
    """The torch dtype; UserError if the device cannot compute in it."""
    if device.type == "mps" and dtype is Dtype.float64:
        raise UserError("model.dtype must be float32, bfloat16 or float16 on mps, got float64")
    return TORCH_DTYPES[dtype]


def best_dtype(device: torch.device) -> Dtype:
    """The dtype for `model.dtype=auto` on this device: bfloat16 if it has instructions for it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has = not lacks_sixteen_bits(device, torch.bfloat16)
    return Dtype.bfloat16 if has else Dtype.float32


def lacks_sixteen_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is a 16-bit dtype that the device, a CPU, computes only number by number."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    mkldnn: Any = torch.ops.mkldnn
    has = mkldnn._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return not (torch.backends.mkldnn.is_available() and has())


def read_memory(device: torch.device) -> Memory:
    """Present memory of this process and of its device."""
    rss = int(psutil.Process().memory_info().rss)
    used, peak, total = _device_memory(device)
    return Memory(rss, max(rss, peak_rss_bytes()), used, peak, total)


def total_bytes(device: torch.device) -> int:
    """All memory of a device: its own, or else the machine's."""
    return _device_memory(device)[2] or int(psutil.virtual_memory().total)


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    try:  # VmHWM counts from exec; ru_maxrss on Linux would inherit the parent's size across fork
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
    except (OSError, StopIteration):
        return _peak_rss_elsewhere()


def forget_peak_rss() -> None:
    """Let the largest resident size begin anew, where the system can: Linux (`man 5 proc`, clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_elsewhere() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if platform.system() == "Darwin" else peak * 1024)


def _device_memory(device: torch.device) -> tuple[int | None, int | None, int | None]:
    """Used, peak, total."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), int(total)
    if device.type == "mps":
        driver = torch.mps.driver_allocated_memory()
        return torch.mps.current_allocated_memory(), driver, torch.mps.recommended_max_memory()
    return None, None, None


def give_back_freed_memory() -> None:
    """Has this process return large blocks to the system when they are freed, where its C library is glibc.

    glibc keeps them for later otherwise, and a step of training that frees and takes weight-sized blocks of different
    tensors leaves gaps: seen as 10 % more memory than the tensors have.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


LARGE_BLOCK_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # <malloc.h>


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that a clock read afterwards is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
