"""A command that is over in no time, and does what its prompt says: figures, or one of the ways to fail.

It reads its words as a command would, without Hydra's second of imports. FAKE_LOG names a file that gets a line a
start: what it was told, and its process id.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

if __name__ != "__main__":
    import lab.doctor  # noqa: F401  # whose settings it takes, for who composes them


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    what, size, seed = words.get("prompt", "ok"), int(words["model.seed"]), int(words.get("seed", 0))
    if log := os.environ.get("FAKE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{what} {size} {seed} {os.getpid()}\n")
    print("something on the way")
    print("progress", file=sys.stderr)
    match what:
        case "hang":
            time.sleep(3600)
        case "crash":
            raise RuntimeError(f"boom at {size}")
        case "killed":
            os.kill(os.getpid(), 9)
        case "user":
            print("error: model.seed must be something else, got 1", file=sys.stderr)
            raise SystemExit(2)
        case "silent":
            return
        case "memory":
            hold(2**30)
        case "child-memory":
            subprocess.run([sys.executable, __file__, "prompt=memory", "model.seed=1"], check=True)
        case "cuda":
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB")
        case "slow":
            time.sleep(2.0)
        case "gate":
            while not Path(f"{os.environ['FAKE_LOG']}.go-{size}").exists():
                time.sleep(0.02)
    figures = {
        "status": "ok",
        "speed": 100.0 * size + seed,
        "run_folder": "x",
        "commit": "abc",
        "loss": {"end": 1 / size},
    }
    print(json.dumps(figures))


def hold(size: int) -> None:
    """Resident, not only reserved."""
    block = bytearray(os.urandom(1)) * size
    time.sleep(3600)
    assert block


if __name__ == "__main__":
    main()
