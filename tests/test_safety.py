"""What is shipped unpickles nothing: no pickle, torch.load, eval of ours; the one exception is torch's own RPC."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lab import environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (*environment.PACKAGES, "conf")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load", "yaml.load", "pandas.read_pickle"}
RPC = "torch.distributed."
"""torch's RPC is pickle; SECURITY.md says what it is for. Only the split pillar uses it."""


def findings(source: str) -> list[str]:
    """What a module imports or calls that could run a stranger's bytes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
            found += [alias.name for alias in node.names if alias.name.startswith("torch.distributed.rpc")]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.split(".")[0] in MODULES or module.startswith("torch.distributed.rpc") else []
            found += [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in CALLS]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
    return found


def test_no_module_unpickles() -> None:
    modules = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(modules) > 80
    found = {file.relative_to(ROOT): said for file in modules if (said := findings(file.read_text(encoding="utf-8")))}
    assert {file.parts[0] for file in found} == {"split"}, found
    assert all(word.startswith(RPC) for said in found.values() for word in said), found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, _pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load(file)",
        "from torch import load",
        "from joblib.numpy_pickle import read",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "import torch.distributed.rpc as rpc",
    ],
)
def test_each_of_them_would_be_found(line: str) -> None:
    assert findings(line)
