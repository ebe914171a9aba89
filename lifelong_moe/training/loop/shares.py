"""What a micro-batch weighs in its step, so that a step has one objective however it is divided.

The objective's means are over the whole step: the sum over its tokens, by their number in all micro-batches on all
processes. Lightning and DDP take the plain mean of the micro-batches' losses instead. So each micro-batch multiplies
the mean over its own tokens by its share: its tokens by those of the step's micro-batches on average. Where all
blocks are full, as nearly all are in pretraining, shares are 1.

A step's tokens are counted before its first micro-batch: the order of samples is a pure function.

Legend: B sequences, S length, T = B·S tokens, N tokens that a teacher is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.config.retention import DistillConfig
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher import distilled_rows


@dataclass(frozen=True)
class Tally:
    """How much some sequences have of what losses are means over."""

    real: int
    """Tokens that are no padding."""
    scored: int
    """Tokens whose next-token loss counts."""
    distilled: int
    """Those of them that the teacher is asked about."""
    distilled_sequences: int
    """Sequences that the teacher is asked about."""
    replayed: int
    """Real tokens of earlier text."""

    @classmethod
    def of(
        cls, real_B: Tensor, scored_B: Tensor, replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig | None
    ) -> Tally:
        """Count sequences, each with so many real and scored tokens; for the others see ``BlockDataset``."""
        rows = _rows(replayed_B, ordinal_B, config)
        return cls(
            real=int(real_B.sum()),
            scored=int(scored_B.sum()),
            distilled=int(scored_B[rows].sum()),
            distilled_sequences=len(rows),
            replayed=int(real_B[replayed_B].sum()),
        )


def with_shares(
    batch: dict[str, Any], spec: StageSpec, step: Tally | None = None, micro_batches: int = 1
) -> dict[str, Any]:
    """A micro-batch with what it weighs in its step; best made on the CPU, so that no device is asked how much it is.

    Args:
        batch: Of a ``BlockDataset``.
        spec: The stage.
        step: All of the step; by default the batch is all of it.
        micro_batches: Of the step, over all processes.

    Returns:
        The batch, and:

        - ``shares``: of the step's mean ``loss``, ``z_loss``, ``distill_loss`` and ``old_loss``; without those that are
          means of nothing in this step.
        - ``lesson``: the share of ``distill_loss`` times the step's distilled sequences over the expected number.
        - ``distilled``: rows that the teacher is asked about ``(R,)``.
        - ``distilled_tokens``: where their counted tokens stand among the batch's counted ones, ``(N,)``.
        - Where not all tokens count: ``counted``, where those stand among all ``(T,)``; and ``taught``, where the
          distilled ones stand among the tokens of the ``distilled`` rows, ``(N,)``.
    """
    replayed_B, ordinal_B, scored_BS = batch["replayed"], batch["ordinal"], batch["scored"]
    own = Tally.of(batch["mask"].sum(dim=1), scored_BS.sum(dim=1), replayed_B, ordinal_B, spec.distill)
    step = own if step is None else step
    sizes = {
        "loss": (own.scored, step.scored),
        "z_loss": (own.real, step.real),
        "distill_loss": (own.distilled, step.distilled),
        "old_loss": (own.replayed, step.replayed),
    }
    shares = {name: micro_batches * mine / whole for name, (mine, whole) in sizes.items() if whole}
    expected = micro_batches * len(replayed_B) * spec.distilled_share
    rows = _rows(replayed_B, ordinal_B, spec.distill)
    taught_RS = torch.zeros_like(scored_BS).index_fill(0, rows, True) & scored_BS
    found = {
        "shares": shares,
        "lesson": shares.get("distill_loss", 0.0) * step.distilled_sequences / expected if expected else 0.0,
        "distilled": rows,
    }
    scored_T, taught_T = scored_BS.flatten(), taught_RS.flatten()
    if own.scored == len(scored_T):
        return {**batch, **found, "distilled_tokens": taught_T.nonzero().squeeze(1)}
    counted = scored_T.nonzero().squeeze(1)
    return {
        **batch,
        **found,
        "counted": counted,
        "distilled_tokens": taught_T[counted].nonzero().squeeze(1),
        "taught": scored_BS[rows].flatten().nonzero().squeeze(1),
    }


def _rows(replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64) if config is None else distilled_rows(replayed_B, ordinal_B, config)
