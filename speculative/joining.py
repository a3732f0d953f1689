"""How a drafter gets to its verifier: the connection, the handshake, and whether both mean the same by a token id."""

from __future__ import annotations

from collections.abc import Sequence

from lab.network import client_side_tls, make_endpoint
from lab.settings import UserError
from speculative.front import TOKENIZER
from speculative.messages import PROTOCOL, TABLE
from speculative.remote_target import RemoteTarget, connect
from speculative.settings import SpeculativeSettings
from speculative.vocabulary import fingerprint, first_difference


def join(settings: SpeculativeSettings, token_texts: Sequence[str]) -> RemoteTarget:
    """A connection to the verifier at `network.host` and `network.port`.

    Args:
        settings: Of the drafter.
        token_texts: The text of each id of its tokenizer.

    Raises:
        WireError: nobody there, another key, ...
        UserError: another tokenizer, with the first id that differs; a draft length that this verifier does not take.
    """
    ours = fingerprint(token_texts)
    endpoint = make_endpoint(
        settings.network,
        role="drafter",
        peer_roles=frozenset({"verifier"}),
        table=TABLE,
        protocol=PROTOCOL,
        fingerprints={TOKENIZER: ours},
        difference=lambda ours, theirs: None,  # compared below, where the id that differs can be named
    )
    target = RemoteTarget(
        connect(settings.network.host, settings.network.port, endpoint, client_side_tls(settings.network)),
        report=settings.project.report or settings.project.check,
        request_seconds=settings.network.request_timeout_seconds,
    )
    try:
        if target.fingerprints.get(TOKENIZER) != ours:
            difference = first_difference(token_texts, target.vocabulary())
            raise UserError(f"model {settings.model.name} must have the verifier's tokenizer: {difference}")
        _check_length(settings.project.draft.length, target.welcome.max_draft_length)
    except BaseException:
        target.close()
        raise
    return target


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise UserError(
            f"project.draft.length must be in [1, {longest}] for this verifier (its project.max_draft_length), "
            f"got {length}"
        )
