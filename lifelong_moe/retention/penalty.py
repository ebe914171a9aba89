"""Quadratic penalties on the distance to the previous stage's weights: L2, or EWC with the Fisher information.

Legend: B sequences, S length, N scored tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.collectives import num_ranks, sum_over_ranks


@dataclass(frozen=True)
class WeightAnchor:
    """The penalty ``weight / 2 * sum importance * (theta - anchor)^2``.

    Plain tensors, not a module: nothing here is trained, counted or saved with the model.

    Source:
        Kirkpatrick et al. 2017 (arXiv:1612.00796), eq. 3, with one term per earlier task. Here, as in online EWC
        (Schwarz et al. 2018, arXiv:1805.06370, section 3), there is one term, at the previous stage's weights.
    """

    weight: float
    """Factor on the penalty."""
    anchors: dict[str, Tensor]
    """Old value of each penalized parameter, by name."""
    importances: dict[str, Tensor] | None = None
    """Importance of each weight, same names and shapes; None means 1 for all (L2)."""
    divided: frozenset[str] = frozenset()
    """Parameters of which this process has a part, and others have the rest."""
    copies: int = 1
    """Processes that have the same part."""

    def value(self, model: nn.Module) -> Tensor:
        """The penalty on a model's current weights.

        Args:
            model: Has a parameter for every anchor; its other parameters are not penalized.

        Returns:
            Scalar float32 with gradient, ``weight`` included.
        """
        parameters = dict(model.named_parameters())
        terms: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, anchor in self.anchors.items():
            # In float32 as the anchors are, whatever the precision of the model.
            squared = (parameters[name].float() - anchor).square()
            term = (squared if self.importances is None else self.importances[name] * squared).sum()
            terms[name in self.divided].append(term)
        whole, parts = (torch.stack(some).sum() if some else None for some in terms.values())
        sums = [] if whole is None else [whole]
        if parts is not None:
            sums.append(sum_over_ranks(parts) / self.copies)
        return self.weight / 2 * torch.stack(sums).sum()

    def to(self, device: torch.device | str) -> WeightAnchor:
        """The same on another device."""
        return self._with(lambda _, tensor: tensor.to(device))

    def on_part_of(self, model: LanguageModel) -> WeightAnchor:
        """The same where processes have divided a model's experts: on those that this process has."""
        placements = [layer.banks.placement for layer in model.moe_layers() if layer.banks.placement is not None]
        if not placements:
            return self
        experts = {parameter for layer in model.moe_layers() for parameter in layer.banks.parameters()}
        names = {name for name, p in model.named_parameters() if p in experts and name in self.anchors}
        rank, ranks = placements[0].group.rank(), placements[0].group.size()
        part = self._with(lambda name, tensor: tensor[rank::ranks].clone() if name in names else tensor)
        return replace(part, divided=frozenset(names), copies=num_ranks() // ranks)

    def _with(self, change: Callable[[str, Tensor], Tensor]) -> WeightAnchor:
        """The same with other tensors."""
        anchors = {name: change(name, tensor) for name, tensor in self.anchors.items()}
        importances = self.importances and {name: change(name, tensor) for name, tensor in self.importances.items()}
        return replace(self, anchors=anchors, importances=importances)


def make_anchor(
    model: nn.Module,
    previous: Mapping[str, Tensor],
    weight: float,
    importances: Mapping[str, Tensor] | None = None,
) -> WeightAnchor:
    """Anchor the trainable parameters at their values in the previous stage.

    Args:
        model: This stage's, grown and frozen as it will be trained; its values are ignored.
        previous: The previous stage's tensors by name; copied. Frozen parameters, and new ones (experts), are not
            penalized.
        weight: Factor on the penalty, not negative.
        importances: From :func:`fisher_diagonal` at ``previous`` for EWC; None for L2. Further names are ignored.

    Raises:
        ValueError: If ``weight`` is negative, nothing is left to penalize, or a shape or an importance does not fit.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must not be negative")
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad and n in previous}
    if not shapes:
        raise ValueError("no trainable parameter existed in the previous stage, so there is nothing to penalize")
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
    """How sensitive the loss per token is to each weight: the diagonal of the empirical Fisher information.

    ``F_i = sum over sequences (d nats / d theta_i)^2 / number of scored tokens``. ``nats``, summed over a sequence's
    scored tokens, is its negative log-likelihood, so the sum is the Fisher information of whole sequences, and ``F``
    its share per token. ``F`` therefore does not depend on the length of sequences, and estimates the curvature of the
    training loss in nats per token: a penalty of weight 1 counts as many old tokens as there are new ones. Of prompts
    with answers only the answers count, as in training.

    Targets come from the text rather than from the model (hence *empirical*), router losses are excluded, and the
    choice of experts is treated as constant.

    Args:
        model: At the old weights. Its mode, gradients and ``requires_grad`` do not change.
        sample: Blocks of old text, ``(B, S)`` each, as
            :class:`lifelong_moe.data.tokens.blocks.BlockDataset` yields them; only ``scored`` targets count.

    Returns:
        Float32, one tensor per parameter that requires a gradient, with its shape and device.

    Raises:
        ValueError: If the sample has no scored token.

    Source:
        Kirkpatrick et al. 2017 (arXiv:1612.00796), section 2, which does not say how F is computed; van de Ven 2025
        (arXiv:2502.11756) compares the options. Online EWC (arXiv:1805.06370) adds up each task's F, decayed, as it was
        at the end of the task; we recompute it at the newest weights, on text kept for replay.
    """
    rows, num_tokens = sample["scored"].any(dim=1).nonzero().flatten().tolist(), int(sample["scored"].sum())
    if not num_tokens:
        raise ValueError("fisher_diagonal needs at least one scored token")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fisher = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    training = model.training
    model.eval()  # routers return no losses
    try:
        # One sequence at a time: the square of a sum of gradients is not the sum of their squares.
        for row in rows:
            nats = _nats(model, {name: sample[name][row : row + 1] for name in sample})
            # `grad` instead of `backward`, which would add to the parameters' own gradients. Unused are, for
            # instance, deltas of a generation that this sequence does not use.
            grads = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for total, grad in zip(fisher.values(), grads, strict=True):
                if grad is not None:
                    total.add_(grad.float().square(), alpha=1 / num_tokens)
    finally:
        model.train(training)
    return fisher


def _nats(model: LanguageModel, sequence: Mapping[str, Tensor]) -> Tensor:
    """A sequence's next-token loss, summed over its scored tokens."""
    scored = sequence["scored"]
    # shape: (N, D)
    hidden_TD = model(TokenBatch.of(sequence)).hidden_BSD[scored]
    nats = model.head.cross_entropy(hidden_TD, sequence["target_ids"][scored], sequence["domain_ids"][scored])
    return nats * scored.sum()


def mean_fisher(fishers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Importance for several old distributions: the mean of their Fisher information, equally weighted.

    Args:
        fishers: One per distribution, all with the same names and shapes.

    Raises:
        ValueError: If there is none, or their names differ.
    """
    if not fishers or any(fisher.keys() != fishers[0].keys() for fisher in fishers):
        raise ValueError(f"cannot average {len(fishers)} Fisher diagonals: none at all, or of different parameters")
    # The Bayesian derivation has a sum, with which the penalty would grow from stage to stage.
    return {name: torch.stack([fisher[name] for fisher in fishers]).mean(dim=0) for name in fishers[0]}
