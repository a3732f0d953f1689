"""A real server whose random model has a chat template, for tests of what clients send and read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from lab.command.entry import compose_settings
from lab.models.sources import load_model
from serve.settings import ServeSettings
from tests.speculative.processes import Role, role

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONTEXT = 512
MODEL = "random-1M"
WORDS = ("model=random", "tracking=none", "network.port=0", "device.threads=1", f"project.context={CONTEXT}")


def chat_model(folder: Path) -> Path:
    """The random model of `conf/model/random.yaml` in a folder, with a chat template."""
    loaded = load_model(compose_settings("serve", "model=random", ServeSettings).model, torch.device("cpu"))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.chat_template = TEMPLATE
    loaded.tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def chat_server(folder: Path, *words: str) -> Iterator[Role]:
    """A server until the end of the block; `folder` takes its model and its journals."""
    model = folder / "model"
    if not model.exists():
        chat_model(model)
    own = (
        "model.source=path",
        f"model.path={model}",
        f"project.model_id={MODEL}",
        f"project.journal={folder / 'journal'}",
    )
    with role("serve", *WORDS, *own, *words, environment={**os.environ, "OMP_NUM_THREADS": "1"}) as started:
        yield started


def base_url(server: Role) -> str:
    """Where its API begins."""
    return str(server.ready["base_url"])


def taken(server: Role, key: str = "none") -> int:
    """Sequences that its model runs, or that wait."""
    headers = {"Authorization": f"Bearer {key}"}
    [counts] = httpx.get(f"http://127.0.0.1:{server.port}/status", headers=headers).json()["models"].values()
    return int(counts["running"]) + int(counts["waiting"])
