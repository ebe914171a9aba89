"""The average of a stage's trained weights with those that it began with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def old_trainable(model: nn.Module, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Previous values of the parameters that train and existed before.

    Args:
        model: Grown and frozen as it will be trained; its values are ignored.
        previous: The previous stage's parameters by name.
    """
    trains = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in previous.items() if trains.get(name) == tensor.shape}


@torch.no_grad()
def average_with(model: nn.Module, start: Mapping[str, Tensor], share: float) -> None:
    """Move parameters towards their values at the start: ``(1 - share) * theta + share * start``.

    Args:
        model: Changed in place; parameters without a value in ``start`` stay.
        start: By name, from :func:`old_trainable`.
        share: Of the values at the start, 0 to 1.

    Source:
        Wortsman et al. 2022 (arXiv:2109.01903), "Robust fine-tuning of zero-shot models", section 3: one average of all
        weights, after training. Lin et al. 2023 (arXiv:2309.06256) find it the best of several methods against
        forgetting in language models.
    """
    parameters = dict(model.named_parameters())
    for name, old in start.items():
        # In float32: half precision would round twice.
        new = parameters[name].float()
        parameters[name].copy_(new.lerp(old.to(new.device, torch.float32), share))
