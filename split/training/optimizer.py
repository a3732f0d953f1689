"""The optimizer of a shard: AdamW that steps in float32, whatever the precision of the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from split.training.messages import Recipe


class MasterAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) on float32 masters of parameters in 16 bits (arXiv 1710.03740, section 3.1).

    A parameter of at least 32 bits is its own master. Being a subclass, it makes `DistributedOptimizer` take its plain
    Python path, on which learning rate and state can be reached; on the other one they are in TorchScript.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **options: Any) -> None:
        self.parameters = list(parameters)
        self.masters = [_master(parameter) for parameter in self.parameters]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Take the gradients of the parameters, step on the masters, round the masters into the parameters."""
        rounded = [pair for pair in zip(self.parameters, self.masters, strict=True) if pair[0] is not pair[1]]
        for parameter, master in rounded:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        super().step(closure)
        for parameter, master in rounded:
            parameter.copy_(master)
            master.grad = None
        return None

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    @property
    def state_bytes(self) -> int:
        """Size of the moments, and of masters that are not the parameters themselves."""
        moments: int = sum(value.nbytes for state in self.state.values() for value in state.values())
        pairs = zip(self.parameters, self.masters, strict=True)
        return moments + sum(master.nbytes for parameter, master in pairs if master is not parameter)

    def tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The state for a checkpoint; `names` are those of the parameters, in order."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter, master in zip(names, self.parameters, self.masters, strict=True):
            found |= {f"{key}.{name}": value for key, value in self.state[master].items()}
            if master is not parameter:
                found[f"{_MASTER}.{name}"] = master.detach()
        return found

    @torch.no_grad()
    def load_tensors(self, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
        """Load the state from `tensors`, named alike. KeyError when one is missing."""
        for name, parameter, master in zip(names, self.parameters, self.masters, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.state[master] = {key: tensors[f"{key}.{name}"].clone() for key in keys}
            if master is not parameter:
                master.copy_(tensors[f"{_MASTER}.{name}"])


def adamw_options(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe's optimizer; its learning rate comes with each step."""
    return {"lr": 0.0, "betas": (recipe.beta1, recipe.beta2), "weight_decay": recipe.weight_decay}


_MASTER = "master"


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype.itemsize >= 4:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())
