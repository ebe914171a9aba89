"""The weight of a micro-batch in its step, so that a step's objective does not depend on how it is divided.

The objective is a mean over all tokens of a step. Lightning and DDP average the micro-batches' means instead, which
differs where micro-batches hold different numbers of tokens. So each micro-batch multiplies the mean over its own
tokens by its *share*: its tokens over the average of the step's micro-batches. Where all blocks are full, as nearly
all are in pretraining, shares are 1.

Legend: B sequences, S length, T = B·S tokens, N tokens that a teacher is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from lifelong_moe.config.retention import DistillConfig
from lifelong_moe.ops.document_attention import starts_of
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher import distilled_rows


class Batch(TypedDict):
    """Sequences of a :class:`~lifelong_moe.data.tokens.blocks.BlockDataset`, as the DataLoader collates them."""

    token_ids: Tensor
    """``(B, S)``, as all that are not ``(B,)``."""
    target_ids: Tensor
    document_ids: Tensor
    domain_ids: Tensor
    teacher_domain_ids: Tensor
    mask: Tensor
    """True for real tokens."""
    scored: Tensor
    """True where the next-token loss counts."""
    sample: Tensor
    """``(B,)``: number of the sample in the stage."""
    replayed: Tensor
    """``(B,)``: True for text of earlier distributions."""
    ordinal: Tensor
    """``(B,)``: samples of the same kind, new or replayed, before this one."""
    block: Tensor
    """``(B,)``: number of the block among those of all sources."""


class Known(TypedDict):
    """Numbers of a micro-batch for which the host would have to wait once it is on a device."""

    starts: tuple[int, ...]
    """First token of each document in the flattened batch."""
    domains: tuple[int, ...]
    """Tokens of each domain."""
    scored_domains: tuple[int, ...]
    """Scored tokens of each domain."""
    distilled_domains: tuple[int, ...]
    """Tokens of each domain among those on which the teacher is asked."""
    teacher_starts: tuple[int, ...]
    """As ``starts``, of the rows that the teacher reads."""
    teacher_domains: tuple[int, ...]
    """Tokens of each of the teacher's domains in its rows."""
    teacher_distilled_domains: tuple[int, ...]
    """Of these the tokens on which it is asked."""


class WeightedBatch(Batch):
    """A micro-batch with its weight in the step."""

    shares: dict[str, float]
    """Share of the step's mean ``loss``, ``z_loss``, ``distill_loss`` and ``old_loss``; those without a token in this
    step are absent."""
    distill_weight: float
    """The share of ``distill_loss`` times the step's distilled sequences over their expected number."""
    known: Known
    distilled: Tensor
    """Rows on which the teacher is asked ``(R,)``."""
    distilled_tokens: Tensor
    """Positions of their scored tokens among the batch's scored ones ``(N,)``."""
    scored_positions: NotRequired[Tensor]
    """Positions of the scored tokens among all ``(T,)``; absent if all are scored."""
    distilled_positions: NotRequired[Tensor]
    """Positions of the distilled tokens among those of the ``distilled`` rows ``(N,)``; absent if all are scored."""


@dataclass(frozen=True)
class Tally:
    """Counts of the tokens and sequences over which losses are means."""

    real: int
    """Tokens without padding."""
    scored: int
    """Tokens whose next-token loss counts."""
    distilled: int
    """Scored tokens on which the teacher is asked."""
    distilled_sequences: int
    """Sequences on which the teacher is asked."""
    replayed: int
    """Real tokens of earlier text."""

    @classmethod
    def of(
        cls, real_B: Tensor, scored_B: Tensor, replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig | None
    ) -> Tally:
        """Add up sequences; the arguments, ``(B,)`` each, are real and scored tokens, and as in :class:`Batch`."""
        rows = _rows(replayed_B, ordinal_B, config)
        return cls(
            real=int(real_B.sum()),
            scored=int(scored_B.sum()),
            distilled=int(scored_B[rows].sum()),
            distilled_sequences=len(rows),
            replayed=int(real_B[replayed_B].sum()),
        )


def with_shares(batch: Batch, spec: StageSpec, step: Tally | None = None, micro_batches: int = 1) -> WeightedBatch:
    """Add a micro-batch's shares and the positions of its distilled tokens.

    Args:
        batch: On the CPU, for all of this needs numbers and not tensors.
        spec: The stage.
        step: Counts of the whole step; by default the batch is the whole step.
        micro_batches: In the step, over all processes.
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
    # Sequences are distilled by their place in the stage, so their number in a step varies around this. Dividing by it,
    # and not by the actual number, gives a distilled token the same weight in every step.
    expected = micro_batches * len(replayed_B) * spec.distilled_share
    rows = _rows(replayed_B, ordinal_B, spec.distill)
    distilled_BS = torch.zeros_like(scored_BS).index_fill(0, rows, True) & scored_BS
    # shape: (T,)
    scored_T, distilled_T = scored_BS.flatten(), distilled_BS.flatten()
    weighted: WeightedBatch = {
        **batch,
        "shares": shares,
        "distill_weight": shares.get("distill_loss", 0.0) * step.distilled_sequences / expected if expected else 0.0,
        "known": _known(batch, rows, distilled_BS),
        "distilled": rows,
        "distilled_tokens": distilled_T[scored_T].nonzero().squeeze(1),
    }
    # Without these two keys no token is left out, and hidden states need not be copied.
    if own.scored < len(scored_T):
        weighted["scored_positions"] = scored_T.nonzero().squeeze(1)
        weighted["distilled_positions"] = scored_BS[rows].flatten().nonzero().squeeze(1)
    return weighted


def _known(batch: Batch, rows: Tensor, distilled_BS: Tensor) -> Known:
    documents_BS, domains_BS, scored_BS = batch["document_ids"], batch["domain_ids"], batch["scored"]
    theirs_RS = batch["teacher_domain_ids"][rows]
    return {
        "starts": starts_of(documents_BS),
        "domains": _counts(domains_BS),
        "scored_domains": _counts(domains_BS[scored_BS]),
        "distilled_domains": _counts(domains_BS[distilled_BS]),
        "teacher_starts": starts_of(documents_BS[rows]),
        "teacher_domains": _counts(theirs_RS),
        "teacher_distilled_domains": _counts(theirs_RS[scored_BS[rows]]),
    }


def _counts(domain_ids: Tensor) -> tuple[int, ...]:
    """Tokens of each domain."""
    return tuple(torch.bincount(domain_ids.flatten()).tolist())


def _rows(replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig | None) -> Tensor:
    # Not None: an empty index selects no token, so callers need no case of their own.
    return torch.empty(0, dtype=torch.int64) if config is None else distilled_rows(replayed_B, ordinal_B, config)
