"""Where NaN or infinity comes up first in a forward pass that gave some.

Its result does not tell: attention takes masked positions times zero, and zero times infinity is not zero, so that one
position spoils the whole text in the layer behind it. So the pass is made again, and every module is looked at.

Shapes: B batch rows, T positions in this pass, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook


@contextmanager
def first_faults(width: int) -> Iterator[dict[int, int]]:
    """By batch row, at which of T = `width` positions the first hidden states were not finite; after the block."""
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
