"""The trainer's end of a chain of shard processes over TCP; each shard's is `split.training.server`."""

from __future__ import annotations

from lab.wire import Head
from split.chain.messages import Fault
from split.training.messages import Done, Figures, Saved, Started
from split.transport.tcp import TcpChain


class TcpTraining(TcpChain):
    """A `TrainingTransport`: a connection to every shard, which is also how the loss of one is noticed."""

    taken: tuple[type[Head], ...] = (Done, Fault, Figures, Saved, Started)
