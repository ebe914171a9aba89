"""What a router is given, what it answers, and what all routers share.

Legend: T tokens, D model width, K experts per token, E experts, N rows handed to experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from lifelong_moe.config.routing.base import Bundles, RoutingConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.ops.dispatch import ExpertOrder, combine, dispatch
from lifelong_moe.ops.router_losses import choice_counts


class Causality(StrEnum):
    """What a token's routing may depend on: the classes of the field's survey."""

    token_local = "A"
    ordered = "B"
    leaks_when_full = "C"
    leaks = "D"


@dataclass(frozen=True)
class RoutingContext:
    """What a router may look at besides the hidden states."""

    token_ids_T: Tensor
    """Token ids, int64 ``(T,)``."""
    mask_T: Tensor
    """True for real tokens, bool ``(T,)``."""
    group_ids_T: Tensor
    """Document cluster or label of each token, int64 ``(T,)``; zeros where routing has no groups."""
    old_text_T: Tensor | None = None
    """True for text of earlier stages, bool ``(T,)``; given in a review only."""
    features_TF: Tensor | None = None
    """Frozen token features ``(T, F)``, where clusters are made of them."""
    buckets_of: Mapping[int, Tensor] = field(default_factory=dict)
    """Bucket of each token, int64 ``(T,)``, by the number of a layer's experts; where routing has tables of them."""
    num_sequences: int = 1
    """Sequences that the T tokens are, of equal length, one after the other; capacity counts in each by itself."""
    full_length: int | None = None
    """Tokens of a full sequence (``model.context``), of which capacity is a share; the length at hand by default."""

    @property
    def sequence_T(self) -> Tensor:  # noqa: N802 - named as the tensor that it is
        """Number of each token's sequence, int64 ``(T,)``."""
        length = len(self.token_ids_T) // self.num_sequences
        return torch.arange(len(self.token_ids_T), device=self.token_ids_T.device) // max(1, length)


@dataclass(frozen=True)
class RouterLoss:
    """One auxiliary loss of one layer."""

    value: Tensor
    """Unweighted scalar, float32."""
    coefficient: float
    """Its factor in the training loss, in which the layers' losses are summed."""


@dataclass
class Routing:
    """A router's answer. The layer only calls ``dispatch``, ``counts_E`` and ``combine``, so an answer of another
    kind (slots, experts that pick tokens) is a subclass and the layer stays as it is."""

    expert_ids_TK: Tensor
    """Chosen experts, int64 ``(T, K)``, distinct within a row; -1 where a token uses fewer than K (``ragged``)."""
    weights_TK: Tensor
    """Gate weights, float32 ``(T, K)``."""
    num_experts: int
    """E."""
    losses: dict[str, RouterLoss] = field(default_factory=dict)
    """Auxiliary losses by name; empty in evaluation."""
    ragged: bool = False
    """Whether tokens may use different numbers of experts: dropped, not chosen, or gates of 0."""
    dropped: Tensor | None = None
    """Real tokens' choices that found no room, and all of them, int64 ``(2,)``; where there is a capacity."""
    log_weights_TK: Tensor | None = None
    """Logarithms of the weights where experts compete: there a weight that underflows still has one, and a gradient."""

    _orders: dict[int, ExpertOrder] = field(default_factory=dict, init=False, repr=False)

    def by_expert(self, first_expert: int = 0) -> ExpertOrder:
        """Assignments sorted by expert, from this one on and around: sorted once, when first asked for."""
        if not self._orders:
            self._orders[0] = ExpertOrder.of(self.expert_ids_TK, self.num_experts, ragged=self.ragged)
        if first_expert not in self._orders:
            self._orders[first_expert] = self._orders[0].begun_with(first_expert)
        return self._orders[first_expert]

    @property
    def counts_E(self) -> Tensor:  # noqa: N802 - named as the tensor that it is
        """Assignments of each expert, int64 ``(E,)``."""
        return self.by_expert().counts_E

    def dispatch(self, x_TD: Tensor, first_expert: int = 0) -> Tensor:
        """Rows for the experts ``(N, D)``, sorted by expert, from ``first_expert`` on and around.

        ``counts_E`` says how many each gets.
        """
        order, top_k = self.by_expert(first_expert), self.expert_ids_TK.shape[1]
        if self.ragged:
            return x_TD.index_select(0, order.order_N // top_k)
        return dispatch(x_TD, order.order_N, order.inverse_N, top_k)

    def combine(self, rows_ND: Tensor, first_expert: int = 0) -> Tensor:
        """Weighted sum of the experts' outputs per token, ``(T, D)``; 0 for a token without expert.

        The rows stand in the order of :meth:`dispatch` with the same ``first_expert``.
        """
        order = self.by_expert(first_expert)
        if self.ragged:
            num_tokens, top_k = self.expert_ids_TK.shape
            weights_N = self.weights_TK.flatten()[order.order_N].to(rows_ND.dtype)
            out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
            return out_TD.index_add(0, order.order_N // top_k, rows_ND * weights_N.unsqueeze(1))
        return combine(rows_ND, self.weights_TK, order.order_N, order.inverse_N)

    def counts_of(self, mask_T: Tensor) -> Tensor:
        """Assignments that each expert has from some of the tokens, int64 ``(E,)``."""
        return choice_counts(self.expert_ids_TK, mask_T, self.num_experts)


class Router(nn.Module):
    """Base of all routers. Experts come in generations: those a stage is born with, in order.

    A subclass implements :meth:`forward` and :meth:`add_experts`; what it trains of generation g stands at place g of a
    ``ParameterList`` or a ``ModuleList``. One of your own is named in the config by its dotted path and built as
    ``YourRouter(config, width=..., layer=..., **config.options)``.
    """

    causality: Causality = Causality.token_local
    """The strictest promise this router keeps; C and D are refused in a decoder."""
    expert_scale: float | None = None
    """Variance of experts' matrices times their inputs, where a mode's authors begin them so; else as all others."""

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.layer = layer
        self.generations: list[int] = []
        self.held_down = False
        self._owners: tuple[list[int], Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """E, over all generations."""
        return sum(self.generations)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for each token."""
        raise TypeError(f"{type(self).__name__} must implement forward(x_TD, context) -> Routing")

    def add_experts(self, num: int) -> None:
        """Make room for a new generation of ``num`` experts."""
        raise TypeError(f"{type(self).__name__} must implement add_experts(num)")

    def row_generations(self) -> list[Tensor]:
        """Trained rows of each generation ``(E_g, D)``, oldest first; empty where a router has none."""
        return []

    def parameters_of(self, generation: int) -> list[nn.Parameter]:
        """All that trains of one generation: its place in each list that has one for every generation."""
        found: list[nn.Parameter] = []
        for each in self.children():
            if isinstance(each, nn.ParameterList | nn.ModuleList) and len(each) == len(self.generations):
                one = each[generation]
                found += one.parameters() if isinstance(one, nn.Module) else [one]
        return found

    def begun_parameters(self) -> list[nn.Parameter]:
        """Parameters that begin as the router made them, not at random like all other matrices."""
        return []

    def begin(self, generator: torch.Generator | None = None) -> None:
        """Fill rows as the mode's authors do, after all matrices were filled alike; by default they stay so."""

    def set_rows(self, rows_ED: Tensor) -> None:
        """Begin the newest generation's rows with these, ``(num, D)``."""
        raise ConfigError(f"routing.mode={self.config.mode} has no router rows to begin; set grow.router=random.")

    def end_step(self, taken: bool) -> None:
        """Do what follows an optimizer step, in training: by default nothing.

        Args:
            taken: Whether the step was taken; one whose loss is not finite, for instance, is not.
        """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Router:
        """Go where the model goes, but with buffers in float32 whatever its precision.

        What adapts in small steps would soon stand still in bfloat16, where 0.5 + 0.001 is 0.5.
        """
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def freeze(self) -> None:
        """Stop training every row there is now; generations added later train."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def holding_down(self) -> Iterator[None]:
        """Within this context a router in evaluation mode answers as if the newest generation were not there.

        Its scores are not computed at all: among other columns, sums are rounded and exact ties are broken otherwise.
        """
        self.held_down = True
        try:
            yield
        finally:
            self.held_down = False

    def allowed(self, context: RoutingContext) -> Tensor | None:
        """Experts that each token's bundle has, bool ``(T, E)``; None if all.

        With ``routing.bundles`` a token's group is a bundle, and it uses that generation's experts alone; a group that
        does not exist counts as bundle 0.
        """
        group_T, num = context.group_ids_T, len(self.choosable)
        if self.config.bundles == Bundles.none or num == 1:
            return None
        births_E = self.owners(self.choosable, group_T.device)
        return births_E == torch.where(group_T < num, group_T, 0).unsqueeze(1)

    def owners(self, sizes: list[int], device: torch.device) -> Tensor:
        """Of generations, or groups, of these sizes the one that each expert belongs to, int64 ``(E,)``.

        Kept until they change: it is made on the CPU, for which a GPU would have to wait at each step.
        """
        if self._owners is None or self._owners[0] != sizes or self._owners[1].device != device:
            owners_E = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
            self._owners = list(sizes), owners_E
        return self._owners[1]

    @property
    def choosable(self) -> list[int]:
        """Experts of each generation among which tokens choose: all, but for those held down."""
        return self.generations[:-1] if self.held_down else self.generations

    @property
    def num_choosable(self) -> int:
        """How many those are, over all generations."""
        return sum(self.choosable)


def token_hash(token_ids_T: Tensor, salt: int) -> Tensor:
    """A fixed pseudo-random non-negative integer per token id, int64 ``(T,)`` (multiplicative hashing, 31 bits)."""
    mixed = (token_ids_T + 0x9E37 * (salt + 1)) * 2654435761 % (1 << 32)
    return ((mixed >> 15) ^ mixed) * 2246822519 % (1 << 32) >> 1


def hashed_experts(token_ids_T: Tensor, start_T: Tensor, size_T: Tensor, top_k: int, salt: int) -> Tensor:
    """``top_k`` consecutive experts of ``[start, start + size)``, the first chosen by the token id's hash.

    Returns:
        int64 ``(T, K)``, distinct within a row if ``size >= top_k``.

    Source:
        Hash layers (arXiv:2106.04426), random hash; there with K = 1.
    """
    first_T1 = token_hash(token_ids_T, salt).unsqueeze(1)
    offsets_K = torch.arange(top_k, device=token_ids_T.device)
    return start_T.unsqueeze(1) + (first_T1 + offsets_K) % size_T.unsqueeze(1)
