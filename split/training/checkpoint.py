"""Checkpoints of split training: every shard writes its own part, a manifest makes a step valid once all are written.

    <root>/<run>/step-00000020/shard-1/weights.safetensors    trainable weights, by their names in the whole model
                                       optimizer.safetensors  moments, masters of 16-bit weights
                                       part.json              the run and step that the part belongs to
                              /manifest.json                  the digest of every part, the losses so far

Schedule, order of the data and dropout are functions of the step and of the run's seed: the step is their state. Parts
are on the machine of their shard, the manifest on the trainer's; on one machine all of them are in one folder.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.file_digests import sha256_of
from lab.files import whole_folder, write_whole
from lab.settings import UserError
from split.training.messages import Recipe

WEIGHTS, OPTIMIZER, PART, MANIFEST = "weights.safetensors", "optimizer.safetensors", "part.json", "manifest.json"
_STEP = re.compile(r"^step-(\d{8})$")


def step_folder(root: Path, run: str, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return root / run / f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Identity of one shard's part of a checkpoint."""

    step: int
    shard: int
    shards: int
    first: int
    last: int
    """Layers first..last - 1."""
    recipe: dict[str, Any]


def part_of(step: int, shard: int, shards: int, layers: range, recipe: Recipe) -> Part:
    """The part of one shard after `step` steps."""
    fields = msgspec.structs.asdict(recipe) | {"train": recipe.train.name}
    return Part(step=step, shard=shard, shards=shards, first=layers.start, last=layers.stop, recipe=fields)


class Parts:
    """The parts of one shard (`place`, from 0) in the checkpoints of one run, below this machine's `root`."""

    def __init__(self, root: Path, run: str, place: int) -> None:
        self._root, self._run, self._place = root, run, place

    def folder(self, step: int) -> Path:
        """The folder of the part after `step` steps."""
        return step_folder(self._root, self._run, step) / f"shard-{self._place + 1}"

    def write(self, part: Part, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> str:
        """Write a part, whole or not at all; return its digest."""
        folder = self.folder(part.step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as unfinished:
            for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
                plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(plain, unfinished / name, metadata={"format": "pt"})
            (unfinished / PART).write_text(json.dumps(vars(part), indent=2) + "\n", encoding="utf-8")
            return _digest(unfinished)

    def read(self, part: Part, digest: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer state of a part. UserError for one that is missing, another or damaged."""
        folder = self.folder(part.step)
        if not (folder / PART).exists():
            raise UserError(f"the checkpoint's part of shard {part.shard + 1} must be at {str(folder)!r}, and is not")
        found = json.loads((folder / PART).read_text(encoding="utf-8"))
        if found != json.loads(json.dumps(vars(part))):
            raise UserError(f"the checkpoint's part of shard {part.shard + 1} must be {vars(part)}, got {found}")
        if _digest(folder) != digest:
            raise UserError(f"the checkpoint's part at {str(folder)!r} must be as it was written, and is not")
        return load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)

    def forget_before(self, step: int) -> None:
        """Remove the parts of earlier steps."""
        for folder in _steps(self._root / self._run):
            if folder[0] < step:
                shutil.rmtree(folder[1] / f"shard-{self._place + 1}", ignore_errors=True)


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """Record that makes the parts of one step a checkpoint."""

    run: str
    step: int
    model: str
    """`lab.models.sources.model_identity` of the base model."""
    dtype: str
    cuts: list[int]
    """First layer of each shard, then the model's number of layers."""
    digests: list[str]
    """Digest of each shard's part."""
    recipe: Recipe
    optimization: dict[str, Any]
    data: dict[str, Any]
    total_steps: int
    micro_batches: int
    seed: int
    loss_by_step: list[float]
    data_digest: str = ""
    """`split.training.data.examples_digest` of the examples; empty if an older version wrote the manifest."""
    altered_at: int = 0
    """The last step after which the data or the number of steps changed; 0: never."""

    @property
    def layers(self) -> list[range]:
        """Layers of each shard."""
        return [range(first, last) for first, last in pairwise(self.cuts)]

    @property
    def cut(self) -> str:
        """The layers as text, such as `0:2, 2:4`."""
        return ", ".join(f"{part.start}:{part.stop}" for part in self.layers)


def write_manifest(root: Path, manifest: Manifest) -> Path:
    """Make the step valid; return its folder."""
    folder = step_folder(root, manifest.run, manifest.step)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode() + "\n")
    return folder


def forget_steps_before(root: Path, run: str, step: int) -> None:
    """Remove the manifests of earlier steps, and their folders if nothing else is in them."""
    for number, folder in _steps(root / run):
        if number < step:
            (folder / MANIFEST).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def read_manifest(folder: Path, key: str = "project.resume") -> Manifest:
    """The manifest of a step's folder. UserError, with its key, for a folder that has none, or a broken one."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{key} must be a step's folder with a {MANIFEST}, got {str(folder)!r} ({error})") from None


def latest_step(folder: Path, key: str = "project.resume") -> Path:
    """The newest valid step of a run's folder, or the step's folder itself. UserError, with `key`, if there is none."""
    if (folder / MANIFEST).exists():
        return folder
    valid = [place for _, place in _steps(folder) if (place / MANIFEST).exists()]
    if not valid:
        raise UserError(f"{key} must be a checkpoint with at least one valid step, got {str(folder)!r}")
    return valid[-1]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The steps of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((int(found[1]), place) for place in folder.iterdir() if (found := _STEP.match(place.name)))


def _digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(sha256_of(folder / name) for name in (WEIGHTS, OPTIMIZER, PART))).hexdigest()
