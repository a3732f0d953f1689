"""Adapters on disk: after every round a PEFT folder that any program with peft can load, written whole or not at all.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's own, and the tensor file depends on the tensors alone;
`README.md` is a model card; `lab_adapter.json` records the base model, which a later run checks before it starts from
the folder. Knows nothing about rounds except their numbers.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig

from fl.adapters import Adapter, with_ranks
from fl.aggregation.parts import ranks_of
from fl.run.folders import round_folders
from lab.files import whole_folder
from lab.models.adapter import PREFIX, Fit, fit_adapter, fit_config, read_adapter, write_adapter
from lab.models.base_model import loading_code
from lab.models.peft_folder import recorded_identity

CARD_FILE = "README.md"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that an adapter belongs to."""

    name: str
    """Hub id or folder, as `from_pretrained` takes it."""
    digest: str
    """Digest of its tensors; equal digests mean equal models, whatever their names."""
    origin: str = ""
    """A sentence for the model card that says how to get it."""


@dataclass
class AdapterFolders:
    """`root/round-0000`, `root/round-0001`, ...: one PEFT folder per round, the highest is the latest.

    Whatever happens (Ctrl+C, a crash, a full disk), every `round-*` folder can be loaded.
    """

    root: Path
    _: KW_ONLY
    lora: LoraConfig
    """The adapter's own configuration."""
    base: BaseModel
    data_source: str
    """For the model card, as are all fields below."""
    num_clients: int
    weighting: str
    """Unit of a client's weight in the mean, in words."""
    commit: str
    """Commit of the program that writes."""

    def __post_init__(self) -> None:
        self.root = self.root.absolute()
        self.lora = copy.deepcopy(self.lora)

    def write(
        self,
        server_round: int,
        adapter: Adapter,
        metrics: Mapping[str, float],
        add: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Write one round's folder and return its absolute path; round 0 is the adapter that the run starts from.

        `metrics` go into the model card; `add` writes more files into the folder, which appear together with the
        adapter. FileExistsError when the round is there already.
        """
        folder = self._folder(server_round)
        if folder.exists():
            raise FileExistsError(f"{folder} is there already: an adapter of another run?")
        with whole_folder(folder) as unfinished:
            self._fill(unfinished, server_round, adapter, metrics)
            add(unfinished)
        return folder

    def adopt(self, root: Path) -> Path:
        """Take over all rounds below another run's `root`, all at once, and return the folder of the last one.

        A file is the same file in both places where the disk can do that: no file of a round ever changes.
        """
        with whole_folder(self.root) as unfinished:
            for folder in round_folders(root).values():
                shutil.copytree(folder, unfinished / folder.name, copy_function=_link)
        return max(round_folders(self.root).items())[1]

    def _folder(self, server_round: int) -> Path:
        return self.root / f"round-{server_round:04d}"

    def _fill(self, folder: Path, server_round: int, adapter: Adapter, metrics: Mapping[str, float]) -> None:
        about = {"name": self.base.name, "round": server_round, "commit": self.commit}
        write_adapter(folder, self._config(adapter), adapter, self.base.name, self.base.digest, **about)
        (folder / CARD_FILE).write_text(self._card(server_round, metrics), encoding="utf-8")

    def _config(self, adapter: Adapter) -> LoraConfig:
        """PEFT's config of an adapter: it has further rows where an aggregation kept them."""
        ranks = ranks_of({name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in adapter.items()})
        if set(ranks.values()) == {self.lora.r}:
            return self.lora
        return with_ranks(self.lora, ranks, self.lora.lora_alpha / self.lora.r)

    def _card(self, server_round: int, metrics: Mapping[str, float]) -> str:
        figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
        return f"""---
base_model: {json.dumps(self.base.name, ensure_ascii=False)}
library_name: peft
tags: [lora, federated-learning]
---

# Adapter after {server_round} federated rounds

A LoRA adapter (rank {self.lora.r}) for `{self.base.name}`, trained by {self.num_clients} clients on their own data,
which stayed with them; only adapters were exchanged and averaged, weighted by the clients' numbers of {self.weighting}.

{self.base.origin}

| | |
|---|---|
| base model digest | `{self.base.digest}` |
| data | {self.data_source} |
| rounds | {server_round} |
| commit | `{self.commit}` |
{figures}

{loading_code(self.base.name, str(self._folder(server_round)))}
"""


def latest_adapter(root: Path) -> Path | None:
    """The folder of the highest round below root; None if there is none."""
    rounds = round_folders(root)
    return rounds[max(rounds)] if rounds else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def load_adapter(
    folder: Path,
    base: BaseModel,
    lora: LoraConfig,
    whole: PreTrainedConfig,
    key: str = "project.warm_start",
    *,
    more_rows: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder, to start from on `base` (a model of config `whole`) with `lora`.

    `key` is the setting that names the folder; `more_rows` allows ranks above those of `lora`.

    Clients make their adapter from the run's settings and never see the folder, so it must fit those settings.

    Raises:
        UserError: The folder is broken, of a kind that is not supported, or does not fit the model.
        ValueError: It is for another model (by digest; by name in a folder that we did not write), or has other
            modules, ranks, scales or trained weights than the run's. Names both sides.
    """
    adapter = read_adapter(folder, key)
    _check_base(adapter.place, adapter.config(), base)
    theirs, ours = fit_adapter(adapter, whole), fit_config(lora, whole)
    if more_rows and all(rank <= _ranks(theirs).get(name, 0) for name, rank in _ranks(ours).items()):
        # The run's own modules in the folder's ranks; nothing but the ranks may differ.
        ranks = ranks_of({name.removeprefix(PREFIX): shape for name, shape in theirs.shapes.items()})
        ours = fit_config(with_ranks(lora, ranks, lora.lora_alpha / lora.r), whole)
    for what, found, wanted in (
        ("a LoRA of rank", _ranks(theirs), _ranks(ours)),
        ("a scale", theirs.scales, ours.scales),
        ("the weights", theirs.shapes, ours.shapes),
    ):
        for name in sorted(found.keys() | wanted.keys()):
            one, other = found.get(name, "none"), wanted.get(name, "none")
            if one != other:
                raise ValueError(f"adapter {folder} has {what} {one} at {name}, the run {other}")
    return adapter.tensors(ours.shapes)


def _ranks(fit: Fit) -> dict[str, int]:
    return {name: shape[0] for name, shape in fit.shapes.items() if name.endswith(".lora_A.weight")}


def _check_base(folder: Path, saved: LoraConfig, base: BaseModel) -> None:
    if (identity := recorded_identity(folder)) is not None:
        if identity != base.digest:
            theirs = f"{saved.base_model_name_or_path} (digest {identity})"
            ours = f"{base.name} (digest {base.digest})"
            raise ValueError(f"adapter {folder} is for {theirs}, the run uses {ours}")
    elif saved.base_model_name_or_path != base.name:
        raise ValueError(f"adapter {folder} is for {saved.base_model_name_or_path}, the run uses {base.name}")
    else:
        log.warning("adapter %s records no digest of its base model; only the name %s was compared", folder, base.name)
