"""The average of a stage's trained weights with those that it began with, and the way from these to those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
    parameters = dict(model.named_parameters()) if start else {}
    for name, old in start.items():
        # In float32: half precision would round twice.
        new = parameters[name].float()
        parameters[name].copy_(new.lerp(old.to(new.device, torch.float32), share))


def moved_since(model: nn.Module, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Previous values of the parameters that existed before, in their shape, and have changed.

    Args:
        model: At the end of a stage.
        previous: The previous stage's parameters by name.
    """
    there = {name: p for name, p in model.named_parameters() if name in previous and previous[name].shape == p.shape}
    # Compared in one kind of numbers: a checkpoint's may be halves.
    return {name: previous[name].detach() for name, p in there.items() if not torch.equal(previous[name].to(p), p)}


def between(model: nn.Module, start: Mapping[str, Tensor], shares: Sequence[float]) -> Iterator[float]:
    """Give a model one mixture of its weights and earlier ones after the other: ``(1 - a) * start + a * theta``.

    Args:
        model: Changed in place while its mixtures are asked for; at the end, or on an error, it is what it was.
            Parameters without a value in ``start`` stay.
        start: By name, from :func:`moved_since`.
        shares: ``a`` of each mixture, 0 to 1.

    Yields:
        Each of the shares, while the model has its mixture.

    Source:
        Wortsman et al. 2022, as for :func:`average_with`, figure 1: one curve shows what is kept, and at which price.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in start}
    end = {name: p.detach().clone() for name, p in parameters.items()}

    def return_to_end() -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(end[name])

    try:
        for share in shares:
            # From the end each time, so that no mixture has another one's rounding.
            return_to_end()
            average_with(model, start, 1 - share)
            yield share
    finally:
        return_to_end()
