"""RMS norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm:
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension, in the dtype of x.

    `exact` is the weight in float32.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.eps = eps
        self.weight = weight.to(dtype)
        self.exact = weight.float()
        self._mirrors = weight.device.type == "cpu"
        if self._mirrors:
            self._twice = torch.stack((self.weight, self.weight))
            self._signs = torch.tensor([[1.0], [-1.0]], dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, a view of a larger tensor on the CPU."""
        if not self._mirrors:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The CPU has one kernel for layer norm and ten for RMS norm. The mean of [x, -x] is 0 and
        # its variance mean(x²), so its layer norm begins with the RMS norm of x.
        mirrored = x.unsqueeze(-2) * self._signs
        shape = self._twice.shape
        return torch.layer_norm(mirrored, shape, self._twice, None, self.eps).select(-2, 0)
