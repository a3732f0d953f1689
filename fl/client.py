"""LoRAClient: one site. Its own examples, a frozen base model, and one adapter that it receives, evaluates and trains.

Knows nothing about Flower or the other sites. It returns tensors and scalars only, never text or token ids.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fl.adapters import Adapter, hold_frozen, load_into, lora_parameters, read_from, resize
from fl.aggregation.parts import cut, of_halves, scaled, trained_halves
from fl.partition import client_documents, partition
from fl.settings import FederatedProjectSettings, FederatedSettings, Weighting
from lab.device import open_device, read_memory
from lab.files import path_of
from lab.learning.data import Document, Source, open_source
from lab.learning.examples import Example, ExampleReader, MalformedData, Split, batches, split_examples
from lab.learning.records import MalformedRecord
from lab.learning.training import Proximal, TrainFigures, derive_seed, evaluate, train_steps
from lab.models.lora import add_lora
from lab.models.sources import load_model, model_identity
from lab.settings import DataSource, LoraSettings, UserError, digest, user_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """The source of a client's examples."""

    index: int
    """Number of the client; with the seed and the round it fixes the order of its examples."""
    data_path: str | None = None
    """The site's own file or folder (deployment); None: its part of the shared source (simulation)."""


@dataclass(frozen=True)
class Base:
    """A frozen base model that carries one adapter, and its tokenizer."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


@dataclass(frozen=True)
class LoRAClient:
    """One site with its model: `load` an adapter, then `evaluate` or `train` it.

    It trains the first rows of the adapter, as many as its own rank; it holds the rest frozen. Adapters travel in the
    scale of the run (`project.lora`), whatever the site's own is. Keeps no state between rounds, so a new process gives
    the same reply.
    """

    project: FederatedProjectSettings
    seed: int
    site: Site
    base: Base
    split: Split

    def load(self, adapter: Adapter) -> None:
        """Put `adapter` on the base model. ValueError when it does not fit."""
        trained, rest = cut(adapter, self.lora.rank)
        hold_frozen(self.base.model, rest, self.project.lora.scale)
        resize(self.base.model, self.lora.rank, self.lora.alpha)
        load_into(self.base.model, scaled(trained, self.project.lora.scale / self.lora.scale))

    def evaluate(self) -> float:
        """Loss of the loaded adapter on the site's held-out part, which is not empty."""
        return evaluate(self.base.model, self.split.held_out, self.project.optimization.batch_size)

    def train(self, server_round: int) -> tuple[dict[str, torch.Tensor], TrainFigures]:
        """What the round trains of the loaded adapter, after `local_steps` steps on the site's training part. Rounds
        count from 1.

        Raises Diverged.
        """
        project, place = self.project, (server_round, self.site.index)
        order = derive_seed(self.seed, "order", *place)
        halves = trained_halves(project.aggregation, server_round)
        with training_only(self.base.model, halves):
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
        trained = of_halves(read_from(self.base.model), halves)
        return scaled(trained, self.lora.scale / project.lora.scale), figures

    @property
    def lora(self) -> LoraSettings:
        """The adapter that this site trains."""
        with user_errors():
            return self.project.lora_of(self.site.index)

    def weight(self, part: Sequence[Example]) -> int:
        """Weight of the training or held-out part in the mean over all sites."""
        return weight_of(part, self.project.weighting)

    def peak_rss_bytes(self) -> int:
        """Largest resident size of this process since the message came; elsewhere than on Linux, since it started."""
        return read_memory(self.base.device).peak_rss_bytes


# A worker process serves many clients and rounds: it keeps one base model, and the examples of every site it served.
_bases: dict[str, Base] = {}
_splits: dict[str, Split] = {}
_splits_of = ""
"""The settings that the examples were read with: those of another run are not kept."""


def open_client(settings: FederatedSettings, site: Site) -> LoRAClient:
    """Client of `site`; the base model is loaded once per process. UserError for absent data or model."""
    global _splits_of
    base, run = open_base(settings), digest([settings.model, settings.project, settings.seed])
    if run != _splits_of:
        _splits.clear()
        _splits_of = run
    files = stamps(site.data_path or settings.project.data.path)
    key = digest({"index": site.index, "path": site.data_path, "files": files})
    if key not in _splits:
        _splits[key] = split = read_split(settings, site, base.tokenizer)
        for line in (split.counts.line(), *split.counts.warnings(settings.project.data.sequence_length)):
            log.info("site %d: %s", site.index, line)  # the server reports it to the user
    return LoRAClient(settings.project, settings.seed, site, base, _splits[key])


def stamps(data_path: str | None) -> list[tuple[str, int, int, int]]:
    """Name, size and times of a site's own files: examples that are kept are read again when a file has changed."""
    if data_path is None:
        return []
    root = path_of(data_path, "data-path")
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root] * root.exists()
    found = [(str(file), file.stat()) for file in files]
    return [(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in found]


@contextmanager
def training_only(model: PeftModel, halves: tuple[str, ...]) -> Iterator[None]:
    """Within the block, the other factors of the model's adapter are frozen."""
    parameters = lora_parameters(model)
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(any(half in name for half in halves))
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def open_base(settings: FederatedSettings) -> Base:
    """The base model with an adapter on it, kept in memory for the next call with the same settings."""
    device = open_device(settings.device)  # also sets this process's threads
    key = digest([settings.model, model_identity(settings.model), settings.project.lora, settings.device])
    if key not in _bases:
        _bases.clear()
        _splits.clear()  # tokens of another model's tokenizer
        loaded = load_model(settings.model, device)
        _bases[key] = Base(
            add_lora(loaded.model, settings.model.lora_targets, settings.project.lora), loaded.tokenizer, device
        )
    return _bases[key]


def read_split(settings: FederatedSettings, site: Site, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Training and held-out examples of `site`, with counts of its lines; reads no other site's documents.

    UserError if there is nothing to train on; MalformedData for a line that cannot be learnt from.
    """
    project, data = settings.project, settings.project.data
    if site.data_path is not None:
        if data.source not in (DataSource.jsonl, DataSource.text):  # other sources ignore the path
            raise UserError(f"project.data.source must be jsonl or text for sites' own files, got {data.source.name!r}")
        source = open_source(replace(data, path=site.data_path))
        documents = source.documents()
    else:
        source = open_source(data)
        documents = client_documents(source, site.index, project.num_clients, project.partition_rule, settings.seed)
    return split_documents(settings, source, documents, tokenizer)


def read_all(settings: FederatedSettings, tokenizer: PreTrainedTokenizerBase) -> list[Split]:
    """`read_split` of every site of a shared source, in order of their indices.

    MalformedData names lines of all sites. UserError also when no site holds anything out.
    """
    project = settings.project
    source = open_source(project.data)
    splits: list[Split] = []
    malformed: list[MalformedRecord] = []
    unusable: UserError | None = None
    documents = source.documents()
    for part in partition(documents, project.num_clients, project.partition_rule, settings.seed):
        try:
            splits.append(split_documents(settings, source, part, tokenizer))
        except MalformedData as error:
            malformed += error.malformed
        except UserError as error:  # a site without anything to train on; malformed lines are reported first
            unusable = unusable or error
    if malformed:
        raise MalformedData(malformed, len(documents))
    if unusable:
        raise unusable
    if not any(split.held_out for split in splits):
        rule = f"hold out an example of at least one client ({len(documents)} lines, seed {settings.seed})"
        raise UserError(f"project.data.held_out_fraction must {rule}, got {project.data.held_out_fraction}")
    return splits


def split_documents(
    settings: FederatedSettings, source: Source, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Split:
    """Training and held-out part of some documents, with counts of their lines."""
    data = settings.project.data
    reader = ExampleReader(tokenizer, data.sequence_length)
    split = split_examples(reader.read(source, documents), data.held_out_fraction, settings.seed, *data.caps)
    return replace(split, counts=reader.counts + split.counts).with_something_to_train_on(data.sequence_length)


def weight_of(part: Sequence[Example], weighting: Weighting) -> int:
    """Number of examples, or of the tokens that the loss counts."""
    return len(part) if weighting is Weighting.examples else sum(example.targets for example in part)
