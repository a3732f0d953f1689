"""Both sides of the wire of split inference, from settings."""

from __future__ import annotations

from lab.models import model_identity, prepare_checkpoint
from lab.network import make_endpoint
from lab.settings import ModelSource
from lab.wire import Endpoint
from split.messages import PROTOCOL, table
from split.settings import SplitSettings


def endpoint(settings: SplitSettings, role: str) -> Endpoint:
    """Our side: `client` talks to shards, `shard` to both. UserError for what makes no sense."""
    return make_endpoint(
        settings.network,
        role=role,
        peer_roles=frozenset({"shard"} if role == "client" else {"client", "shard"}),
        table=table(settings.network.max_frame_bytes),
        protocol=PROTOCOL,
        fingerprints=fingerprints(settings),
    )


def fingerprints(settings: SplitSettings) -> dict[str, str]:
    """What all roles must have alike: which tensors under which config, in which precision, and how they travel."""
    model = settings.model
    identity = model_identity(model)
    if model.source is ModelSource.hub:  # a repository changes; its snapshot's folder is named by the revision
        identity += f"@{prepare_checkpoint(model).folder.name}"
    return {"model": identity, "dtype": model.dtype.name, "boundary": settings.project.boundary.name}
