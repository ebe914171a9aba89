"""Vocabularies of a run whose stages add tokens: their tokenizers, and the text that is read with them.

Vocabulary 0 is the first stage's, or a checkpoint's; each stage that adds tokens makes the next one. What a stage
trains on may be read with each of its vocabularies, and all other text with vocabulary 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lifelong_moe.data.text.documents import Corpus, Document, documents_hash
from lifelong_moe.data.tokens.identity import AddedVocabulary
from lifelong_moe.data.tokens.merges import with_added_tokens
from lifelong_moe.data.tokens.pairs import with_answers, with_heldout_answers
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard, open_or_tokenize, tokenize_corpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import DataError, LifelongError
from lifelong_moe.storage.modes import PRIVATE


@dataclass(frozen=True)
class LaterTexts:
    """Text that is read with later vocabularies, by distribution and number of the vocabulary."""

    corpora: Mapping[tuple[str, int], TokenizedCorpus] = field(default_factory=dict)
    heldout: Mapping[tuple[str, int], TokenShard] = field(default_factory=dict)
    """Also where the other text is gone."""


def added_tokenizers(
    first: Tokenizer,
    wanted: AddedVocabulary,
    texts: Sequence[Corpus | LifelongError],
    stored: Callable[[int], Tokenizer | None],
    cache: Path,
) -> dict[int, Tokenizer]:
    """The tokenizers of later vocabularies, by the index of the stage that adds their tokens.

    Args:
        first: That of vocabulary 0.
        wanted: What the stages add.
        texts: Of each stage, as it was split; why it is not there.
        stored: That of a committed stage, by its index.
        cache: Directory of trained tokenizers.

    Raises:
        LifelongError: A text is gone, and its stage is not committed.
        ConfigError: The tokenizer is none that can go on, or a text has nothing to learn tokens from.
    """
    found: dict[int, Tokenizer] = {}
    newest, end = first, max(first.vocab_size, wanted.rows)
    for stage, number in enumerate(wanted.numbers):
        if not number:
            continue
        text = texts[stage]
        if isinstance(text, Corpus):
            newest = with_added_tokens(newest, text, number, end, cache)
        elif (known := stored(stage)) is not None:
            newest = known
        else:
            raise text
        found[stage], end = newest, newest.vocab_size
    return found


def read_later(
    added: Mapping[int, Tokenizer],
    trained: Sequence[str],
    texts: Mapping[str, Corpus | Sequence[Document]],
    answers: Collection[str],
    context: int,
    cache: Path,
) -> LaterTexts:
    """Tokenize what each stage from the first adding one on trains on, with each vocabulary that there is by then.

    Args:
        added: From :func:`added_tokenizers`.
        trained: Distributions that the stages train on, in order.
        texts: Their documents; the held-out ones alone where the others are gone.
        answers: Distributions of prompts and answers.
        context: Tokens in a training block.
        cache: Directory of tokens.

    Raises:
        DataError: A text no longer fills a training block.
    """
    corpora: dict[tuple[str, int], TokenizedCorpus] = {}
    heldout: dict[tuple[str, int], TokenShard] = {}
    for stage, name in enumerate(trained):
        tokenizers = [one for index, one in added.items() if index <= stage]
        for number, by in enumerate(tokenizers, start=1):
            place, text = (name, number), texts.get(name)
            if place in heldout or text is None:
                continue
            if isinstance(text, Corpus):
                tokens = tokenize_corpus(text, by, cache)
                if tokens.train.num_tokens < context:
                    raise DataError(
                        f"distributions.{name}: too few tokens: read with those that are added to the vocabulary, "
                        f"{tokens.train.num_tokens} of training text do not fill one block of model.context={context}."
                    )
                corpora[place] = with_answers(text, tokens, by, context) if name in answers else tokens
                heldout[place] = corpora[place].heldout
            else:
                shard = open_or_tokenize(text, documents_hash(text), by, cache, PRIVATE)
                heldout[place] = with_heldout_answers(text, shard, by) if name in answers else shard
    return LaterTexts(corpora, heldout)
