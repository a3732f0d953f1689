"""Rig of the benchmarks of split inference: shard processes on a core each, links, engines over them.

This process holds the whole model for comparison; it stays on the first shard's core, which waits while it computes.
"""

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from lab.bench import link_process, pinned
from lab.command.entry import compose_settings
from lab.command.processes import own_overrides
from lab.device import open_device
from lab.engine.compiled import Compiler
from lab.engine.local import LocalEngine
from lab.models.layers import load_proved
from lab.settings import ModelSettings
from split.bench.settings import SplitBenchSettings
from split.chain.local_shards import LocalShards
from split.chain.open import cut_layers, free_port
from split.inference.open import fingerprints, join_shards, load_stage
from split.inference.sharded_model import ShardedModel
from split.inference.stage import InferenceStage
from split.settings import SplitSettings
from split.transport.base import Message, Sent, Transport
from split.transport.inproc import InProcess

LINK_BUFFER_BYTES = 2**24
MAX_CONNECTIONS = 64


class OnCore(InferenceStage):
    """A stage that works on its own core, as a shard's process does: one thread goes from core to core."""

    def __init__(self, stage: InferenceStage, core: int) -> None:
        super().__init__(stage.shard, stage.boundary)
        self._core = core

    @override
    def take(self, message: Message, client: Hashable = 0) -> Iterator[Sent]:
        with pinned(self._core):
            yield from super().take(message, client)


class Rig(ExitStack):
    """Shards and engines that the parts share. Leaving it ends the processes."""

    def __init__(self, settings: SplitBenchSettings, folder: Path) -> None:
        super().__init__()
        self.project, self.model, self.folder = settings.project, settings.model, folder
        self.enter_context(pinned(0))
        self.device = open_device(settings.device)
        inference = compose_settings("split_inf", "", SplitSettings)
        self.settings = replace(
            inference,
            model=settings.model,
            device=settings.device,
            project=replace(
                inference.project,
                context=self.project.context,
                cache_limit_bytes=self.project.cache_limit_bytes,
                prefill_chunk=self.project.prefill_chunk,
                recovery_seconds=0.0,
            ),
        )
        self.model_overrides = [
            word for word in own_overrides() if word.startswith(("--config-dir", "model", "device."))
        ]
        self._overrides = [
            *self.model_overrides,
            f"project.context={self.project.context}",
            f"project.cache_limit_bytes={self.project.cache_limit_bytes}",
            f"project.max_connections={MAX_CONNECTIONS}",
        ]
        self._addresses: dict[tuple[int, bool], list[str]] = {}

    def addresses(self, cut: int, *, awake: bool = True) -> list[str]:
        """Addresses of two shards, the second of which begins at `cut`; started at the first call. Those that are not
        `awake` sleep as soon as a pass is over."""
        if (cut, awake) not in self._addresses:
            folder = self.folder / f"cut-{cut}{'' if awake else '-asleep'}"
            overrides = self._overrides if awake else [*self._overrides, "project.awake_seconds=0"]
            shards = LocalShards(self.ranges(cut), folder, self.project.start_seconds, overrides, pin=True)
            self._addresses[cut, awake] = [str(address) for address in self.enter_context(shards).addresses]
        return self._addresses[cut, awake]

    def ranges(self, cut: int) -> list[range]:
        """The layers of two shards."""
        return cut_layers(self.model, [cut], 2)

    @contextmanager
    def tcp(
        self,
        addresses: Sequence[str] | None = None,
        prefill_chunk: int | None = None,
        model: ModelSettings | None = None,
    ) -> Iterator[ShardedModel]:
        """An engine over shard processes; None: those of `project.cut`, its chunk, the benchmark's model."""
        project = self.settings.project
        engine = join_shards(
            model or self.model,
            self.settings.network,
            shards=addresses or self.addresses(self.project.cut),
            spares=[],
            boundary=project.boundary.name,
            context=project.context,
            prefill_chunk=prefill_chunk or project.prefill_chunk,
            start_seconds=project.start_seconds,
            recovery_seconds=0.0,
        )
        try:
            yield engine
        finally:
            engine.shutdown()

    @contextmanager
    def linked(self, rtt_seconds: float) -> Iterator[list[str]]:
        """Addresses of two shards, the second behind a link for both the first and the client, so that a token crosses
        it once each way. The link's process is on the second shard's core, so that shard must sleep meanwhile."""
        one, two = self.addresses(self.project.cut, awake=False)
        port, folder = int(two.rpartition(":")[2]), self.folder / f"link-{rtt_seconds:g}"
        buffer = f"project.buffer_bytes={LINK_BUFFER_BYTES}"
        with pinned(1), link_process(port, rtt_seconds, folder, self.project.start_seconds, buffer) as own, pinned(0):
            yield [one, f"127.0.0.1:{own}"]

    @contextmanager
    def rpc(self) -> Iterator[ShardedModel]:
        """An engine over two shard processes in a torch RPC group."""
        from split.transport.rpc import RpcChain  # some systems lack it

        port, layers = free_port(), self.ranges(self.project.cut)
        overrides = [*self._overrides, "project.transport=rpc"]
        seconds = self.project.start_seconds
        with LocalShards(layers, self.folder / "rpc", seconds, overrides, pin=True, group_port=port):
            wanted = fingerprints(self.model, self.settings.project.boundary)
            group = RpcChain(len(layers) + 1, self.settings.network, port, wanted, start_seconds=seconds)
            engine = self.engine(group)
            try:
                yield engine
            finally:
                engine.shutdown()

    def stages(self) -> list[InferenceStage]:
        """The two shards of `project.cut`, in this process."""
        return [load_stage(self.settings, self.device, layers) for layers in self.ranges(self.project.cut)]

    def inproc(self, stages: Sequence[InferenceStage]) -> ShardedModel:
        """An engine over shards in this process."""
        return self.engine(InProcess(stages))

    def engine(self, transport: Transport) -> ShardedModel:
        """An engine over a transport."""
        return ShardedModel(
            transport,
            vocabulary_size=self.model.architecture.vocabulary,
            context=self.project.context,
            prefill_chunk=self.project.prefill_chunk,
            recovery_seconds=0.0,
        )

    def whole(self) -> LocalEngine:
        """An engine over the whole model, in this process."""
        project = self.settings.project
        return LocalEngine(
            load_proved(self.model, self.device).model,
            sessions=project.sessions,
            context=project.context,
            bucket=project.cache_bucket,
            kv_limit_bytes=2 * project.cache_limit_bytes,
            prefill_chunk=project.prefill_chunk,
            exact_rows=None,
            compiler=Compiler.of(self.model, self.settings.device, lasts=True),
        )

    def prompt(self, count: int, seed: int = 0) -> list[int]:
        """Random ids from a seed."""
        generator = random.Random(seed)
        return [generator.randrange(self.model.architecture.vocabulary) for _ in range(count)]
