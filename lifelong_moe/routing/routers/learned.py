"""Trained top-k routing: Mixtral, Switch, DeepSeek-V3, OLMoE and Qwen3 are settings of it.

Legend: T tokens, D model width, E experts, K experts per token, N = T·K assignments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lifelong_moe.config.routing.base import BalanceScope, Score
from lifelong_moe.config.routing.capacity import Overflow
from lifelong_moe.config.routing.topk import TopKConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.ops.collectives import sum_over_ranks
from lifelong_moe.ops.router_losses import choice_counts
from lifelong_moe.ops.selection import within_best_groups
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.capacity import apply_capacity, causality, weighting_experts
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import Choices, balance_losses, balanced_choices, z_losses


class LearnedRouter(LinearRouter):
    """``p = softmax(x W^T)``; the k largest, their weights divided by their sum if ``renormalize``.

    With ``score=sigmoid`` each score is its own; with ``bias_rate`` an expert is chosen by score plus a bias of its
    own, which its weight does not contain; with ``expert_groups`` only within the best groups, by their two best
    experts where there are biases and by their best one where not. Biases move by what was chosen; the balance loss
    counts, in every scope, each token's k best scores of all experts, as if there were neither biases nor groups:
    it is about scores, whose imbalance biases hide. With ``capacity`` an expert takes so many of a sequence's
    tokens, and what is dropped adds nothing: the weights of what is left stay as they were. What goes to a next
    choice weighs by the expert that serves it.

    With ``bundles`` a token's domain is a generation, and only that generation's experts are in the softmax: a later
    stage changes nothing for the tokens of an earlier one, and old experts, which no longer learn, take nothing from
    new text.

    Source:
        Mixtral (arXiv:2401.04088), section 2.1; Switch (arXiv:2101.03961), section 2: top-1 by the full softmax,
        jitter on the router's input only; DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, where the bias moves by the
        sign of the load's error, and eqs. 17–20, where the k best are those of the scores, as in Megatron-LM
        (moe_utils.py, ``compute_routing_scores_for_aux_loss``). Class A without capacity: a token's routing depends on
        that token alone.
    """

    config: TopKConfig

    def __init__(self, config: TopKConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.causality = causality(config.capacity)
        self.counts_E: Tensor | None = None
        """Choices in the step under way, over all processes; what biases move by."""
        self.balanced_E: Tensor | None = None
        """The same of the choices that the balance loss counts."""

    def add_experts(self, num: int) -> None:
        """Add rows, and biases of 0 where experts have them."""
        if self.config.bias_rate:
            self.register_buffer(f"bias_{len(self.generations)}", torch.zeros(num, device=self.device))
        super().add_experts(num)
        if self.config.expert_groups > 1 and (num % self.config.expert_groups or len(self.generations) > 1):
            raise ConfigError(
                f"routing.expert_groups={self.config.expert_groups} must divide the experts of a layer ({num}), and "
                f"groups cannot grow. Set routing.expert_groups=1 or grow.experts=0."
            )

    def biases(self) -> list[Tensor]:
        """Each generation's biases ``(E_g,)``, where experts have them."""
        return [getattr(self, f"bias_{i}") for i in range(len(self.generations))] if self.config.bias_rate else []

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose the k experts of each token; losses come along in training mode."""
        config, allowed_TE = self.config, self.allowed(context)
        # float32 throughout: in bfloat16 close logits tie, and a tie chooses another expert.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(self._jittered(x_TD.float()), context.present)
            if allowed_TE is not None:
                logits_TE = logits_TE.masked_fill(~allowed_TE, -math.inf)
            scores_TE = self._scores(logits_TE, allowed_TE)
            ranks_TE = self._ranks(logits_TE, scores_TE)
            expert_ids_TK = ranks_TE.topk(min(config.top_k, self.num_available), dim=-1).indices
            weights_TK = self._weights(logits_TE, scores_TE, expert_ids_TK)
            # Where a generation has fewer experts than top_k, such as a dense model's one, others weigh 0: none runs.
            is_short = allowed_TE is not None and min(self.available) < config.top_k
            if allowed_TE is not None and is_short:
                expert_ids_TK = expert_ids_TK.where(allowed_TE.gather(1, expert_ids_TK), -1)
            losses = {}
            if self.training:
                counted_TK = self._counted(logits_TE, expert_ids_TK)
                earlier_E = self._count(expert_ids_TK, counted_TK, context.mask_T)
                probs_TE = scores_TE if config.score == Score.softmax else _shares(scores_TE)
                made = Choices(logits_TE, probs_TE, counted_TK, allowed_TE, earlier_E)
                losses = balance_losses(config, self.generations, made, context) | z_losses(config, logits_TE, context)
            used_TK = self.used(expert_ids_TK, weights_TK)
        if config.capacity is None:
            ragged = is_short or used_TK is not expert_ids_TK
            return Routing(used_TK, weights_TK, self.num_experts, losses, ragged=ragged)
        kept_TK, dropped = apply_capacity(
            config.capacity, used_TK, ranks_TE, scores_TE, context, training=self.training
        )
        if config.capacity.overflow == Overflow.next_choice:
            weights_TK = self._weights(logits_TE, scores_TE, weighting_experts(kept_TK, expert_ids_TK))
        return Routing(kept_TK, weights_TK, self.num_experts, losses, ragged=True, dropped=dropped)

    def used(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Those of the choices that are used; -1 in place of others. Here all."""
        return expert_ids_TK

    def _jittered(self, x_TD: Tensor) -> Tensor:
        jitter = self.config.jitter
        if not (self.training and jitter):
            return x_TD
        # The router's input alone; experts see the hidden state as it is (Switch).
        return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)

    def _scores(self, logits_TE: Tensor, allowed_TE: Tensor | None) -> Tensor:
        """Sigmoids, or the softmax over the experts that a token may choose; those that it may not have 0."""
        if self.config.score == Score.sigmoid:
            return logits_TE.sigmoid()
        # Renormalized weights are made of logits, so the last bit of a score is no matter.
        if allowed_TE is None or self.config.renormalize:
            return logits_TE.softmax(dim=-1)
        # A softmax each generation: among more columns, though they add 0, a sum may round differently.
        # A number in place of -inf: the softmax of nothing but -inf is not a number, nor is its gradient.
        finite_TE = logits_TE.where(allowed_TE, 0)
        parts = [part_TE.softmax(dim=-1) for part_TE in finite_TE.split(self.available, dim=-1)]
        return torch.cat(parts, dim=-1).where(allowed_TE, 0)

    def _ranks(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What the k largest are taken of."""
        config = self.config
        # By logit: where probabilities underflow, a tie at 0 must not admit an expert that is not allowed.
        ranks_TE = logits_TE
        if config.bias_rate:
            ranks_TE = scores_TE + torch.cat(self.biases()[: len(self.available)])
        elif config.expert_groups > 1:
            ranks_TE = scores_TE
        if config.expert_groups > 1:
            best = 2 if config.bias_rate else 1  # DeepSeek-V3; without biases V2
            ranks_TE = within_best_groups(ranks_TE, config.expert_groups, config.top_groups, best)
        return ranks_TE

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        config = self.config
        if config.renormalize and config.score == Score.softmax:
            # The softmax over the chosen alone: no bit of it depends on all others, and probabilities that underflow,
            # as those of experts that a bias chose may, weigh what they should.
            weights_TK = logits_TE.gather(1, expert_ids_TK).softmax(dim=-1)
        else:
            weights_TK = scores_TE.gather(1, expert_ids_TK)
            weights_TK = _shares(weights_TK) if config.renormalize else weights_TK
        return weights_TK if config.gate_scale == 1 else weights_TK * config.gate_scale

    def _counted(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """The choices that the balance loss counts, ``(T, K)``, or ``(T, 1)`` where those are first ones."""
        if self.config.bias_rate or self.config.expert_groups > 1:
            # By logit: scores rise with them, but may underflow.
            expert_ids_TK = logits_TE.topk(expert_ids_TK.shape[1], dim=-1).indices
        return balanced_choices(self.config, expert_ids_TK)

    def _count(self, expert_ids_TK: Tensor, counted_TK: Tensor, mask_T: Tensor) -> Tensor | None:
        """Count the step's choices where something depends on them.

        Returns:
            With ``balance_scope=global_batch``: what balance counted in earlier micro-batches, ``(E,)``.
        """
        if self.config.bias_rate:
            self.counts_E = self._added(self.counts_E, expert_ids_TK, mask_T)
        if self.config.effective_balance_scope != BalanceScope.global_batch:
            return None
        earlier_E = self.balanced_E
        self.balanced_E = self._added(earlier_E, counted_TK, mask_T)
        return earlier_E

    def _added(self, earlier_E: Tensor | None, expert_ids_TK: Tensor, mask_T: Tensor) -> Tensor:
        all_E = sum_over_ranks(choice_counts(expert_ids_TK, mask_T, self.num_experts))
        return all_E if earlier_E is None else earlier_E + all_E

    def end_step(self, taken: bool) -> None:
        """Move the biases of experts that train against their load."""
        counts_E, self.counts_E, self.balanced_E = self.counts_E, None, None
        if not (taken and self.config.bias_rate and counts_E is not None):
            return
        # Only its sign moves a bias (DeepSeek-V3): the step does not grow with the batch.
        error_E = counts_E.float().mean() - counts_E
        for rows, bias, error in zip(self.rows, self.biases(), error_E.split(self.generations), strict=True):
            # A frozen expert's bias stays as it is: old choices must not move.
            if rows.requires_grad:
                bias += self.config.bias_rate * error.sign()


def _shares(scores: Tensor) -> Tensor:
    """Sigmoids divided by their sum, to which 1e-20 is added as in Megatron: where all underflow, shares are 0."""
    return scores / (scores.sum(dim=1, keepdim=True) + 1e-20)
