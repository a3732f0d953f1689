"""The first position at which a forward pass gives NaN or infinity.

The result of the pass does not show it: attention multiplies masked positions by zero, and zero times infinity is NaN,
so one position spoils the whole text in the next layer. So the pass is repeated, and the output of every module
checked.

Shapes: B batch rows, T positions in this pass, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook


@contextmanager
def first_faults(width: int) -> Iterator[dict[int, int]]:
    """By batch row, the first of T = `width` positions whose hidden states were not finite; filled when the block
    ends."""
    found: dict[int, int] = {}

    def look(module: Any, given: Any, output: Any) -> None:
        hidden_BTH = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden_BTH, Tensor) or hidden_BTH.dim() != 3 or hidden_BTH.shape[1] != width:
            return
        spoilt_BT = ~hidden_BTH.isfinite().all(-1)
        for row in spoilt_BT.any(-1).nonzero()[:, 0].tolist():
            found.setdefault(row, spoilt_BT[row].tolist().index(True))

    handle = register_module_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()
