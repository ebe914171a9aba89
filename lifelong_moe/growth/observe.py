"""Record how a model processes a sample of the new data: hidden states and expert usage of each layer.

Legend: B batch, S sequence, N sampled tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

    counts_E: Tensor
    """Tokens assigned to each expert, int64 ``(E,)``."""
    inputs_ND: Tensor | None = None
    """Inputs of the mixture-of-experts layer, float32 ``(N, D)``, one row per sampled token, without padding; None
    where they are not asked for."""


@torch.no_grad()
def observe(model: LanguageModel, sample: Mapping[str, Tensor], inputs_of: Collection[int] = ()) -> list[Observation]:
    """Run the model on a sample and record what each mixture-of-experts layer sees.

    Args:
        model: Unchanged; back in its mode afterwards.
        sample: Blocks as the data module yields them, ``token_ids`` ``(B, S)`` among them.
        inputs_of: Layers whose inputs are kept; those of all layers may be larger than the model.

    Returns:
        One observation per layer, bottom to top.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in inputs_of}
    counts: list[list[Tensor]] = []
    # Moved to the CPU at once: hidden states of layers for a whole sample may not fit on the device.
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kept=inputs[i]: kept.append(args[0].float().cpu()))
        for i, layer in enumerate(model.moe_layers())
        if i in inputs
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
    # Hooks saw padding too, which counts in no statistic.
    real_T = sample["mask"].flatten().cpu()
    return [
        Observation(torch.stack(c).sum(dim=0), torch.cat(inputs.pop(i))[real_T] if i in inputs else None)
        for i, c in enumerate(zip(*counts, strict=True))
    ]
