"""The benchmark's machines: the server that is measured has one core, its clients have the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.bench import pinned
from lab.command.entry import compose_settings
from lab.command.overrides import override
from lab.command.processes import listening
from lab.models.sources import load_tokenizer_only
from lab.settings import Dtype, Quantization
from serve.bench.client import Client
from serve.bench.settings import ServeBenchSettings
from speculative.bench.rig import model_overrides

MODEL_CORE, CLIENT_CORE = 0, 1
MODEL_ID = "bench"


class Rig(ExitStack):
    """Folder, text and processes of the benchmark."""

    def __init__(self, settings: ServeBenchSettings, folder: Path) -> None:
        super().__init__()
        self.settings, self.project, self.folder = settings, settings.project, folder
        self._started = 0
        self._servers: dict[tuple[str, ...], int] = {}
        """Ports of servers, by their overrides."""

    def __enter__(self) -> Self:
        self.enter_context(pinned(CLIENT_CORE))
        return self

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return load_tokenizer_only(self.settings.model)

    @cached_property
    def _prose(self) -> list[int]:
        """Ids of Python's own help topics, without their layout: many pieces of it are blank."""
        from pydoc_data.topics import topics

        tokenizer: Any = self.tokenizer
        text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
        return cast(list[int], tokenizer(text[:400_000], verbose=False).input_ids)

    def prose(self, tokens: int, number: int) -> str:
        """A text of about so many tokens; texts of other numbers begin differently."""
        ids = self._prose
        start = number * 997 % max(1, len(ids) - tokens)
        return cast(str, self.tokenizer.decode(ids[start : start + tokens]))

    def with_random_model(self) -> ServeBenchSettings:
        """The settings with `model=random`, whose passes take hardly any time."""
        model = compose_settings("serve_bench", ["model=random"], ServeBenchSettings).model
        own = replace(
            model,
            cache_dir=self.settings.model.cache_dir,
            dtype=Dtype.float32,
            quantization=Quantization.none,
        )
        return replace(self.settings, model=own)

    def words(self, settings: ServeBenchSettings, sessions: int = 1) -> list[str]:
        """Overrides of a process that holds the model."""
        return [
            *model_overrides(settings),
            "tracking=none",
            "network.port=0",
            f"device.threads={settings.device.threads}",
            f"project.context={self.project.context}",
            f"project.sessions={sessions}",
        ]

    @contextmanager
    def server(self, words: Sequence[str], *, core: int = MODEL_CORE, connections: int = 1) -> Iterator[Client]:
        """A server on a core, for all parts that need the same one; yields a client with so many connections."""
        own = (*words, f"project.model_id={MODEL_ID}")
        if own not in self._servers:
            folder = self.new_folder("server")
            journal = override("project.journal", folder / "journal")
            self._servers[own] = self.enter_context(self.on_core(core, "serve", [*own, journal], folder))
        address = f"http://127.0.0.1:{self._servers[own]}"
        with Client(address, MODEL_ID, self.project.request_seconds, connections) as client:
            yield client

    @contextmanager
    def on_core(self, core: int, module: str, words: Sequence[str], folder: Path) -> Iterator[int]:
        """A role of ours on a core; yields its port."""
        with ExitStack() as stack:
            with pinned(core):
                port = stack.enter_context(listening(module, words, folder, self.project.start_seconds))
            yield port

    def new_folder(self, name: str) -> Path:
        """A run folder that no other process has."""
        self._started += 1
        return self.folder / f"{name}-{self._started}"
