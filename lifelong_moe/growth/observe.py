"""Record how a model processes a sample of the new data: hidden states and expert usage of each layer.

Legend: B batch, S sequence, N sampled tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lifelong_moe.model.moe import MoELayer
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
    """What the layer's router reads, float32 ``(N, D)``, one row per sampled token, without padding; None where it is
    not asked for, and of a dense layer."""


@torch.no_grad()
def observe(
    model: LanguageModel, sample: Mapping[str, Tensor], inputs_of: Collection[int] = ()
) -> Generator[Observation, None, None]:
    """Run the model on a sample, and say what each mixture-of-experts layer sees, bottom to top.

    Layer by layer: all of the sample is in one before any of it goes on to the next, so that the inputs of no more than
    one layer are held, beside the hidden states of the sample. A layer that nobody asks for is not computed, nor are
    the experts of the last one.

    Args:
        model: Unchanged; in evaluation mode until the last layer is seen, and then back in its own.
        sample: Blocks as the data module yields them, ``token_ids`` ``(B, S)`` among them.
        inputs_of: Layers whose inputs are given.
    """
    blocks, batch = max(1, FORWARD_TOKENS // sample["token_ids"].shape[1]), TokenBatch.of(sample)
    parts = [slice(start, start + blocks) for start in range(0, len(sample["token_ids"]), blocks)]
    runs = [(model.by_block(batch[rows]), sample["mask"][rows].flatten()) for rows in parts]
    training = model.training
    model.eval()  # no jitter, dropout or capacity of training
    try:
        for i, layer in enumerate(model.moe_layers()):
            counts, inputs = list[Tensor](), list[Tensor]()
            for run, mask_T in runs:
                with _inputs(layer, i in inputs_of) as seen:
                    counts.append(next(run).counts_of(mask_T).cpu())
                # A hook sees padding too, which counts in no statistic.
                inputs += [x_TD[mask_T.cpu()] for x_TD in seen]
            yield Observation(torch.stack(counts).sum(dim=0), torch.cat(inputs) if inputs else None)
    finally:
        model.train(training)


@contextmanager
def _inputs(layer: MoELayer, kept: bool) -> Iterator[list[Tensor]]:
    """What a layer's router reads within this context, on the CPU; nothing if it is not to be kept."""
    inputs: list[Tensor] = []
    if not kept:
        yield inputs
        return
    # Moved at once: the sample's hidden states may fit on the device once, and not twice.
    hook = layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().cpu()))
    try:
        yield inputs
    finally:
        hook.remove()
