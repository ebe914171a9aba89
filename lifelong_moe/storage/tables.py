"""Write tables for other tools: Parquet files, whole or absent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.marks import TABLE_MARK
from lifelong_moe.storage.modes import SHARED


def write_parquet(path: Path, parts: Iterable[Mapping[str, Any]], mode: int = SHARED) -> int:
    """Write a table part by part, so that it need not fit into memory.

    Args:
        path: The file; replaced once the table is complete.
        parts: At least one mapping from column names, the same in all, to columns. A column is a NumPy array
            ``(rows,)``, an array ``(rows, K)`` for lists of K values, or a list of texts.
        mode: Permissions of the file, less those that the umask takes away.

    Returns:
        Rows written.
    """
    # Imported on use: most commands write no table.
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    rows, writer = 0, None
    with new_file(path, mode) as work:
        try:
            for part in parts:
                table = pyarrow.table({name: _column(values) for name, values in part.items()})
                if writer is None:
                    writer = parquet.ParquetWriter(work, table.schema.with_metadata(TABLE_MARK))
                writer.write_table(table)
                rows += len(table)
            if writer is None:
                raise ValueError("a table needs at least one part")
        finally:
            # Closing writes Parquet's footer, so it comes before `new_file` renames.
            if writer is not None:
                writer.close()
    return rows


def _column(values: Any) -> Any:
    """Make an Arrow array; the rows of a matrix become lists."""
    import pyarrow

    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.ravel()))
    return pyarrow.array(values)
