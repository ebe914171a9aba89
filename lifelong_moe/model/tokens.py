"""A model's input: tokens, and the document, domain and mask of each.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of equal length; every tensor is ``(B, S)``."""

    ids_BS: Tensor
    """Token ids, int64."""
    document_ids_BS: Tensor | None = None
    """Document of each token, int64; needed where the model separates documents only. With a cache in every call or in
    none, where each text is one document."""
    domain_ids_BS: Tensor | None = None
    """Document cluster, generation or label of each token, int64; needed where a model has several of them."""
    mask_BS: Tensor | None = None
    """True for real tokens; all by default. Padding must be on the right."""
    old_text_BS: Tensor | None = None
    """True for text of earlier stages; given in a router's review only."""
    document_starts: tuple[int, ...] | None = None
    """First token of each document in the flattened batch, where the host knows it; else it asks the device, and
    waits."""
    domain_counts: tuple[int, ...] | None = None
    """Number of tokens of each domain, likewise."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> TokenBatch:
        """From a batch of blocks as the data module yields them."""
        return cls(batch["token_ids"], batch["document_ids"], batch["domain_ids"], batch["mask"])

    def __getitem__(self, rows: slice | Tensor) -> TokenBatch:
        """Some of the sequences, without what the host knows of all."""
        # Every tensor is (B, S).
        tensors = {name: known[rows] for name, known in vars(self).items() if isinstance(known, Tensor)}
        return replace(self, **tensors, document_starts=None, domain_counts=None)
