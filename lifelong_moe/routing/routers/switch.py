"""Switch's router: the learned one with top-1, and the way its authors begin it."""

from __future__ import annotations

import torch

from lifelong_moe.ops.initializers import fan_in_normal_
from lifelong_moe.routing.routers.learned import LearnedRouter

SCALE = 0.1
"""Variance of a matrix times its inputs at the beginning: a tenth of what is usual, for stability."""


class SwitchRouter(LearnedRouter):
    """The expert of the largest gate, at the gate of the full softmax; small at the beginning.

    Its rows and experts begin truncated normal of deviation ``sqrt(0.1 / inputs)``, those of a stage with
    ``grow.init=random`` too.

    Source:
        Switch (arXiv:2101.03961), section 2.4, there all matrices but the embedding; tensorflow/mesh,
        mesh_tensorflow/transformer/moe.py, ``_switch_gating``.
    """

    # Also of the experts: Switch begins all of its matrices so.
    expert_scale = SCALE

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Rows as small as the experts' matrices."""
        for rows_ED in self.rows:
            fan_in_normal_(rows_ED, SCALE, generator)
