"""Commit, versions and machine of a run, recorded with every result."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lab", "fl", "speculative", "split", "matrix", "serve", "simulations")
"""Ours, with code in them; what else lists them (pyproject.toml, conf/matrix.yaml) is held to this by a test."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flwr", "ray", "hydra-core", "wandb")


@functools.cache
def describe_environment() -> dict[str, Any]:
    """`commit`, `versions`, `machine` as JSON values."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
    }


def version() -> str:
    """Text of `--version`: our version, and the commit where there is one."""
    number, here = _version("distributed-llm-lab") or "not installed", commit()
    return f"distributed-llm-lab {number}{f' (commit {here})' if here else ''}"


@functools.cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, `+` when files differ from it; null when installed without one.

    Reports in `benchmarks/` do not count: a run of several benchmarks writes them on its way.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks")
        return head + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
