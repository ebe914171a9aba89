"""What is checked across distributions before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifelong_moe.data.config import SourceConfig, TokenizerConfig
from lifelong_moe.data.prepare import prepare_data
from lifelong_moe.errors import DataError


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_held_out_text_of_one_distribution_is_not_trained_in_another(tmp_path: Path) -> None:
    """Case and punctuation aside: a copy in capitals is a copy."""
    texts = [f"document number {i} about apples and pears" for i in range(60)]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "b.jsonl", [text.upper() + " !" for text in texts])
    sources = {name: SourceConfig(files=str(tmp_path / f"{name}.jsonl"), heldout_fraction=0.5) for name in "ab"}
    with pytest.raises(DataError, match=r"distributions\.[ab]: a training document .* is held out in [ab]"):
        prepare_data(sources, TokenizerConfig(vocab_size=300), ["a", "b"], 8, tmp_path / "cache")


def test_too_little_text_for_one_block(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [f"{i}" for i in range(10)])
    sources = {"a": SourceConfig(files=str(tmp_path / "a.jsonl"), heldout_fraction=0.5)}
    with pytest.raises(DataError, match=r"distributions\.a: too few tokens"):
        prepare_data(sources, TokenizerConfig(vocab_size=300), ["a"], 1000, tmp_path / "cache")
