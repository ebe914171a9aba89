"""What is checked across distributions before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.tokens.prepare import prepare_data
from lifelong_moe.errors import ConfigError, DataError


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_held_out_text_of_one_distribution_is_not_trained_in_another(tmp_path: Path) -> None:
    """Case and punctuation aside: a copy in capitals is a copy."""
    texts = [f"document number {i} about apples and pears" for i in range(60)]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "b.jsonl", [text.upper() + " !" for text in texts])
    sources = {name: SourceConfig(files=str(tmp_path / f"{name}.jsonl"), heldout_fraction=0.5) for name in "ab"}
    with pytest.raises(
        DataError, match=r"distributions\.[ab]: .*[ab]\.jsonl:\d+: this training document is held out in [ab]"
    ):
        prepare_data(sources, TokenizerConfig(vocab_size=300), ["a", "b"], 8, tmp_path / "cache")


def test_too_little_text_for_one_block(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [f"{i}" for i in range(10)])
    sources = {"a": SourceConfig(files=str(tmp_path / "a.jsonl"), heldout_fraction=0.5)}
    with pytest.raises(DataError, match=r"distributions\.a: too few tokens"):
        prepare_data(sources, TokenizerConfig(vocab_size=300), ["a"], 1000, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_block_is_just_filled_or_just_not(tmp_path: Path) -> None:
    """One document of nine single-byte tokens and its BOS are ten tokens, each with a target: the last one's is BOS."""
    write(tmp_path / "a.jsonl", ["123456789"])
    write(tmp_path / "h.jsonl", ["other"])
    sources = {"a": SourceConfig(files=str(tmp_path / "a.jsonl"), heldout_files=str(tmp_path / "h.jsonl"))}
    tokenizer = TokenizerConfig(vocab_size=257)  # bytes only
    with pytest.raises(DataError, match=r"too few tokens: 10 of training text .* model\.context=11"):
        prepare_data(sources, tokenizer, ["a"], 11, tmp_path / "cache")
    assert prepare_data(sources, tokenizer, ["a"], 10, tmp_path / "cache").corpora["a"].train.num_tokens == 10


def test_given_tokenizer_that_is_missing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    sources = {"a": SourceConfig(builtin="cpp_headers")}
    with pytest.raises(ConfigError, match=r"tokenizer\.file=.*no\.json: cannot be read"):
        prepare_data(sources, TokenizerConfig(file=str(tmp_path / "no.json")), ["a"], 8, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_person_s_own_files_are_read_before_anything_is_extracted(tmp_path: Path) -> None:
    (tmp_path / "z.jsonl").write_text("{")
    sources = {"a": SourceConfig(builtin="cpp_headers"), "z": SourceConfig(files=str(tmp_path / "z.jsonl"))}
    with pytest.raises(DataError, match=r"z\.jsonl:1"):
        prepare_data(sources, TokenizerConfig(vocab_size=300), ["a", "z"], 8, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
