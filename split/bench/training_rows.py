"""The parts of `split.bench.training`: pinned shard processes, and the whole model in this one."""

import functools
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np

from lab.bench import Row, Sample, interleaved, judged, pinned, ratio
from lab.command.entry import compose_settings
from lab.command.processes import own_overrides, run_to_end
from lab.device import open_device
from lab.learning.examples import Batch, Example, collate
from lab.learning.training import train_steps
from lab.models.shape import ModelShape
from lab.models.sources import load_config, load_tokenizer_only, prepare_checkpoint
from split.bench.settings import SplitTrainBenchSettings
from split.settings import TransportKind
from split.training.data import ordered, training_examples
from split.training.open import open_shards
from split.training.run import make_recipe, new_manifest
from split.training.schedule import Phase, Schedule, Timeline, even_bubble, least_seconds, operations, replay
from split.training.settings import SplitTrainSettings
from split.training.trainer import Backward, DistributedTrainer, Shards, StepFigures, split_batch
from split.training.unsplit import train_unsplit, whole_model

log = logging.getLogger(__name__)

MOST_OFF = 0.10
"""Largest difference of a replay from the measured step, as a share of it."""
BUBBLE_SLACK = 0.05
LEAST_SPEEDUP = 1.5
MOST_OVERHEAD = 1.01
MOST_MEMORY = 1.1
ADAPTER_BAND = 1e-4


class TrainingRig(ExitStack):
    """Shards and models that the parts share; a method for each part. Leaving it ends the processes."""

    def __init__(self, settings: SplitTrainBenchSettings, folder: Path) -> None:
        super().__init__()
        self._project, self._folder = settings.project, folder
        self._device = open_device(settings.device)
        training = compose_settings("split_train", "", SplitTrainSettings)
        self._settings = replace(
            training,
            model=settings.model,
            device=settings.device,
            tracking=replace(settings.tracking, progress=False),
            project=replace(
                training.project,
                local_shards=2,
                cuts=[self._project.cut],
                pin_cores=True,
                checkpoint_every=0,
                steps=self._project.adapter_steps,
                start_seconds=self._project.start_seconds,
            ),
        )
        vocabulary = ModelShape.of(load_config(settings.model)).vocabulary
        generator = np.random.default_rng(0)
        shape = (64, self._project.sequence_length)
        ids_BT = generator.integers(0, vocabulary, shape).astype(np.int32)
        self._examples = [Example(ids_T, np.ones(len(ids_T), dtype=np.bool_)) for ids_T in ids_BT]

    def pipeline(self) -> Row:
        """Measure both schedules at every number of micro-batches."""
        rows: list[Row] = []
        for schedule, count in product(Schedule, self._project.micro_batches):
            trainer = self._trainer(count, schedule)
            trainer.train_step()
            figures = [trainer.train_step() for _ in range(self._project.steps)]
            rows.append(pipeline_row(figures, schedule, count))
            log.info("%s", rows[-1])
        ok = all(
            abs(row["predicted_over_measured"] - 1) <= MOST_OFF and row["bubble_fraction"] <= row["bubble_bound"]
            for row in rows
        )
        return judged(
            "pipeline", {"cases": rows}, "replay within 10 % of the step, bubble at most (p-1)/(m+p-1) + 0.05", ok
        )

    def throughput(self) -> Row:
        """Measure tokens a second of the split and of the whole model, a step each in turn."""
        project, count = self._project, self._project.throughput_micro_batches
        optimization = self._settings.project.optimization
        trainer = self._trainer(count)
        with pinned(0):
            model = whole_model(self._settings, make_recipe(self._settings), self._device)
            parts = self._batches(count)
            micro_batches = (part for batch in parts for part in split_batch(batch, count))

            def split() -> float:
                figures = trainer.train_step()
                return figures.tokens / figures.seconds

            def unsplit() -> float:
                accumulated = replace(optimization, accumulation=count)
                figures = train_steps(
                    model, micro_batches, accumulated, first_step=0, total_steps=10**6, steps=1, seed=0
                )
                return figures.tokens / figures.seconds

            found = interleaved({"split": split, "unsplit": unsplit}, 1, project.repeats)
        gain = ratio(found["split"], found["unsplit"])
        return judged(
            "throughput",
            {
                "micro_batches": count,
                "tokens_per_second": {name: Sample.of(readings) for name, readings in found.items()},
                "split_over_unsplit": gain,
            },
            f"at least {LEAST_SPEEDUP} x the whole model on one core",
            gain.median >= LEAST_SPEEDUP,
        )

    def boundary(self) -> Row:
        """Count the bytes between the shards in a step."""
        count = self._project.throughput_micro_batches
        hidden = ModelShape.of(load_config(self._settings.model)).hidden_size
        rows = count * self._project.examples_per_micro_batch
        payload = 2 * rows * self._project.sequence_length * hidden * 4  # hidden states and gradients in float32
        sent = self._trainer(count).train_step().boundary_bytes
        return judged(
            "boundary",
            {"payload_bytes": payload, "boundary_bytes": sent, "sent_over_payload": sent / payload},
            "at most 1 % more than hidden states and gradients",
            payload <= sent <= MOST_OVERHEAD * payload,
        )

    def memory(self) -> Row:
        """Train each shard of two layers of a large random model, all weights, in a separate process."""
        overrides = [*self._project.memory_overrides, "project.train=everything"]
        model = compose_settings("split_train", overrides, SplitTrainSettings).model
        prepare_checkpoint(model)  # here: making the weights takes more memory than a shard of them
        layers = model.architecture.layers
        rows = [
            run_to_end("split.bench.memory_probe", [str(first), str(first + 2), *overrides], None, 300)[1]
            for first in range(0, layers, 2)
        ]
        worst = max(row["peak_over_own"] for row in rows)
        return judged(
            "memory",
            {"shards": rows, "peak_over_own": worst},
            f"at most {MOST_MEMORY} x weights + gradients + optimizer + activations",
            worst <= MOST_MEMORY,
        )

    def adapter(self) -> Row:
        """Compare the losses of a run on real text with those of the unsplit run."""
        project, seed = self._settings.project, self._settings.seed
        examples = training_examples(project.data, load_tokenizer_only(self._settings.model), seed)
        batches = functools.partial(ordered, examples, project.optimization.batch_size, seed)
        trainer = self._trainer(project.micro_batches, project.schedule, batches, project.steps)
        losses = [trainer.train_step().loss for _ in range(project.steps)]
        unsplit = train_unsplit(self._settings, make_recipe(self._settings), examples, self._device)
        apart = max(abs(a - b) for a, b in zip(losses, unsplit, strict=True))
        return judged(
            "adapter",
            {
                "steps": project.steps,
                "micro_batches": project.micro_batches,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "largest_difference": apart,
            },
            f"losses within {ADAPTER_BAND:g} at every step",
            apart <= ADAPTER_BAND,
        )

    def _batches(self, micro_batches: int) -> Iterator[Batch]:
        """Batches of the same examples, in order, without end."""
        rows = cycle(self._examples)
        while True:
            yield collate(list(islice(rows, micro_batches * self._project.examples_per_micro_batch)))

    @functools.cached_property
    def _chain(self) -> tuple[Shards, Backward]:
        """Two pinned shards, for every part that needs them."""
        settings = self._settings
        assert settings.project.transport is TransportKind.tcp
        overrides = [word for word in own_overrides() if word.startswith(("--config-dir", "model", "device."))]
        recipe, checkpoints = make_recipe(settings), self._folder / "checkpoints"
        return self.enter_context(open_shards(settings, recipe, self._device, self._folder, checkpoints, overrides))

    def _trainer(
        self,
        micro_batches: int,
        schedule: Schedule = Schedule.one_f_one_b,
        batches: Callable[[], Iterator[Batch]] | None = None,
        steps: int = 10**6,
    ) -> DistributedTrainer:
        """A trainer at the first step of a run; the shards of all parts start again."""
        manifest = new_manifest(self._settings, self._chain[0], make_recipe(self._settings), data_digest="")
        manifest.micro_batches, manifest.total_steps = micro_batches, steps
        return DistributedTrainer(
            *self._chain,
            batches=batches or (lambda: self._batches(micro_batches)),
            optimization=self._settings.project.optimization,
            schedule=schedule,
            manifest=manifest,
            checkpoints=self._folder,
            recovery_seconds=0.0,
        )


_parts = (TrainingRig.pipeline, TrainingRig.throughput, TrainingRig.boundary, TrainingRig.memory, TrainingRig.adapter)
PARTS: dict[str, Callable[[TrainingRig], Row]] = {part.__name__: part for part in _parts}


def pipeline_row(figures: list[StepFigures], schedule: Schedule, micro_batches: int) -> Row:
    """The measured times of one schedule next to those of its replay."""
    timelines = [one.timeline for one in figures if one.timeline is not None]
    shards = len(timelines[0].shards)
    seconds = {phase: [stage_seconds(timelines, place, phase) for place in range(shards)] for phase in Phase}
    orders = [operations(schedule, shards=shards, shard=place, micro_batches=micro_batches) for place in range(shards)]
    predicted = replay(orders, seconds[Phase.forward], seconds[Phase.backward])
    measured = statistics.median(one.seconds for one in figures)
    return {
        "schedule": schedule.name,
        "micro_batches": micro_batches,
        "forward_seconds": seconds[Phase.forward],
        "backward_seconds": seconds[Phase.backward],
        "predicted_seconds": predicted.seconds,
        "formula_seconds": least_seconds(schedule, seconds[Phase.forward], seconds[Phase.backward], micro_batches),
        "measured_seconds": Sample.of([one.seconds for one in figures]),
        "timeline_seconds": Sample.of([timeline.seconds for timeline in timelines]),
        "predicted_over_measured": predicted.seconds / measured,
        "bubble_fraction": statistics.median(timeline.bubble_fraction for timeline in timelines),
        "replayed_bubble_fraction": predicted.bubble_fraction,
        "bubble_bound": even_bubble(shards, micro_batches) + BUBBLE_SLACK,
        "held": [max(one.held[place] for one in figures) for place in range(shards)],
    }


def stage_seconds(timelines: list[Timeline], place: int, phase: Phase) -> float:
    """Median time of one micro-batch at one shard."""
    spans = [span for timeline in timelines for span in timeline.shards[place] if span.operation.phase is phase]
    return statistics.median(span.end - span.begin for span in spans)
