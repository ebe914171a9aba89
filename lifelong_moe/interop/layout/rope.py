"""Rotary positions as ``config.json`` describes them. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lifelong_moe.config.model import RopeScaling, RopeType
from lifelong_moe.storage.plain import PlainError

Kind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """``rope_parameters`` of transformers 5, and ``rope_scaling`` of earlier versions."""

    rope_theta: float | None = None
    rope_type: Kind | None = None
    type: Kind | None = None
    """The former name of ``rope_type``."""
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: float = 1.0

    def scaling(self, context: int) -> RopeScaling | None:
        """The scaling in our words; None if there is none.

        Args:
            context: The checkpoint's ``max_position_embeddings``.
        """
        kind = self.rope_type or self.type or "default"
        if kind == "default":
            return None
        original = self.original_max_position_embeddings or context
        factor = self.factor
        if factor is None and kind == "yarn":
            factor = context / original
        if factor is None:
            raise PlainError("missing", ".rope_parameters.factor")
        if kind == "linear":
            return RopeScaling(rope_type=RopeType.linear, factor=factor)
        if kind == "llama3":
            return RopeScaling(
                rope_type=RopeType.llama3,
                factor=factor,
                original_max_position_embeddings=original,
                low_freq_factor=self.low_freq_factor,
                high_freq_factor=self.high_freq_factor,
            )
        return RopeScaling(
            rope_type=RopeType.yarn,
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=self.beta_fast or 32.0,
            beta_slow=self.beta_slow or 1.0,
            truncate=self.truncate,
            attention_factor=self._attention_factor(factor),
        )

    def _attention_factor(self, factor: float) -> float | None:
        if self.attention_factor is not None or not (self.mscale and self.mscale_all_dim):
            return self.attention_factor
        # DeepSeek-V2's two keys, whose quotient is what transformers makes of them.
        above, below = (0.1 * share * math.log(max(factor, 1.0)) + 1 for share in (self.mscale, self.mscale_all_dim))
        return above / below
