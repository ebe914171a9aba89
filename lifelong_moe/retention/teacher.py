"""The teacher: the previous stage's model, sharing every tensor that cannot change."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.config import DistillConfig, DistillText


def make_teacher(model: LanguageModel, shared: Iterable[Tensor]) -> LanguageModel:
    """Copy a model as it is now; tensors in ``shared`` are the same objects in both and take no memory.

    Args:
        model: The previous stage's model, before growth.
        shared: Tensors that this stage will not train.

    Returns:
        A model in evaluation mode without gradients.
    """
    teacher = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    return teacher.requires_grad_(False).eval()


def distilled_rows(replayed_B: Tensor, config: DistillConfig) -> Tensor:
    """Which sequences of a batch are distilled on.

    Args:
        replayed_B: True for replayed sequences, bool ``(B,)``.
        config: ``text`` chooses new or replayed ones, ``fraction`` the share of them, rounded up.

    Returns:
        Their indices, int64, ascending; empty if there are none.
    """
    wanted_B = replayed_B if config.text == DistillText.replay else ~replayed_B
    rows = torch.nonzero(wanted_B).flatten()
    return rows[: math.ceil(config.fraction * len(rows))]
