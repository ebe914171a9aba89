"""Stored JSON: what is read, and what ends in one line that names the file."""

from pathlib import Path

import pytest

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.stored import read_json


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_are_finite(number: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(f'{{"loss": {number}}}')

    with pytest.raises(CorruptError, match=f"metrics.json: not JSON .{number} is no number that we write"):
        read_json(path)
    assert read_json(path, finite=False).keys() == {"loss"}


NESTED = ["[" * depth + "]" * depth for depth in (100, 100_000)]


@pytest.mark.parametrize("text", ["", "{", *NESTED, '"\\ud800"', "7" * 5000])
def test_what_is_not_json_that_we_write_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    path.write_text(text)

    with pytest.raises(CorruptError, match=r"head\.json: not JSON"):
        read_json(path)
