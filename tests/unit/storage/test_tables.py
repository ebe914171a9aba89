from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from lifelong_moe.storage.tables import write_parquet


def test_parts_become_rows_and_matrices_lists(tmp_path: Path) -> None:
    parts = [
        {"token": ["a", "b"], "experts": np.array([[0, 1], [2, 3]]), "names": np.array([["x", "y"], ["z", "x"]])},
        {"token": ["c"], "experts": np.array([[4]]), "names": np.array([["longer"]])},
    ]
    path = tmp_path / "t.parquet"
    path.write_text("old")
    assert write_parquet(path, parts) == 3
    assert parquet.read_table(path).to_pylist() == [
        {"token": "a", "experts": [0, 1], "names": ["x", "y"]},
        {"token": "b", "experts": [2, 3], "names": ["z", "x"]},
        {"token": "c", "experts": [4], "names": ["longer"]},
    ]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"token": ["a"]}
        raise ZeroDivisionError

    path = tmp_path / "t.parquet"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_parquet(path, broken())
    with pytest.raises(ValueError, match="at least one part"):
        write_parquet(path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"] and path.read_text() == "old"
