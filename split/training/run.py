"""A run of split training: opens the shards, takes the steps, keeps checkpoints, compares, reports."""

import logging
import secrets
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from lab.command.entry import Run
from lab.device import open_device
from lab.files import path_of, require_writable
from lab.learning.examples import Example
from lab.learning.training import derive_seed
from lab.models.shape import ModelShape
from lab.models.sources import load_config, load_tokenizer_only
from lab.settings import UserError, to_plain
from lab.tracking import Tracker, picture, progress
from split.training.checkpoint import Manifest, latest_step, read_manifest
from split.training.data import examples_digest, ordered, training_examples
from split.training.messages import Figures, Recipe
from split.training.open import checkpoints_of, identity_of, open_shards
from split.training.picture import draw_losses, draw_timeline
from split.training.schedule import even_bubble
from split.training.settings import Baseline, SplitTrainSettings, Train
from split.training.trainer import DistributedTrainer, Shards, StepFigures
from split.training.unsplit import train_unsplit
from split.training.weights import check_can_train_everything

log = logging.getLogger(__name__)


def run_training(settings: SplitTrainSettings, place: Run) -> dict[str, Any]:
    """Train to the end; return the figures of the last line.

    Raises:
        UserError: the model cannot be trained so, the checkpoint does not fit, or the loss is not finite.
        ShardLost, TrainingFault: a shard was lost for good, or failed.
    """
    project = settings.project
    checkpoints = checkpoints_of(settings, place.folder)
    require_writable(checkpoints, "project.checkpoints")  # now, not after steps have been taken
    recipe = make_recipe(settings)
    examples = training_examples(project.data, load_tokenizer_only(settings.model), settings.seed)
    check_frame(settings, examples)
    device = open_device(settings.device)
    with Tracker(settings, "split_train", place.folder) as tracker:
        with open_shards(settings, recipe, device, place.folder, checkpoints) as (shards, backward):
            manifest, root = first_manifest(settings, shards, recipe, checkpoints, examples_digest(examples))
            trainer = DistributedTrainer(
                shards,
                backward,
                batches=lambda: ordered(examples, project.optimization.batch_size, settings.seed),
                optimization=project.optimization,
                schedule=project.schedule,
                manifest=manifest,
                checkpoints=root,
                recovery_seconds=project.recovery_seconds,
            )
            place.so_far = lambda: {
                "steps": trainer.step,
                "loss_by_step": trainer.losses,
                "recoveries": trainer.recoveries,
                "checkpoint_path": trainer.saved,
            }
            taken, folder = take_steps(settings, trainer, tracker)
            sizes = shards.figures()
        result = figures_of(settings, trainer, taken, sizes) | {"checkpoint_path": folder, "examples": len(examples)}
        unsplit: list[float] = []
        if project.baseline is Baseline.unsplit:
            unsplit = train_unsplit(settings, recipe, examples, device)
            apart = [abs(a - b) for a, b in zip(trainer.losses, unsplit, strict=True)]
            result |= {"unsplit_loss_by_step": unsplit, "largest_loss_difference": max(apart)}
        place.so_far = lambda: result
        result["plots"] = draw(settings, trainer.losses, unsplit, taken, place.folder)
        tracker.result(result)
    return result


def make_recipe(settings: SplitTrainSettings) -> Recipe:
    """The recipe of all shards. UserError for a model that cannot be trained with it."""
    project, optimization = settings.project, settings.project.optimization
    recipe = Recipe(
        train=project.train,
        lora_rank=project.lora.rank,
        lora_alpha=project.lora.alpha,
        lora_dropout=project.lora.dropout,
        lora_targets=settings.model.lora_targets,
        weight_decay=optimization.weight_decay,
        beta1=optimization.beta1,
        beta2=optimization.beta2,
        activation_checkpointing=project.activation_checkpointing,
        seed=derive_seed(settings.seed, "split"),
    )
    if project.train is Train.lora:
        from split.training.first_adapter import first_adapter  # loads PEFT

        first_adapter(settings.model, recipe)  # refuses unfit settings before any shard is started
    else:
        check_can_train_everything(settings.model)
    return recipe


def check_frame(settings: SplitTrainSettings, examples: list[Example]) -> None:
    """UserError when the hidden states of a micro-batch would not fit in a frame."""
    project = settings.project
    hidden_size = ModelShape.of(load_config(settings.model)).hidden_size
    columns = max(len(example.ids_T) for example in examples)
    rows = project.optimization.batch_size // project.micro_batches
    needed = rows * columns * hidden_size * {"float64": 8, "float32": 4}.get(settings.model.dtype.name, 2)
    if needed > settings.network.max_frame_bytes:
        raise UserError(
            f"network.max_frame_bytes must be at least {needed} for the hidden states of {rows} x {columns} tokens "
            f"(or project.micro_batches larger), got {settings.network.max_frame_bytes}"
        )


def new_manifest(settings: SplitTrainSettings, shards: Shards, recipe: Recipe, data_digest: str) -> Manifest:
    """The manifest of a run that has taken no step."""
    project = settings.project
    return Manifest(
        run=secrets.token_hex(8),
        step=0,
        model=identity_of(settings.model),
        dtype=settings.model.dtype.name,
        cuts=[0, *(part.stop for part in shards.transport.layers)],
        digests=[],
        recipe=recipe,
        optimization=to_plain(asdict(project.optimization)),
        data=to_plain(asdict(project.data)),
        total_steps=project.steps,
        micro_batches=project.micro_batches,
        seed=settings.seed,
        loss_by_step=[],
        data_digest=data_digest,
    )


def first_manifest(
    settings: SplitTrainSettings, shards: Shards, recipe: Recipe, checkpoints: Path, data_digest: str
) -> tuple[Manifest, Path]:
    """The step at which the run begins, and the root of its checkpoints. UserError for an unfit checkpoint."""
    project = settings.project
    begin = new_manifest(settings, shards, recipe, data_digest)
    if project.resume is None:
        return begin, checkpoints
    folder = latest_step(path_of(project.resume, "project.resume"))
    found = read_manifest(folder)
    check_resumable(found, begin, folder, allow_changed_data=project.allow_changed_data)
    follow(found, begin)
    if found.altered_at and project.baseline is Baseline.unsplit:
        raise UserError(
            "project.baseline must be none for a run that was given other data or more steps (an unsplit run from the "
            f"beginning is another one), got unsplit for {str(folder)!r}, altered after step {found.altered_at}"
        )
    root = folder.parent.parent
    if project.local_shards and root != checkpoints:
        raise UserError(
            f"project.checkpoints must be the checkpoint's own root {str(root)!r} to resume from it (that is where "
            f"local shards look for their parts), got {str(checkpoints)!r}"
        )
    log.info("going on after step %d of %s", found.step, folder.parent)
    return found, root


def check_resumable(found: Manifest, ours: Manifest, folder: Path, *, allow_changed_data: bool) -> None:
    """UserError if a checkpoint has another model, cut, recipe, data or number of steps than this run.

    A finished run may be given more steps, and `allow_changed_data` permits other data.
    """
    if found.model != ours.model:
        raise UserError(
            f"project.resume must be a checkpoint of model {ours.model}, got {str(folder)!r} of {found.model}"
        )
    if found.cuts != ours.cuts:
        raise UserError(
            f"project.resume must be a checkpoint of the cut {ours.cut}, got {str(folder)!r} of {found.cut}; to cut it "
            f"anew, merge it (python -m split.merge project.checkpoint={folder} project.output=FOLDER) and start from "
            "the result with model.path=FOLDER (an adapter: model.adapter=FOLDER) and the new cut"
        )
    is_finished = found.step == found.total_steps
    if not (found.total_steps == ours.total_steps or (is_finished and ours.total_steps > found.step)):
        raise UserError(
            f"project.steps must be {found.total_steps} to go on from {str(folder)!r}"
            + (", or more" if is_finished else "; a finished run may be given more")
            + f", got {ours.total_steps}"
        )
    if found.data_digest != ours.data_digest and not allow_changed_data:
        now = "" if found.data == ours.data else f": project.data was {found.data} and is {ours.data}"
        raise UserError(
            f"project.data must hold the examples that {str(folder)!r} learnt from (project.allow_changed_data=true "
            f"continues with others), got others{now}"
        )
    for name, theirs in _kept(found).items():
        if theirs != (mine := _kept(ours)[name]):
            raise UserError(f"project.resume must be a checkpoint of a run with {name} {mine}, got {theirs}")


def _kept(manifest: Manifest) -> dict[str, Any]:
    """Values that do not change when a run is resumed."""
    named = msgspec.structs.asdict(manifest) | {"recipe": msgspec.structs.asdict(manifest.recipe)}
    return {name: to_plain(named[name]) for name in ("dtype", "recipe", "optimization", "micro_batches", "seed")}


def follow(found: Manifest, ours: Manifest) -> None:
    """Give a checkpoint this run's data and number of steps; changes are logged."""
    if found.data_digest != ours.data_digest:
        log.warning("from step %d on the run learns from different examples", found.step)
    if found.total_steps != ours.total_steps:
        log.warning(
            "the run ended after %d steps and now takes %d: from here on its learning rate is that of %d steps",
            found.total_steps,
            ours.total_steps,
            ours.total_steps,
        )
    if (found.data_digest, found.total_steps) != (ours.data_digest, ours.total_steps):
        found.altered_at = found.step
    found.data, found.data_digest, found.total_steps = ours.data, ours.data_digest, ours.total_steps


def take_steps(
    settings: SplitTrainSettings, trainer: DistributedTrainer, tracker: Tracker
) -> tuple[dict[int, StepFigures], Path]:
    """Take all remaining steps; return them by number, and the folder of the last checkpoint."""
    project = settings.project
    taken: dict[int, StepFigures] = {}
    folder: Path | None = None
    with progress("step", project.steps - trainer.step, settings.tracking.progress) as advance:
        while folder is None:
            if trainer.step < project.steps:
                figures = trainer.train_step()
                if figures.step not in taken:  # a step that is taken again after a loss is the same step
                    tracker.log(figures.step, **step_row(figures))
                    advance(describe(figures))
                taken[figures.step] = figures
            if trainer.step == project.steps:
                folder = trainer.save()
            elif project.checkpoint_every and trainer.step % project.checkpoint_every == 0:
                trainer.save()
    return taken, folder


def step_row(figures: StepFigures) -> dict[str, Any]:
    """The row of a step in metrics.jsonl."""
    return {
        "loss": figures.loss,
        "learning_rate": figures.learning_rate,
        "gradient_norm": figures.gradient_norm,
        "tokens_per_second": figures.tokens / figures.seconds,
        "bubble_fraction": figures.bubble_fraction,
        "boundary_bytes": figures.boundary_bytes,
        "step_seconds": figures.seconds,
    } | {f"shard_{place + 1}_rss_bytes": rss for place, rss in enumerate(figures.rss_bytes)}


def describe(figures: StepFigures) -> str:
    """A step as one line of text."""
    memory = " + ".join(f"{rss / 1e9:.2f}" for rss in figures.rss_bytes)
    return (
        f"loss {figures.loss:.4f}, {figures.tokens / figures.seconds:.0f} tokens/s, "
        f"bubble {figures.bubble_fraction:.0%}, {memory} GB"
    )


def figures_of(
    settings: SplitTrainSettings, trainer: DistributedTrainer, taken: dict[int, StepFigures], sizes: list[Figures]
) -> dict[str, Any]:
    """The figures of the last line."""
    project = settings.project
    steps = list(taken.values())
    layers = trainer.manifest.layers
    steady = steps[1:] or steps  # the first one allocates
    return {
        "steps": trainer.step,
        "loss_by_step": trainer.losses,
        "tokens_per_second": sum(f.tokens for f in steady) / sum(f.seconds for f in steady) if steady else None,
        "transport": project.transport,
        "backward": project.backward,
        "schedule": project.schedule,
        "train": project.train,
        "micro_batches": project.micro_batches,
        "step_seconds": statistics.median(f.seconds for f in steady) if steady else None,
        "bubble_fraction": statistics.median(f.bubble_fraction for f in steady) if steady else None,
        "even_bubble_fraction": even_bubble(len(layers), project.micro_batches),
        "boundary_bytes_per_step": round(statistics.mean(f.boundary_bytes for f in steady)) if steady else None,
        "gradient_norm_by_step": [f.gradient_norm for f in steps],
        "recoveries": trainer.recoveries,
        "shards": [
            {
                "layers": f"{part.start}:{part.stop}",
                "trainable_parameters": trainable,
                "weights_delta_norm": delta,
                "most_micro_batches_held": held,
                **{key: value for key, value in asked.items() if key not in ("shard", "clock_seconds")},
            }
            for part, asked, trainable, delta, held in zip(
                layers,
                map(msgspec.structs.asdict, sizes),
                trainer.trainable,
                trainer.weights_delta_norms,
                steps[-1].held if steps else [0] * len(layers),
                strict=True,
            )
        ],
    }


def draw(
    settings: SplitTrainSettings, losses: list[float], unsplit: list[float], taken: dict[int, StepFigures], folder: Path
) -> list[Path]:
    """Draw the pictures of a run; return those that could be drawn."""
    title = f"{settings.model.name} over {settings.project.transport.name}, {settings.project.schedule.name}"
    plots = picture(lambda: draw_losses(losses, unsplit, title, folder / "loss.png"))
    timelines = [figures for figures in taken.values() if figures.timeline is not None]
    if timelines:
        by_time = sorted(timelines[1:] or timelines, key=lambda figures: figures.seconds)
        plots += picture(lambda: draw_timeline(by_time[len(by_time) // 2], title, folder / "timeline.png"))
    return plots
