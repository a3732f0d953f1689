"""The state of a run after each round, on disk: what a run needs to continue as if it had never been interrupted.

A round is finished when its folder `adapters/round-NNNN` exists: adapter, `round.json` and the tensors of the server's
components are written into it and appear together (`fl.checkpoint.AdapterFolders`). Older rounds keep their
`round.json`, so the folders of all rounds together are the history of the run.

Clients keep no state between rounds, and the sites of a round follow from seed and round: nothing else is needed.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fl.rounds import RoundReport
from fl.run.folders import latest_rounds, round_folders
from fl.run.sites import SiteRecord
from fl.settings import FederatedSettings
from lab.files import path_of
from lab.settings import UserError, require, to_plain

RECORD = "round.json"
COMPONENT = "state-{}.safetensors"
KEPT_STATES = 2
"""Rounds whose component tensors stay on disk; older ones are of no use, and as large as an adapter each."""

FREE = (
    *("prompt", "tracking", "network", "model.cache_dir"),
    *("model.source", "model.path", "model.repo", "model.revision", "model.package", "model.wheel"),
    *("project.resume", "project.resume_changes", "project.warm_start"),
    *("project.workers", "project.worker_retries", "project.poll_seconds", "project.node_timeout_seconds"),
    *("project.warm", "project.warm_limit_bytes"),
    *("project.attempts", "project.retry_seconds", "project.superlink"),
    *("project.command_timeout_seconds", "project.watch_seconds"),
)
"""Settings, or whole groups, that change no adapter. (Base models are compared by the digest of their tensors.)"""
FIXED = (
    *("model", "seed", "project.lora", "project.num_clients", "project.data"),
    *("project.partition_by", "project.partition_alpha", "project.partition_shards"),
)
"""Settings that make another model, another adapter or another partition: a run cannot continue with others."""

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A component of the server with state between rounds, such as a server optimizer."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """Its state as named tensors; empty if there is none yet."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned. ValueError if it does not fit."""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finished round; round 0 is the start of the run."""

    round: int
    settings: dict[str, Any]
    """All settings of the run, as JSON values."""
    base_digest: str
    """Digest of the base model's tensors."""
    report: RoundReport | None
    """Its figures, without tensors; None for round 0."""
    first_asked: list[int] = msgspec.field(default_factory=list)
    """Partitions that were asked in round 1, where they are known: the last evaluation asks the same."""
    sites: list[SiteRecord] = msgspec.field(default_factory=list)
    """What became of each site so far."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The finished rounds of an interrupted run, from 0 to the last one."""

    root: Path
    """The folder of its rounds."""
    records: Sequence[RoundRecord]
    folder: Path
    """The folder of the last round."""

    @property
    def last(self) -> RoundRecord:
        """The record of the last finished round."""
        return self.records[-1]

    @property
    def reports(self) -> list[RoundReport]:
        """Figures of rounds 1, 2, ..."""
        return [record.report for record in self.records if record.report is not None]

    def load_components(self, components: Mapping[str, Stateful]) -> None:
        """Give each component its state of the last round. UserError for one that is missing, broken or superfluous."""
        kept = {path.name: path for path in self.folder.glob(COMPONENT.format("*"))}
        wanted = {COMPONENT.format(name): component for name, component in components.items()}
        if kept.keys() != wanted.keys():
            raise self._refused(f"has the states {sorted(kept) or 'none'}, the run needs {sorted(wanted) or 'none'}")
        for name, component in wanted.items():
            try:
                component.load_state(load_file(kept[name]))
            except (SafetensorError, OSError, ValueError) as error:
                raise self._refused(f"has a {name} that cannot be used: {error}") from None

    def _refused(self, why: str) -> UserError:
        return UserError(f"project.resume must be a run that can continue, got {str(self.folder)!r}, which {why}")


def write_state(folder: Path, record: RoundRecord, components: Mapping[str, Stateful]) -> None:
    """Write the record of a round and the tensors of the components into the round's folder."""
    (folder / RECORD).write_bytes(msgspec.json.encode(record) + b"\n")
    for name, component in components.items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in component.state().items()}
        save_file(tensors, folder / COMPONENT.format(name))


def drop_old_states(root: Path) -> None:
    """Remove component tensors of all rounds but the last `KEPT_STATES`."""
    for _, folder in sorted(round_folders(root).items())[:-KEPT_STATES]:
        for file in folder.glob(COMPONENT.format("*")):
            file.unlink(missing_ok=True)


def saved_run(settings: FederatedSettings, base_digest: str) -> SavedRun | None:
    """The run that `project.resume` names, if it can continue with these settings; None if it is null.

    UserError, in one line, for a folder without finished rounds, a broken one, another model, adapter or partition, and
    for settings that differ without being named by `project.resume_changes`.
    """
    project = settings.project
    if project.resume is None:
        return None
    folder = path_of(project.resume, "project.resume")
    root = (latest_rounds(folder) or folder) / "adapters"
    rounds = round_folders(root)
    rule = "project.resume must be the folder of a run with finished rounds"
    if not rounds:
        raise UserError(f"{rule} (adapters/round-0000 and so on), got {str(folder)!r}")
    if missing := sorted({*range(max(rounds))} - rounds.keys()):
        raise UserError(f"{rule}, got {str(folder)!r}, which lacks round {missing[0]} of {max(rounds)}")
    records = [_read(path, number) for number, path in sorted(rounds.items())]
    saved = SavedRun(root=root, records=records, folder=rounds[max(rounds)])
    if saved.last.round > project.rounds:
        raise UserError(f"project.rounds must be at least the {saved.last.round} finished rounds, got {project.rounds}")
    if saved.last.base_digest != base_digest:
        found = f"its base model has the digest {saved.last.base_digest}, this run's has {base_digest}"
        raise UserError(f"project.resume must be a run of the same model, got {str(folder)!r}: {found}")
    check_settings(saved.last.settings, to_plain(settings), project.resume_changes)
    return saved


def check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], changes: Sequence[str]) -> None:
    """UserError naming every setting of the saved run that differs and may not; one log line for those that may."""
    before, now = dict(flat(theirs)), dict(flat(ours))
    if wrong := [key for key in changes if key not in now or within(key, FIXED)]:
        rule = "project.resume_changes must name settings that a run can continue with when they change"
        raise UserError(f"{rule} (not those of model, adapter, data, seed and partition), got {wrong[0]!r}")
    differing = [
        key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key) and not within(key, FREE)
    ]
    words = {key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differing}
    if fixed := [words[key] for key in differing if within(key, FIXED)]:
        raise UserError(
            f"project.resume must be a run of the same model, adapter and partition, got {'; '.join(fixed)}"
        )
    if refused := [words[key] for key in differing if key not in changes]:
        rule = (
            "project.resume must be a run with the same settings, or project.resume_changes must name those that differ"
        )
        raise UserError(f"{rule}, got {'; '.join(refused)}")
    for key in differing:
        log.warning("continuing with other settings: %s", words[key])


def flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of every setting that is no group."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def within(key: str, groups: Sequence[str]) -> bool:
    """Whether a dotted key is one of `groups` or below one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _read(folder: Path, number: int) -> RoundRecord:
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=RoundRecord)
        require(record.round == number, f"round must be {number}", record.round)
        require((record.report is None) == (number == 0), "report must be there except for round 0", record.report)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"project.resume must hold a whole {RECORD} per round, got {str(folder)!r} ({reason})"
        ) from None
    return record
