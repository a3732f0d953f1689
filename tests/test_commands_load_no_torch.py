"""Commands answer `--help` and refuse wrong settings before torch is loaded, which reads what `entry.main` sets."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = (
    *("serve.chat.__main__", "split.train", "split.learn", "split.infer", "split.serve", "split.merge", "split.plan"),
    *("speculative.drafter.__main__", "speculative.verifier.__main__"),
)


@pytest.mark.parametrize("module", [*COMMANDS, "lab.wire.tensors"])
def test_importing_a_command_loads_no_torch(module: str) -> None:
    """`lab.wire.tensors`, which does load it, is the negative control."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == str(module not in COMMANDS)
