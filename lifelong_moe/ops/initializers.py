"""How matrices begin where a system's authors say so."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def fan_in_normal_(weight: Tensor, scale: float, generator: torch.Generator | None = None) -> None:
    """Fill a matrix with a normal of deviation ``sqrt(scale / inputs)``, drawn again beyond two deviations.

    What is cut off makes the deviation that is found 0.88 of that.

    Args:
        weight: Outputs by inputs; changed in place.
        scale: Variance times the number of inputs, before cutting.
        generator: Of the random numbers; the default one if None.

    Source:
        Switch (arXiv:2101.03961), section 2.4; ``VarianceScalingInitializer`` in tensorflow/mesh,
        mesh_tensorflow/layers.py.
    """
    deviation = math.sqrt(scale / weight.shape[1])
    # On the CPU, as all numbers of a seed: the same on every device.
    drawn = torch.empty_like(weight, device="cpu")
    nn.init.trunc_normal_(drawn, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)
