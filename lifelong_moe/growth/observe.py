"""Record how a model processes a sample of the new data: hidden states and expert usage of each layer.

Legend: B batch, S sequence, N sampled tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel

FORWARD_TOKENS = 8192
"""Tokens per forward pass, which bounds memory."""


@dataclass(frozen=True)
class Observation:
    """One layer's view of the sample."""

    inputs_ND: Tensor
    """Inputs of the mixture-of-experts layer, float32 ``(N, D)``, one row per sampled token, without padding."""
    counts_E: Tensor
    """Tokens assigned to each expert, int64 ``(E,)``."""


@torch.no_grad()
def observe(model: LanguageModel, sample: Mapping[str, Tensor]) -> list[Observation]:
    """Run the model on a sample and record what each mixture-of-experts layer sees.

    Args:
        model: Unchanged; back in its mode afterwards.
        sample: Blocks as the data module yields them, ``token_ids`` ``(B, S)`` among them.

    Returns:
        One observation per layer, bottom to top.
    """
    inputs: list[list[Tensor]] = [[] for _ in model.moe_layers()]
    counts: list[list[Tensor]] = []
    # Moved to the CPU at once: hidden states of all layers for a whole sample may not fit on the device.
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].float().cpu()))
        for layer, kept in zip(model.moe_layers(), inputs, strict=True)
    ]
    training = model.training
    model.eval()  # no jitter, dropout or capacity of training
    try:
        blocks = max(1, FORWARD_TOKENS // sample["token_ids"].shape[1])
        for start in range(0, len(sample["token_ids"]), blocks):
            rows = slice(start, start + blocks)
            output, mask_T = model(TokenBatch.of(sample)[rows]), sample["mask"][rows].flatten()
            counts.append([routing.counts_of(mask_T).cpu() for routing in output.routings])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    by_layer = zip(*counts, strict=True)
    # Hooks saw padding too, which counts in no statistic.
    real_T = sample["mask"].flatten().cpu()
    return [Observation(torch.cat(x)[real_T], torch.stack(c).sum(dim=0)) for x, c in zip(inputs, by_layer, strict=True)]


@torch.no_grad()
def sample_logits(model: LanguageModel, sample: Mapping[str, Tensor], blocks: int = 4) -> Iterator[Tensor]:
    """Logits of each of the sample's first blocks, float32 ``(S, V)``, in evaluation mode.

    A block's at a time: those of a large vocabulary take more memory than the rest of the pass.
    """
    training = model.training
    model.eval()
    batch = TokenBatch.of(sample)[:blocks]
    try:
        for row, hidden_SD in enumerate(model(batch).hidden_BSD):
            domains_BS = None if batch.domain_ids_BS is None else batch.domain_ids_BS[row : row + 1]
            yield model.head.logits(hidden_SD.unsqueeze(0), domains_BS).float().squeeze(0)
    finally:
        model.train(training)
