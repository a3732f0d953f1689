"""The same steps of the whole model in one process, by the lab's own trainer, to compare with a split run."""

from dataclasses import replace
from typing import Any

import torch

from lab.learning.examples import Example
from lab.learning.training import StepFigures, train_steps
from lab.models.sources import load_model
from lab.tracking import progress
from split.training.data import ordered
from split.training.messages import Recipe
from split.training.optimizer import MasterAdamW, adamw_options
from split.training.settings import SplitTrainSettings, Train
from split.training.trainer import split_batch


def train_unsplit(
    settings: SplitTrainSettings, recipe: Recipe, examples: list[Example], device: torch.device
) -> list[float]:
    """Train the whole model; return the loss of every step."""
    project, optimization = settings.project, settings.project.optimization
    model = whole_model(settings, recipe, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = MasterAdamW(trained, **adamw_options(recipe))
    batches = ordered(examples, optimization.batch_size, settings.seed)
    losses: list[float] = []
    with progress("unsplit step", project.steps, settings.tracking.progress) as advance:

        def note(figures: StepFigures) -> None:
            losses.append(figures.loss)
            advance(f"loss {figures.loss:.4f}")

        train_steps(
            model,
            (part for batch in batches for part in split_batch(batch, project.micro_batches)),
            replace(optimization, accumulation=optimization.accumulation * project.micro_batches),
            first_step=0,
            total_steps=project.steps,
            steps=project.steps,
            seed=recipe.seed,
            optimizer=optimizer,
            on_step=note,
        )
    return losses


def whole_model(settings: SplitTrainSettings, recipe: Recipe, device: torch.device) -> Any:
    """The whole model before the first step, with the weights of the recipe trainable."""
    model: Any = load_model(settings.model, device).model
    if recipe.train is Train.everything:
        return model.requires_grad_(True)
    from split.training.first_adapter import first_adapter  # loads PEFT

    first_adapter(settings.model, recipe).put_on(model)
    return model
