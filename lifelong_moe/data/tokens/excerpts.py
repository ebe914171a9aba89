"""Short excerpts of held-out text, spread evenly over it: enough for a quick look at a loss.

Legend: D documents, N chosen excerpts.
"""

from __future__ import annotations

import numpy as np

from lifelong_moe.data.tokens.shards import TokenShard

AT_LEAST = 8
"""Excerpts of a text that has as many; their differences say how far a mean over them can be trusted."""


def excerpts(shard: TokenShard, context: int, tokens: int) -> TokenShard:
    """Cut about so many tokens of excerpts out of a text.

    An excerpt begins with its document's BOS and goes on to the end of the document, or to one ``AT_LEAST``-th of the
    tokens, and a context at most. Where only answers count, it is a whole pair of prompt and answer.

    Args:
        shard: Held-out documents.
        context: Most tokens of an excerpt.
        tokens: Wanted number over all excerpts.

    Returns:
        Each excerpt as a document of its own. The bytes of a part of a document are in proportion to its tokens.

    Raises:
        ValueError: If no document has a token besides BOS.
    """
    # Of each excerpt's tokens one is BOS.
    most = max(1, min(context, tokens // AT_LEAST) - 1)
    long_D = np.diff(shard.offsets) - 1
    is_cut = shard.separator is None
    cuts_D = -(-long_D // most) if is_cut else np.minimum(long_D, 1)
    last_D = np.cumsum(cuts_D)
    total = int(last_D[-1]) if len(last_D) else 0
    if not total:
        raise ValueError("the held-out documents hold no token to score")
    wanted = tokens / (long_D.sum() / total + 1)
    # Evenly spaced, since documents often stand in the order of their files, and the first ones would be of one source.
    chosen_N = np.unique(np.linspace(0, total - 1, max(1, min(total, round(wanted)))).round().astype(np.int64))
    document_N = np.searchsorted(last_D, chosen_N, side="right")
    begin_N = (chosen_N - (last_D - cuts_D)[document_N]) * most
    length_N = np.minimum(long_D[document_N] - begin_N, most) if is_cut else long_D[document_N]
    parts = []
    for document, begin, length in zip(document_N, begin_N, length_N, strict=True):
        first = shard.offsets[document]
        parts += [shard.tokens[first : first + 1], shard.tokens[first + 1 + begin : first + 1 + begin + length]]
    text_bytes = np.rint(shard.text_bytes[document_N] * (length_N / long_D[document_N])).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(length_N + 1)])
    return TokenShard(np.concatenate(parts), offsets, text_bytes, shard.separator)
