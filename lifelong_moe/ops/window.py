"""Sliding windows of attention: where a token may look.

Legend: S sequence, P positions, those before it included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(length: int, num_positions: int, window: int, device: torch.device) -> Tensor:
    """Where the last of the positions may look: at themselves and the ``window - 1`` before, bool ``(1, 1, S, P)``.

    Source:
        Mistral 7B (arXiv:2310.06825), section 2, with the window's number of tokens as in its released code.
    """
    before = num_positions - length
    seen = torch.ones(length, num_positions, dtype=torch.bool, device=device)
    return seen.tril_(before).triu_(before - window + 1)[None, None]
