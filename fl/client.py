"""LoRAClient: one site. Its own examples, a frozen base model, and one adapter that it receives, evaluates and trains.

Knows nothing about Flower or the other sites. What it gives out is tensors and scalars, never text or token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fl.adapters import Adapter, load_into, read_from
from fl.partition import client_documents
from fl.settings import FederatedProjectSettings, FederatedSettings
from lab.data import open_source, records
from lab.device import open_device, read_memory
from lab.examples import Split, batches, examples, split_examples
from lab.lora import add_lora
from lab.models import load_model
from lab.settings import DataSource, UserError, digest
from lab.training import EvalFigures, Proximal, TrainFigures, derive_seed, evaluate, train_steps


@dataclass(frozen=True)
class Site:
    """Whose examples a client reads."""

    index: int
    """Number of the client; with the seed and the round it fixes the order of its examples."""
    data_path: str | None = None
    """The site's own file or folder, all of it (deployment); None: its part of the shared source (simulation)."""


@dataclass(frozen=True)
class Base:
    """A frozen base model that carries one adapter, and its tokenizer."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


@dataclass(frozen=True)
class LoRAClient:
    """One site with its model; keeps nothing between rounds, so a new process gives the same answer."""

    project: FederatedProjectSettings
    seed: int
    site: Site
    base: Base
    split: Split

    def evaluate(self, adapter: Adapter) -> EvalFigures:
        """Loss of `adapter` on the site's held-out part. ValueError when it does not fit the model."""
        load_into(self.base.model, adapter)
        return evaluate(self.base.model, self.split.held_out, self.project.optimization.batch_size)

    def train(self, adapter: Adapter, server_round: int) -> tuple[dict[str, torch.Tensor], TrainFigures]:
        """`adapter` after `local_steps` steps on the site's training part. Rounds count from 1. Raises Diverged."""
        load_into(self.base.model, adapter)
        project, place = self.project, (server_round, self.site.index)
        order = derive_seed(self.seed, "order", *place)
        figures = train_steps(
            self.base.model,
            batches(self.split.train, project.optimization.batch_size, order),
            project.optimization,
            first_step=(server_round - 1) * project.local_steps,
            total_steps=project.rounds * project.local_steps,
            steps=project.local_steps,
            seed=derive_seed(self.seed, "dropout", *place),
            proximal=Proximal.around(self.base.model, project.proximal_mu) if project.proximal_mu else None,
        )
        return read_from(self.base.model), figures

    def peak_rss_bytes(self) -> int:
        """Largest resident size of this process so far."""
        return read_memory(self.base.device).peak_rss_bytes


# A worker process serves many clients and rounds: it keeps one base model, and the examples of every site it has seen.
_bases: dict[str, Base] = {}
_splits: dict[str, Split] = {}


def open_client(settings: FederatedSettings, site: Site) -> LoRAClient:
    """The client of `site`; the base model is loaded once per process. UserError for absent data or model."""
    base = open_base(settings)
    key = digest([settings.model, settings.project, settings.seed, {"index": site.index, "path": site.data_path}])
    if key not in _splits:
        _splits[key] = read_split(settings, site, base.tokenizer)
    return LoRAClient(settings.project, settings.seed, site, base, _splits[key])


def open_base(settings: FederatedSettings) -> Base:
    """The base model with an adapter on it, out of this process's memory when it is there."""
    device = open_device(settings.device)  # also sets this process's threads
    key = digest([settings.model, settings.project.lora, settings.device])
    if key not in _bases:
        _bases.clear()
        loaded = load_model(settings.model, device)
        _bases[key] = Base(
            add_lora(loaded.model, settings.model.lora_targets, settings.project.lora), loaded.tokenizer, device
        )
    return _bases[key]


def read_split(settings: FederatedSettings, site: Site, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Training and held-out examples of `site`, which opens nobody else's documents."""
    project, data = settings.project, settings.project.data
    if site.data_path is not None:
        if data.source not in (DataSource.jsonl, DataSource.text):  # the others would not look at the path
            raise UserError(f"project.data.source must be jsonl or text for sites' own files, got {data.source.name!r}")
        source = open_source(replace(data, path=site.data_path))
        documents = source.documents()
    else:
        source = open_source(data)
        documents = client_documents(source, site.index, project.num_clients, project.partition_by, settings.seed)
    tokenized = examples(records(source, documents), tokenizer, data.sequence_length)
    return split_examples(tokenized, data.held_out_fraction, settings.seed, data.max_examples, data.max_held_out)
