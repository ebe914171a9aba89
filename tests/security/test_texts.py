"""Files of text that others wrote: what they hold is known before memory is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.files import read_documents
from lifelong_moe.errors import DataError

BOMB = 1_000
"""Values in one row; with two billion, a file of 639 bytes would take 40 GB."""


def _nested(kind: str) -> pyarrow.Array:
    zeros, ends = pyarrow.array(np.zeros(BOMB, np.int8)), [0, BOMB]
    if kind == "list":
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), zeros)
    inner = pyarrow.LargeListArray.from_arrays(pyarrow.array(ends, pyarrow.int64()), zeros)
    return pyarrow.StructArray.from_arrays([inner], ["inner"])


@pytest.mark.parametrize("field", ["text", "source", "answer"])
@pytest.mark.parametrize("kind", ["list", "struct"])
def test_a_parquet_column_that_is_not_of_strings_is_not_read(field: str, kind: str, tmp_path: Path) -> None:
    columns = {name: pyarrow.array(["one"]) for name in ("text", "source", "answer")}
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table(columns | {field: _nested(kind)}), path, compression="zstd")
    with pytest.raises(DataError, match=rf'bomb\.parquet: column "{field}" is of (large_)?{kind}<.*, not of strings'):
        read_documents(str(path), SourceConfig(files="unused", answer_field="answer"))


@pytest.mark.parametrize(
    "kind",
    [pyarrow.int64(), pyarrow.binary(), pyarrow.timestamp("s"), pyarrow.dictionary(pyarrow.int8(), pyarrow.binary())],
)
def test_nor_is_one_of_other_values(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2, kind)}), path)
    with pytest.raises(DataError, match=r'a\.parquet: column "text" is of .*, not of strings'):
        read_documents(str(path), SourceConfig(files="unused"))


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_every_kind_of_strings_is(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": pyarrow.array(["one", "two"], kind), "source": pyarrow.nulls(2)}
    parquet.write_table(pyarrow.table(columns), path)
    found = read_documents(str(path), SourceConfig(files="unused"))
    assert [document.text for document in found] == ["one", "two"]
