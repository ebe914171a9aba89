"""What a sample of text shows of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel


def test_padding_is_not_observed(
    make_model: Callable[..., LanguageModel], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    """A row of 5 real tokens and one of 16: what the layers see of the first is what they see of it alone."""
    model, batch = make_model(), make_batch(blocks=2)
    short = {name: value[:1, :5] for name, value in batch.items() if value.dim() == 2}
    whole = {name: value[1:] for name, value in batch.items() if value.dim() == 2}
    batch["mask"][0, 5:] = False
    for seen, *parts in zip(*(observe(model, one, range(2)) for one in (batch, short, whole)), strict=True):
        inputs = [part.inputs_ND for part in parts if part.inputs_ND is not None]
        assert seen.inputs_ND is not None and seen.inputs_ND.shape == (21, 16) and int(seen.counts_E.sum()) == 2 * 21
        torch.testing.assert_close(seen.inputs_ND, torch.cat(inputs), rtol=0, atol=1e-5)
        assert torch.equal(seen.counts_E, parts[0].counts_E + parts[1].counts_E)
