"""Devices this machine has not are played by fakes: what is chosen, refused and read."""

from __future__ import annotations

import mmap
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lab import device
from lab.settings import DeviceName, DeviceSettings, Dtype, UserError


def settings(name: str, threads: int = 0) -> DeviceSettings:
    return DeviceSettings(name=DeviceName[name], threads=threads, compile="auto")


def have(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)


@pytest.mark.parametrize(
    ("present", "best"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), (("cuda",), "cuda"), ((), "cpu")]
)
def test_auto_takes_the_best(monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], best: str) -> None:
    have(monkeypatch, *present)
    assert device.open_device(settings("auto")).type == best
    assert device.open_device(settings("cpu")).type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    have(monkeypatch)
    with pytest.raises(UserError, match=f"^device.name must be one of auto, cpu on this machine, got {name}$"):
        device.open_device(settings(name))


def test_threads_are_set_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    device.open_device(settings("cpu", threads=0))
    device.open_device(settings("cpu", threads=3))
    assert asked == [3]


def test_threads_really_change() -> None:
    before = torch.get_num_threads()
    try:
        device.open_device(settings("cpu", threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_float64_needs_another_device_than_mps() -> None:
    mps, cpu = torch.device("mps"), torch.device("cpu")
    with pytest.raises(UserError, match=r"^model.dtype must be float32, .* on mps, got float64$"):
        device.check_dtype(mps, Dtype.float64)
    assert device.check_dtype(mps, Dtype.bfloat16) is torch.bfloat16
    named = [dtype for dtype in Dtype if dtype is not Dtype.auto]
    assert [device.check_dtype(cpu, dtype).itemsize for dtype in named] == [8, 4, 2, 2]


@pytest.mark.parametrize(("has", "best"), [(True, Dtype.bfloat16), (False, Dtype.float32)])
def test_the_best_dtype_has_sixteen_bits_where_the_device_has(
    has: bool, best: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: has)
    monkeypatch.setattr(device, "lacks_sixteen_bits", lambda where, dtype: not has)
    assert {device.best_dtype(torch.device(name)) for name in ("cuda", "mps", "cpu")} == {best}


def test_only_sixteen_bits_of_a_cpu_can_lack() -> None:
    assert not device.lacks_sixteen_bits(torch.device("cpu"), torch.float32)
    assert not device.lacks_sixteen_bits(torch.device("meta"), torch.bfloat16)


def test_cpu_memory_follows_an_allocation() -> None:
    before = device.read_memory(torch.device("cpu"))
    block = mmap.mmap(-1, 64 * 2**20)  # fresh pages: an allocator might hand out memory that is resident already
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    during = device.read_memory(torch.device("cpu"))
    assert during.rss_bytes - before.rss_bytes > 48 * 2**20
    block.close()
    after = device.read_memory(torch.device("cpu"))
    assert after.peak_rss_bytes > during.rss_bytes - 4 * 2**20, "the peak stays (Linux counts it in batches)"
    assert (after.device_used_bytes, after.device_peak_bytes, after.device_total_bytes) == (None, None, None)
    device.forget_peak_rss()
    forgotten = device.read_memory(torch.device("cpu"))
    if sys.platform == "linux":
        assert forgotten.peak_rss_bytes < during.rss_bytes - 48 * 2**20


def test_cuda_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(total_memory=7))
    reading = device.read_memory(torch.device("cuda"))
    assert (reading.device_used_bytes, reading.device_peak_bytes, reading.device_total_bytes) == (3, 5, 7)


def test_mps_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 7)
    reading = device.read_memory(torch.device("mps"))
    assert (reading.device_used_bytes, reading.device_peak_bytes, reading.device_total_bytes) == (3, 5, 7)


@pytest.mark.skipif(sys.platform == "win32", reason="resource exists on POSIX only")
@pytest.mark.parametrize(("system", "unit"), [("Darwin", 1), ("FreeBSD", 1024)])
def test_peak_without_proc(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    import resource

    monkeypatch.setattr(device.platform, "system", lambda: system)  # type: ignore[attr-defined]
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1000))
    assert device._peak_rss_elsewhere() == 1000 * unit


def test_peak_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    process: Any = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=11))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert device._peak_rss_elsewhere() == 11


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_synchronize_waits_for_the_device_it_is_given(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    device.synchronize(torch.device(kind))
    assert waited == ([] if kind == "cpu" else [kind])
