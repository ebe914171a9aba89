"""Tell the loss of another process from an error of this one."""

from __future__ import annotations

import torch.distributed as dist

# Gloo's errors are plain RuntimeErrors: only their messages tell them from a bug of ours.
_PEER_LOST = ("gloo/transport/", "Application timeout caused pair closure")
"""Parts of the messages of Gloo's errors after another rank has gone."""


def peer_is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _PEER_LOST)
