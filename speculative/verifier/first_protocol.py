"""Requests of the first protocol (`speculative.protocol`): plain text in, the target's own greedy continuation out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.engine.sampling import Sampling
from lab.text.settings import FILL
from lab.wire.faults import BadFrame, Peer, PeerGone
from speculative.messages import Reason
from speculative.protocol import MAX_TOKENS, LeftBetweenMessages, read_msg, write_tokens
from speculative.request import Ending, GenerationRequest, Outcome, Verdict
from speculative.settings import Mode
from speculative.verifier.forward_thread import ForwardThread

LONGEST_REQUEST_BYTES = 2**18
"""Longest prompt: a context of a few thousand tokens holds no longer one."""


@dataclass(frozen=True, kw_only=True)
class FirstProtocol:
    """Serves all clients of one verifier that use the first protocol."""

    thread: ForwardThread
    to_ids: Callable[[str], Sequence[int]]
    max_new_tokens: int
    """Number of tokens in an answer; `FILL`: as many as there is room for."""
    context: int
    """Most tokens of prompt and answer."""
    timeout_seconds: float
    """Time limit of a client that sends nothing."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: asyncio.Event) -> None:
        """Answer requests one after the other, until the client has `left`."""
        name = writer.get_extra_info("peername") or ("?", 0)
        peer = Peer(role="client", address=f"{name[0]}:{name[1]}", phase="request")
        seconds = self.timeout_seconds
        while True:
            try:
                text = await read_msg(reader, peer=peer, max_bytes=LONGEST_REQUEST_BYTES, timeout_seconds=seconds)
            except LeftBetweenMessages:
                return
            ids = await self._continuation(self.to_ids(text), peer, left)
            await write_tokens(writer, ids, peer=peer, timeout_seconds=seconds)

    async def _continuation(self, prompt_ids: Sequence[int], peer: Peer, left: asyncio.Event) -> list[int]:
        """Raises `BadFrame` for a prompt that is refused, `PeerGone` when the client does not wait for its answer."""
        done: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        ids: list[int] = []

        def receive(outcome: Outcome) -> None:
            if isinstance(outcome, Verdict):
                ids.extend(outcome.ids)
            elif isinstance(outcome, Ending) and not done.done():
                done.set_result(outcome)

        fitting = max(1, min(self.context - len(prompt_ids), MAX_TOKENS))  # a prompt that fills the context is refused
        request = GenerationRequest(
            prompt_ids=prompt_ids,
            sampling=Sampling.greedy(),
            max_new_tokens=fitting if self.max_new_tokens == FILL else self.max_new_tokens,
            mode=Mode["async"],
            threshold=None,
        )
        key = object()
        gone = asyncio.create_task(left.wait())
        try:
            if not left.is_set():
                self.thread.open(key, receive, lambda scheduler: scheduler.open(key, request, client=key))
                either: set[asyncio.Future[Any]] = {done, gone}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise PeerGone(peer, "left before its answer")
        finally:
            gone.cancel()
            self.thread.close(key)
        ended = done.result()
        if ended.reason in (Reason.refused, Reason.full, Reason.failed):
            raise BadFrame(peer, f"sent a prompt that cannot be continued: {ended.text}")
        return ids
