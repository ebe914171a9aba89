"""Which tokens belong to answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lifelong_moe.data.tokens.pairs import precedes_answer, separator_id
from lifelong_moe.errors import ConfigError


def test_the_separator_must_be_one_token() -> None:
    def tokenizer(*ids: int) -> Any:
        return SimpleNamespace(encode=lambda text: list(ids) if text == "\x1e" else [])

    assert separator_id(tokenizer(7)) == 7
    for ids in ((), (7, 8)):
        with pytest.raises(ConfigError, match=r"no token for U\+001E"):
            separator_id(tokenizer(*ids))


def test_answers_go_from_the_first_separator_of_a_document_to_its_end() -> None:
    documents = [[0, 5, 9, 6, 6], [0, 9, 9], [0, 5, 5], [9]]
    tokens = np.array([token for document in documents for token in document])
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    expected = [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1]
    assert precedes_answer(tokens, offsets, 9).astype(int).tolist() == expected
