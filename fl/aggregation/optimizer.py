"""The server's optimizer: a step from the adapter that sites received towards the mean of those they sent back.

The difference `sent - mean` stands for a gradient (Reddi et al., arXiv 2003.00295), and torch's own optimizers take the
step, in float64:

    fedavgm     v = m v + g; x = x - l v                                    (Hsu et al., arXiv 1909.06335)
    nesterov    v = m v + g; x = x - l (g + m v)                            (DiLoCo's outer step, arXiv 2311.08105)
    fedadam     Adam with beta1 = m, with its correction of the first steps (arXiv 2003.00295, 1412.6980)

It steps on A and on B, as they are trained and sent. The rules that sum products give their factors a new basis in
every round, in which an earlier round's momentum means nothing: they take no optimizer.
"""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import nn

from fl.adapters import Adapter
from fl.settings import ServerOptimizerName, ServerOptimizerSettings

SEPARATOR = "/"


class ServerOptimizer:
    """One optimizer over all tensors of an adapter; a tensor that a round does not train keeps its momentum."""

    def __init__(self, settings: ServerOptimizerSettings) -> None:
        self._settings = settings
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def of(cls, settings: ServerOptimizerSettings) -> Self | None:
        """The optimizer that the settings name; None for none."""
        return None if settings.name is ServerOptimizerName.none else cls(settings)

    def step(self, sent: Adapter, mean: Adapter) -> dict[str, torch.Tensor]:
        """The next values of these tensors, in float64."""
        optimizer = self._over(sent)
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if name in mean:
                parameter.data = sent[name].to(torch.float64, copy=True)
                parameter.grad = parameter.data - mean[name]
        optimizer.step()
        return {name: self._parameters[name].data for name in mean}

    def state(self) -> dict[str, torch.Tensor]:
        """All that a next step depends on besides the adapter: `<tensor>/<torch's name>`."""
        kept = self._optimizer.state if self._optimizer else {}
        return {
            f"{name}{SEPARATOR}{key}": value.clone()
            for name, parameter in self._parameters.items()
            for key, value in kept.get(parameter, {}).items()
            if value is not None  # SGD without momentum keeps None
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned. ValueError for the state of another kind of optimizer."""
        if not state:  # no step was taken yet
            return
        kept: dict[str, dict[str, torch.Tensor]] = {}
        for place, value in state.items():
            name, _, key = place.rpartition(SEPARATOR)
            kept.setdefault(name, {})[key] = value.clone()
        is_adam = self._settings.name is ServerOptimizerName.fedadam
        wanted = {"step", "exp_avg", "exp_avg_sq"} if is_adam else {"momentum_buffer"}
        if any(values.keys() != wanted for values in kept.values()):
            raise ValueError(f"it is not of project.server_optimizer.name={self._settings.name.name}")
        optimizer = self._over(kept)
        for name, values in kept.items():
            optimizer.state[self._parameters[name]] = values

    def _over(self, names: Iterable[str]) -> torch.optim.Optimizer:
        """The optimizer, over these tensors, too."""
        new = [name for name in names if name not in self._parameters]
        self._parameters |= {name: nn.Parameter(torch.zeros(0, dtype=torch.float64)) for name in new}
        added = [self._parameters[name] for name in new]
        if self._optimizer is None:
            self._optimizer = self._make(added)
        elif added:
            self._optimizer.add_param_group({"params": added})
        return self._optimizer

    def _make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self._settings
        if settings.name is ServerOptimizerName.fedadam:
            return torch.optim.Adam(
                parameters,
                lr=settings.learning_rate,
                betas=(settings.momentum, settings.beta2),
                eps=settings.epsilon,
                foreach=False,
            )
        return torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.name is ServerOptimizerName.nesterov,
            foreach=False,
        )
