"""Quadratic penalties that tie weights to the previous stage's: L2, or EWC with the Fisher information.

Legend: B sequences, S length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel


@dataclass(frozen=True)
class WeightAnchor:
    """Where weights stood and how much each matters: ``weight / 2 * sum importance * (theta - anchor)^2``.

    Plain tensors and no module: nothing here is trained, counted or saved with the model.

    Source:
        Kirkpatrick et al. 2017 (arXiv:1612.00796), eq. 3, there with one such term for every earlier task. Here, as
        in online EWC (Schwarz et al. 2018, arXiv:1805.06370, section 3), one term at the newest old weights.
    """

    weight: float
    """Factor on the penalty."""
    anchors: dict[str, Tensor]
    """Old value of each penalized parameter, by name."""
    importances: dict[str, Tensor] | None = None
    """Importance of each number, same names and shapes; None means 1 for all (L2)."""

    def value(self, model: nn.Module) -> Tensor:
        """The penalty on a model as it is now.

        Args:
            model: Has a parameter for every anchor; others are free.

        Returns:
            Scalar float32 with gradient; ``weight`` is in it.
        """
        parameters = dict(model.named_parameters())
        terms = []
        for name, anchor in self.anchors.items():
            squared = (parameters[name].float() - anchor).square()
            terms.append((squared if self.importances is None else self.importances[name] * squared).sum())
        return self.weight / 2 * torch.stack(terms).sum()

    def to(self, device: torch.device | str) -> WeightAnchor:
        """The same on another device."""
        importances = self.importances
        return WeightAnchor(
            self.weight,
            {name: tensor.to(device) for name, tensor in self.anchors.items()},
            None if importances is None else {name: tensor.to(device) for name, tensor in importances.items()},
        )


def make_anchor(
    model: nn.Module,
    previous: Mapping[str, Tensor],
    weight: float,
    importances: Mapping[str, Tensor] | None = None,
) -> WeightAnchor:
    """Tie what trains now to what it was before.

    Args:
        model: This stage's, grown and frozen as it will be trained; its values are not looked at.
        previous: The previous stage's tensors by name; copied. Its frozen ones, and those of this model alone (new
            experts), stay out of the penalty.
        weight: Factor on the penalty, not negative.
        importances: From :func:`fisher_diagonal` at ``previous`` for EWC; None for L2. Further names are ignored.

    Raises:
        ValueError: If ``weight`` is negative, nothing is left to penalize, or a shape or an importance does not fit.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must not be negative")
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad and n in previous}
    if not shapes:
        raise ValueError("nothing that trains was there before, so there is nothing to penalize")
    return WeightAnchor(
        weight,
        _copies(previous, shapes, "anchor"),
        None if importances is None else _copies(importances, shapes, "importance"),
    )


def _copies(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], kind: str) -> dict[str, Tensor]:
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise ValueError(f"{name} of shape {tuple(shape)} has no {kind} of that shape")
    return {name: tensors[name].detach().to(torch.float32, copy=True) for name in shapes}


def fisher_diagonal(model: LanguageModel, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much a token's loss would rise if one number moved: the diagonal of the empirical Fisher information.

    ``F_i = sum over sequences of (d nats / d theta_i)^2 / scored tokens of all``, one sequence at a time. ``nats``,
    summed over a sequence's scored tokens, is its negative log-likelihood, so this is the Fisher information of whole
    sequences, and ``F`` its share per token. Thus ``F`` does not depend on how long sequences are, and estimates the
    curvature of the training loss in nats per token: a penalty of weight 1 stands for as many old tokens as there are
    new ones. Of prompts with answers only answers count, as in training.

    The targets are the text's and not drawn from the model (hence *empirical*); router losses are left out; which
    experts a token chose counts as given.

    Args:
        model: At the old weights. Left in its mode, its ``grad`` and ``requires_grad`` untouched.
        sample: Blocks of old text, ``(B, S)`` each, as
            :class:`lifelong_moe.data.tokens.blocks.BlockDataset` makes them; only ``scored`` targets count.

    Returns:
        Float32, one tensor a parameter that requires a gradient, of its shape and on its device.

    Raises:
        ValueError: If the sample has no scored token.

    Source:
        Kirkpatrick et al. 2017 (arXiv:1612.00796), section 2, which leaves open how F is computed; van de Ven 2025
        (arXiv:2502.11756) compares the ways. Online EWC (arXiv:1805.06370) adds each task's F once, decayed, as it
        was when the task ended; we can compute it again, at the newest weights and on text kept for replay.
    """
    rows, num_tokens = sample["scored"].any(dim=1).nonzero().flatten().tolist(), int(sample["scored"].sum())
    if not num_tokens:
        raise ValueError("fisher_diagonal needs at least one scored token")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fisher = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    training = model.training
    model.eval()  # without router losses
    try:
        for row in rows:
            nats = _nats(model, {name: sample[name][row : row + 1] for name in sample})
            # Not `backward`: the parameters' own gradients stay as they are.
            grads = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for total, grad in zip(fisher.values(), grads, strict=True):
                if grad is not None:
                    total.add_(grad.float().square(), alpha=1 / num_tokens)
    finally:
        model.train(training)
    return fisher


def _nats(model: LanguageModel, sequence: Mapping[str, Tensor]) -> Tensor:
    """A sequence's next-token loss, summed over what a stage trains on."""
    scored = sequence["scored"]
    hidden_TD = model(TokenBatch.of(sequence)).hidden_BSD[scored]
    nats = model.head.cross_entropy(hidden_TD, sequence["target_ids"][scored], sequence["group_ids"][scored])
    return nats * scored.sum()


def mean_fisher(fishers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Importance for several old distributions: the mean of their Fisher information, each counting the same.

    A sum, as the Bayesian reading has it, would make the penalty grow with every stage.

    Args:
        fishers: One a distribution, all with the same names and shapes.

    Raises:
        ValueError: If there is none, or their names differ.
    """
    if not fishers or any(fisher.keys() != fishers[0].keys() for fisher in fishers):
        raise ValueError(f"cannot average {len(fishers)} Fisher diagonals: none at all, or of different parameters")
    return {name: torch.stack([fisher[name] for fisher in fishers]).mean(dim=0) for name in fishers[0]}
