"""Matrix products in the precision of their operands, also under autocast (ruling 9)."""

import torch
import torch.nn as nn
from torch import Tensor

__all__ = ['Linear', 'matmul']


@torch.fx.wrap
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips only what stands below this line)
        if torch.amp.is_autocast_available(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return a @ b
    return a @ b


class Linear(nn.Linear):
    """Linear layer in the precision of its parameters: its inputs are small."""

    def forward(self, x: Tensor) -> Tensor:
        x = matmul(x, self.weight.t())
        return x if self.bias is None else x + self.bias
