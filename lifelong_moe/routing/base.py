"""A router's input, its output, and the base class of all routers.

Legend: T tokens, D model width, K experts per token, E experts, N rows handed to experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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
    domain_ids_T: Tensor
    """Domain of each token (document cluster, label, or generation), int64 ``(T,)``; zeros where routing has none."""
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
    present: frozenset[int] | None = None
    """Generations that tokens belong to, where domains are generations and the host knows them; None means any."""

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
    coefficient: float | Tensor
    """Its factor in the training loss, in which the layers' losses are summed."""


@dataclass(frozen=True, eq=False)
class LayersLoss:
    """One auxiliary loss of one layer, to be computed with those of layers that are alike, in the same kernels.

    On a device only: a CPU's gradients would be added up in another order, and round differently.
    """

    formula: Callable[..., Tensor]
    """Of the layer's own tensors, which may be stacked, then of those that layers share."""
    own: tuple[Tensor, ...]
    shared: tuple[Any, ...]
    alike: Hashable
    """Equal where ``shared`` is."""
    coefficient: float
    """As of :class:`RouterLoss`."""

    @property
    def value(self) -> Tensor:
        """As of :class:`RouterLoss`, computed by itself."""
        return self.formula(*self.own, *self.shared)

    @staticmethod
    def of_all(losses: Sequence[LayersLoss]) -> tuple[Tensor, Tensor]:
        """The values of several layers, and those times their coefficients, in any order."""
        groups: dict[Hashable, list[LayersLoss]] = {}
        for one in losses:
            key = one.formula, one.alike, one.coefficient, tuple(tensor.shape for tensor in one.own)
            groups.setdefault(key, []).append(one)
        values = [
            (first := group[0]).formula(*map(torch.stack, zip(*(one.own for one in group), strict=True)), *first.shared)
            for group in groups.values()
        ]
        weighted = [value * group[0].coefficient for value, group in zip(values, groups.values(), strict=True)]
        return (values[0], weighted[0]) if len(values) == 1 else (torch.cat(values), torch.cat(weighted))


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
    losses: Mapping[str, RouterLoss | LayersLoss] = field(default_factory=dict)
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
            # Always sorted from expert 0: another start is a rotation, cheaper than a second sort.
            self._orders[0] = ExpertOrder.of(self.expert_ids_TK, self.num_experts, ragged=self.ragged)
        if first_expert not in self._orders:
            self._orders[first_expert] = self._orders[0].starting_at(first_expert)
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
            # Rows are fewer than T·K here, so no inverse permutation exists to gather by.
            return x_TD.index_select(0, order.order_N // top_k)
        return dispatch(x_TD, order.order_N, order.inverse_N, top_k)

    def combine(self, rows_ND: Tensor, first_expert: int = 0) -> Tensor:
        """Weighted sum of the experts' outputs per token, ``(T, D)``; 0 for a token without expert.

        The rows stand in the order of :meth:`dispatch` with the same ``first_expert``.
        """
        order = self.by_expert(first_expert)
        if self.ragged:
            num_tokens, top_k = self.expert_ids_TK.shape
            # Gate weights are float32; experts may compute in bfloat16.
            weights_N = self.weights_TK.flatten()[order.order_N].to(rows_ND.dtype)
            out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
            return out_TD.index_add(0, order.order_N // top_k, rows_ND * weights_N.unsqueeze(1))
        return combine(rows_ND, self.weights_TK, order.order_N, order.inverse_N)

    def counts_of(self, mask_T: Tensor) -> Tensor:
        """Assignments that each expert has from some of the tokens, int64 ``(E,)``."""
        return choice_counts(self.expert_ids_TK, mask_T, self.num_experts)

    def loads_of(self, weight_T: Tensor) -> Tensor:
        """The same where each token counts by a weight: float64 ``(E,)``, or int64 if the weights are bool."""
        weight_T = weight_T.double() if weight_T.is_floating_point() else weight_T.long()
        weights_TK = weight_T.unsqueeze(1) * (self.expert_ids_TK >= 0)
        loads_E = weights_TK.new_zeros(self.num_experts)
        return loads_E.scatter_add(0, self.expert_ids_TK.clamp_min(0).flatten(), weights_TK.flatten())


class Router(nn.Module):
    """Base of all routers. Each stage adds one generation of experts; generations are ordered by age.

    A subclass implements :meth:`forward` and :meth:`add_experts`, and keeps the parameters of generation g at index g
    of a ``ParameterList`` or ``ModuleList``. The config names a custom router by its dotted path; it is built as
    ``YourRouter(config, width=..., layer=..., **config.options)``.
    """

    causality: Causality = Causality.token_local
    """The strictest promise this router keeps; C and D are refused in a decoder."""
    expert_scale: float | None = None
    """Initial variance of the experts' matrices times their inputs, where a mode's authors set one."""

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.layer = layer
        self.generations: list[int] = []
        self.masks_newest = False
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
        """The parameters of one generation: its entry in each list that has one for every generation."""
        found: list[nn.Parameter] = []
        for each in self.children():
            if isinstance(each, nn.ParameterList | nn.ModuleList) and len(each) == len(self.generations):
                one = each[generation]
                found += one.parameters() if isinstance(one, nn.Module) else [one]
        return found

    def preset_parameters(self) -> list[nn.Parameter]:
        """Parameters whose initial values the router sets itself; all other matrices are initialized at random."""
        return []

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Initialize rows as the mode's authors do, after the model's own initialization; by default do nothing."""

    def set_rows(self, rows_ED: Tensor) -> None:
        """Initialize the newest generation's rows with these, ``(num, D)``."""
        raise ConfigError(f"routing.mode={self.config.mode} has no router rows to initialize; set grow.router=random.")

    def end_step(self, taken: bool) -> None:
        """Update whatever adapts after an optimizer step in training; by default nothing.

        Args:
            taken: Whether the step was taken; one whose loss is not finite, for instance, is not.
        """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Router:
        """Follow the model's device, but keep buffers in float32 whatever its precision."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            # Biases and coefficients adapt in small steps, which bfloat16 would lose: there 0.5 + 0.001 is 0.5.
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def freeze(self) -> None:
        """Freeze all current parameters; generations that are added later train."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def masking_newest(self) -> Iterator[None]:
        """Within this context a router in evaluation mode answers as if the newest generation did not exist."""
        # Scores of the newest generation are not computed at all: among other columns sums round differently, and exact
        # ties break differently.
        self.masks_newest = True
        try:
            yield
        finally:
            self.masks_newest = False

    def allowed(self, context: RoutingContext) -> Tensor | None:
        """Experts that each token's generation has, bool ``(T, E)``; None if all.

        With ``routing.bundles`` a token's domain is a generation, and it uses that generation's experts alone; a domain
        without a generation counts as 0.
        """
        domain_T, num = context.domain_ids_T, len(self.available)
        if self.config.bundles == Bundles.none or num == 1:
            return None
        births_E = self.owners(self.available, domain_T.device)
        # Text of a domain that has no generation here is read by the oldest.
        return births_E == torch.where(domain_T < num, domain_T, 0).unsqueeze(1)

    def owners(self, sizes: list[int], device: torch.device) -> Tensor:
        """Which of several generations (or groups) of these sizes each expert belongs to, int64 ``(E,)``."""
        if self._owners is None or self._owners[0] != sizes or self._owners[1].device != device:
            # Made there and kept: a copy from the CPU would make a GPU wait.
            owners_E = torch.cat([torch.full((size,), owner, device=device) for owner, size in enumerate(sizes)])
            self._owners = list(sizes), owners_E
        return self._owners[1]

    @property
    def available(self) -> list[int]:
        """Experts of each generation that tokens can choose: all but those that are masked."""
        return self.generations[:-1] if self.masks_newest else self.generations

    @property
    def num_available(self) -> int:
        """Experts that tokens can choose, over all generations."""
        return sum(self.available)


def token_hash(token_ids_T: Tensor, salt: int) -> Tensor:
    """A fixed pseudo-random non-negative integer per token id, int64 ``(T,)`` (multiplicative hashing, 31 bits)."""
    # Knuth's multiplier and one of xxHash's. They stay: the experts of stored models depend on every bit.
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
