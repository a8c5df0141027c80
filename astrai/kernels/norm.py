"""RMS norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm:
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.eps = eps
        self._mirrors = weight.device.type == "cpu"
        self._weight = torch.cat((weight, weight)) if self._mirrors else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, a view of a larger tensor on the CPU."""
        if not self._mirrors:
            return F.rms_norm(x, self._weight.shape, self._weight, self.eps)
        # The CPU has one kernel for layer norm and ten for RMS norm. The mean of [x, -x] is 0 and
        # its variance mean(x²), so its layer norm begins with the RMS norm of x.
        mirrored = torch.cat((x, -x), dim=-1)
        both = F.layer_norm(mirrored, self._weight.shape, self._weight, None, self.eps)
        return both[..., : x.shape[-1]]
