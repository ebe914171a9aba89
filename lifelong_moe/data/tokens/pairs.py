"""Prompts with answers: documents in which only what comes after a separator is learned and scored, its end included.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.jsonl import SEPARATOR
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError, DataError


def separator_id(tokenizer: Tokenizer) -> int:
    """The separator's token.

    Raises:
        ConfigError: If the tokenizer cuts it into several.
    """
    ids = tokenizer.encode(SEPARATOR)
    # The separator is found again in tokens by its id alone, so it must be exactly one token.
    if len(ids) != 1:
        raise ConfigError("the tokenizer has no token for U+001E, which stands between prompt and answer.")
    return ids[0]


def with_answers(corpus: Corpus, tokenized: TokenizedCorpus, tokenizer: Tokenizer, context: int) -> TokenizedCorpus:
    """Return the same tokens, with only answers scored and only their bytes counted.

    Raises:
        DataError: ``file:line: reason`` for the first pair that does not fit into a training block; how many do not.
    """

    def marked(documents: Sequence[Document], shard: TokenShard) -> TokenShard:
        lengths = np.diff(shard.offsets)
        # Not cut: an answer without the beginning of its prompt would be learned as an answer to nothing.
        if len(long := np.flatnonzero(lengths > context)):
            first = documents[long[0]]
            raise DataError(
                f"{first.origin or first.source}: prompt and answer are {lengths[long[0]]} tokens, more than "
                f"model.context={context}, as are {len(long):,} of {len(documents):,} pairs; shorten or remove them."
            )
        return with_heldout_answers(documents, shard, tokenizer)

    return replace(
        tokenized, train=marked(corpus.train, tokenized.train), heldout=marked(corpus.heldout, tokenized.heldout)
    )


def with_heldout_answers(documents: Sequence[Document], shard: TokenShard, tokenizer: Tokenizer) -> TokenShard:
    """One part of a corpus, of which only answers count; pairs that fit into a block, as they did before."""
    # Bits per byte divide by the bytes of what is scored; those of the prompt would make them look low.
    answers = shard.answer_bytes
    if answers is None:  # of an earlier version, which did not keep them
        answers = np.array([len(document.text.partition(SEPARATOR)[2].encode()) for document in documents], np.int64)
    return replace(shard, separator=separator_id(tokenizer), text_bytes=answers, answer_bytes=None)


def precedes_answer(tokens_N: NDArray[np.integer], offsets: NDArray[np.int64], separator: int) -> NDArray[np.bool_]:
    """Which tokens are followed by one of an answer, or by its end, bool ``(N,)``: those from a separator on.

    The end counts, a document's border: a model that never learned it writes on after every answer.

    Args:
        tokens_N: Of all documents, one after the other.
        offsets: Where documents begin, and the end.
        separator: Its token; the first one of a document counts.
    """
    # One pass over all tokens; a Python loop over documents would be slow.
    seen_N = np.cumsum(np.asarray(tokens_N) == separator)
    # Separators before each document, so that the first one within it is where the count exceeds this.
    before_D = np.concatenate([[0], seen_N])[offsets[:-1]]
    return seen_N > np.repeat(before_D, np.diff(offsets))
