"""Key-value cache: allocated once for all positions, and written in place at each step.

Legend: B batch, J key and value heads, S new positions, P positions so far, W head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def extend(self, key_BJSW: Tensor, value_BJSW: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of the next positions, in place and without gradient.

        Returns:
            Views of the keys and the values of all positions so far, ``(B, J, P, W)``.

        Raises:
            ValueError: If the cache is full.
        """
        end = self.length + key_BJSW.shape[2]
        if end > self.room:
            raise ValueError(f"the cache has room for {self.room} positions, not for {end}")
        new = key_BJSW, value_BJSW
        if self._held is None:  # allocated at the first call, which shows batch size, dtype and device
            batch, heads, _, width = key_BJSW.shape
            self._held = tuple(x.new_empty(batch, heads, self.room, width) for x in new)  # type: ignore[assignment]
        assert self._held is not None
        for held, x in zip(self._held, new, strict=True):
            held[:, :, self.length : end] = x
        self.length = end
        return self._held[0][:, :, :end], self._held[1][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these, int64 ascending."""
        if self._held is not None:
            self._held = self._held[0][rows], self._held[1][rows]


class KeyValueCache:
    """Keys and values of a batch of texts of equal length, for all layers.

    Args:
        layers: Number of layers.
        room: Number of positions that fit.
    """

    def __init__(self, layers: int, room: int) -> None:
        self.room = room
        self.layers = [LayerCache(room) for _ in range(layers)]
        self.rotary: tuple[Tensor, Tensor] | None = None
        """Cosines and sines of all positions that fit, once the model has computed them."""
        self.document_ids_BP: Tensor | None = None
        """Document of each position so far, int64, if the model separates documents."""

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        """Forget all texts but these, int64 ascending."""
        for layer in self.layers:
            layer.keep(rows)
        if self.document_ids_BP is not None:
            self.document_ids_BP = self.document_ids_BP[rows]

    def within_documents(self, document_ids_BS: Tensor) -> Tensor:
        """Append the next positions' documents; return the mask by which each attends to its own document up to itself.

        Returns:
            bool ``(B, 1, S, P)``, over all positions, these included.
        """
        before = [] if self.document_ids_BP is None else [self.document_ids_BP]
        self.document_ids_BP = torch.cat([*before, document_ids_BS], dim=1)
        # shape: (B, S, P)
        same_BSP = document_ids_BS.unsqueeze(2) == self.document_ids_BP.unsqueeze(1)
        # The new positions are the last S of P, so the diagonal is shifted by P - S.
        return same_BSP.tril(same_BSP.shape[2] - same_BSP.shape[1]).unsqueeze(1)
