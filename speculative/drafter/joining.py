"""How a drafter gets to its verifier: the connection, the handshake, and whether both mean the same by a token id."""

from __future__ import annotations

from collections.abc import Sequence

from lab.network import client_side_tls, make_endpoint
from lab.settings import UserError
from speculative.drafter.connection import VerifierConnection
from speculative.drafter.target import RemoteTarget
from speculative.messages import PROTOCOL, TABLE, Welcome
from speculative.settings import DraftSettings, SpeculativeSettings
from speculative.verifier.connections import TOKENIZER
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
    network = settings.network
    endpoint = make_endpoint(
        network,
        role="drafter",
        peer_roles=frozenset({"verifier"}),
        table=TABLE,
        protocol=PROTOCOL,
        fingerprints={TOKENIZER: ours},
        difference=lambda ours, theirs: None,  # compared below, where the id that differs can be named
    )
    tls = client_side_tls(network)

    def connect() -> VerifierConnection:
        seconds = network.request_timeout_seconds
        return VerifierConnection(network.host, network.port, endpoint, tls, request_seconds=seconds)

    target = RemoteTarget(
        connect,
        connect_seconds=network.connect_timeout_seconds,
        resume_seconds=settings.project.resume_seconds,
        window=settings.project.draft.window,
        report=settings.project.report or settings.project.check,
    )
    try:
        if target.connection.fingerprints.get(TOKENIZER) != ours:
            difference = first_difference(token_texts, target.connection.vocabulary())
            raise UserError(f"model {settings.model.name} must have the verifier's tokenizer: {difference}")
        _check_credit(settings.project.draft, target.welcome)
    except BaseException:
        target.close()
        raise
    return target


def _check_credit(draft: DraftSettings, welcome: Welcome) -> None:
    for name, wanted, most, theirs in (
        ("length", draft.fixed_length, welcome.max_draft_length, "project.max_draft_length"),
        ("window", draft.window, welcome.window, "project.draft.window"),
    ):
        if wanted > most:
            raise UserError(
                f"project.draft.{name} must be in [1, {most}] for this verifier (its {theirs}), got {wanted}"
            )
