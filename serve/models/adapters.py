"""Adapters as models of their own: each shares the base model's tensors, and has a cache and a forward thread.

A folder of adapters is looked at now and then. A PEFT folder in it is offered under its own name; of the rounds that a
federation writes (`round-0001`, ...) the newest one is offered as `latest`. A text keeps the adapter that it began
with: one that is replaced or unloaded ends when its last text does.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.modeling_utils import PreTrainedModel

from lab.faults import Fault
from lab.files import path_of
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from serve.faults import RequestFault
from serve.models.scheduled import ScheduledWriter
from serve.models.served import Models, ServedModel
from serve.models.tokens import ModelTexts
from serve.settings import ServeSettings
from speculative.verifier.target import local_target

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
LATEST = "latest"
"""Model id of a federation's newest round."""
ROUNDS = "adapters"
"""Folder of the rounds in a federation's results."""
_NAME = re.compile(r"[\w.:-]{1,100}\Z", re.ASCII)
_ROUND = re.compile(r"round-(\d+)\Z")


class Turns:
    """A lock that is given in the order in which it was asked for, so that no model starves the others."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._now = 0
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it within the block."""
        with self._changed:
            own = next(self._numbers)
            self._changed.wait_for(lambda: own == self._now)
        try:
            yield
        finally:
            with self._changed:
                self._now += 1
                self._changed.notify_all()


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with modules of its own and the same tensors: an adapter can be put on it."""
    tensors = itertools.chain(model.parameters(), model.buffers(), _other_tensors(model))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _other_tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Tensors that modules hold without registering them, such as packed weights."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class Found:
    """An adapter on the disk."""

    id: str
    folder: Path


def find_adapters(root: Path) -> list[Found]:
    """The adapters in a folder: those with names of their own, and a federation's newest round."""
    rounds: list[tuple[int, Path]] = []
    found = []
    for folder in [*_folders(root), *_folders(root / ROUNDS)]:
        if not (folder / CONFIG).is_file():
            continue
        if number := _ROUND.match(folder.name):
            rounds.append((int(number[1]), folder))
        elif folder.parent == root:
            found.append(Found(folder.name, folder))
    if rounds:
        found.append(Found(LATEST, max(rounds)[1]))
    return sorted(found, key=lambda one: one.id)


def _changed_at(folder: Path) -> int:
    """Time of the last change of a file in it, in nanoseconds."""
    try:
        return max(path.stat().st_mtime_ns for path in [folder, *folder.iterdir()])
    except OSError:
        return 0


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def root_of(settings: ServeSettings) -> Path:
    """The folder of all adapters. UserError if it is none."""
    root = path_of(str(settings.project.adapters), "project.adapters")
    if not root.is_dir():
        raise UserError(f"project.adapters must be a folder, got {str(root)!r}")
    return root


class Adapters:
    """The adapters of a server.

    Args:
        settings: The server's.
        base: The base model, without an adapter.
        models: All models; adapters are added to it and taken out.
        turns: Whose turn it is to compute.
        call_soon: Runs a function in the event loop's thread (`call_soon_threadsafe`).
        is_used: Whether a request uses a model.
    """

    def __init__(
        self,
        settings: ServeSettings,
        base: PreTrainedModel,
        models: Models,
        turns: Turns,
        call_soon: Callable[..., object],
        is_used: Callable[[ServedModel], bool],
    ) -> None:
        self._settings, self._base, self._models = settings, base, models
        self._turns, self._call_soon, self._is_used = turns, call_soon, is_used
        self.root = root_of(settings)
        self._tokenizer = load_tokenizer_only(settings.model)
        self._unloaded: set[str] = set()
        """Ids that a client has unloaded: the folder is not looked at for them."""
        self._bad: dict[Path, int] = {}
        """Folders that were found not to be adapters of this base, each as it was at its last change: it may have been
        half written."""
        self._changes = asyncio.Lock()

    def open(self, found: Found) -> ServedModel:
        """Put an adapter on the base. UserError for one of another base."""
        model = replace(self._settings.model, adapter=str(found.folder))
        settings = replace(self._settings, model=model)
        writer = ScheduledWriter(
            local_target(settings, sharing(self._base)), settings.project, self._call_soon, self._turns.turn
        )
        texts = ModelTexts(
            self._tokenizer, writer.end_ids, vocabulary_size=writer.vocabulary_size, context=writer.context
        )
        parent = next(iter(self._models.by_id))
        return ServedModel(found.id, writer, texts, parent=parent, folder=found.folder)

    async def look(self) -> None:
        """Offer what is new in the folder. An adapter that does not fit is a warning, once."""
        async with self._changes:
            for found in find_adapters(self.root):
                offered = self._models.by_id.get(found.id)
                is_known = offered is not None and (offered.folder == found.folder or found.id != LATEST)
                is_base = offered is not None and offered.parent is None
                changed = _changed_at(found.folder)
                is_bad = self._bad.get(found.folder) == changed
                if is_base or is_known or is_bad or found.id in self._unloaded:
                    continue
                try:
                    self._check_room(found.id)
                    self._replace(await asyncio.to_thread(self.open, found))
                    log.info("model %s is now %s", found.id, found.folder)
                except Exception as error:  # of torch, of safetensors: one folder must not end the server
                    self._bad[found.folder] = changed
                    log.warning("adapter %s is not served: %s", found.folder, " ".join(str(error).split()))

    async def follow(self, seconds: float) -> None:
        """Look at the folder for ever, and end adapters that were replaced and have no text any more."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()
            await self.tidy()

    async def tidy(self) -> None:
        """End replaced adapters without a text."""
        for model in [one for one in self._models.retired if not self._is_used(one)]:
            self._models.retired.remove(model)
            await asyncio.to_thread(model.writer.close)

    async def load(self, name: str, path: str) -> ServedModel:
        """Offer an adapter below the folder under a name. RequestFault for a path outside, and for a bad adapter."""
        try:
            below = (self.root / path).resolve().relative_to(self.root.resolve())
            folder = self.root / below
            is_inside = (folder / CONFIG).is_file()
        except (OSError, ValueError):
            is_inside = False
        if not is_inside:
            rule = "lora_path must be a PEFT folder below the server's folder of adapters"
            raise RequestFault(400, f"{rule}, got {path[:200]!r}", param="lora_path")
        async with self._changes:
            if not _NAME.match(name) or name == LATEST:
                rule = f"lora_name must be 1 to 100 letters, digits and ._:-, and not {LATEST}"
                raise RequestFault(400, f"{rule}, got {name[:100]!r}", param="lora_name")
            if name in self._models.by_id:
                raise RequestFault(400, f"lora_name must be a new one, got {name[:200]!r}", param="lora_name")
            try:
                self._check_room(name)
                model = await asyncio.to_thread(self.open, Found(name, folder))
            except (UserError, Fault) as error:
                raise RequestFault(400, str(error), param="lora_path") from None
            self._unloaded.discard(name)
            self._replace(model)
        return model

    async def unload(self, name: str) -> None:
        """Offer an adapter no more; its texts are finished."""
        async with self._changes:
            model = self._models.by_id.get(name)
            if model is None or model.parent is None:
                raise RequestFault(404, f"lora_name must be a loaded adapter, got {name[:200]!r}", param="lora_name")
            self._unloaded.add(name)
            self._models.retire(name)

    async def of_fingerprint(self, fingerprint: str, folder: str | None) -> ServedModel | None:
        """The model with which a stream began: one that is offered or was replaced, or an older round's adapter, which
        is opened again. None if it is gone."""
        async with self._changes:
            known = self._models.with_fingerprint(fingerprint)
            if known is not None or folder is None:
                return known
            place = self.root / folder  # from a journal of ours, which no client writes
            if not (place / CONFIG).is_file():
                return None
            try:
                model = await asyncio.to_thread(self.open, Found(place.name, place))
            except (UserError, Fault, OSError):
                return None
            self._models.begin(model)
            self._models.retired.append(model)
            return model if model.fingerprint == fingerprint else None

    def name_of(self, model: ServedModel) -> str | None:
        """The folder of a model relative to that of all adapters, for journals."""
        return None if model.folder is None else str(model.folder.relative_to(self.root))

    def _check_room(self, name: str) -> None:
        """UserError if there are as many adapters as may be."""
        most = self._settings.project.max_adapters
        count = sum(1 for model in self._models.all() if model.parent is not None)
        if count - (name in self._models.by_id) >= most:
            raise UserError(f"adapters must be at most {most} at a time (project.max_adapters), got another one")

    def _replace(self, model: ServedModel) -> None:
        self._models.retire(model.id)
        self._models.add(model)
