"""The files of a PEFT folder: the required ones, the base model that they name, a digest that tells two folders apart.

Does not load PEFT, which the client of a split model does not need.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lab.file_digests import sha256_of
from lab.files import path_of
from lab.settings import UserError

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
RECORD_FILE = "lab_adapter.json"
"""Next to PEFT's own files: the origin of the adapter. The lab writes one with every adapter."""
IDENTITY_KEY = "base_model_identity"
"""Key of the identity of the weights that the adapter was trained on (`lab.models.sources.model_identity`)."""
RECORDS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
)
"""Keys of an adapter's config that do not change what it computes."""


def find_folder(folder: str | Path, setting: str = "model.adapter") -> Path:
    """The absolute path of a PEFT folder; UserError naming `setting` when its files are not there."""
    place = path_of(str(folder), setting)
    if not (place / CONFIG_FILE).is_file() or not (place / TENSORS_FILE).is_file():
        raise UserError(f"{setting} must be a PEFT folder ({CONFIG_FILE}, {TENSORS_FILE}), got {str(place)!r}")
    return place


def read_fields(place: Path, setting: str = "model.adapter") -> dict[str, Any]:
    """An adapter's config as in its file; UserError if that is no JSON object."""
    try:
        fields = json.loads((place / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{setting} must hold an {CONFIG_FILE} that is a JSON object, got {str(place)!r}")
    return fields


def folder_digest(folder: str | Path) -> str:
    """Sixteen hex digits over the whole description and all bytes of all tensors; UserError where there are none.

    Records of the adapter's origin are left out, so that a copy under another path is the same adapter.
    """
    place = find_folder(folder)
    described = {name: value for name, value in read_fields(place).items() if name not in RECORDS}
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    try:
        sha.update(sha256_of(place / TENSORS_FILE))
    except OSError as error:
        raise UserError(f"model.adapter must be readable, got {str(place)!r} ({error.strerror})") from None
    return sha.hexdigest()[:16]


def check_base(place: Path, identity: str, setting: str = "model.adapter") -> None:
    """UserError if the folder belongs to another base model than `identity`; a folder without a record is accepted."""
    trained_on = recorded_identity(place, setting)
    if trained_on not in (None, identity):
        raise UserError(f"{setting} must belong to base model {identity}, got {str(place)!r} trained on {trained_on}")


def recorded_identity(place: Path, setting: str = "model.adapter") -> str | None:
    """The identity of the base model in an adapter folder's record; None without one. UserError for a broken record."""
    record = place / RECORD_FILE
    try:
        found = json.loads(record.read_bytes()).get(IDENTITY_KEY) if record.exists() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{setting} must hold a {RECORD_FILE} that is JSON, got {str(record)!r}") from None
    return None if found is None else str(found)
