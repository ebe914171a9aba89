"""Marks in files that a user names, by which we know later that they are ours to replace."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.storage.opening import open_regular

PAGE_BEGINS = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="lifelong-moe">'
)
"""How each HTML page of ours begins."""
EARLIER_PAGE_BEGINS = PAGE_BEGINS.replace(' lang="en"', "")
"""How pages of earlier versions begin."""
TABLE_MARK = {b"generator": b"lifelong-moe"}
"""What each Parquet file of ours has in its footer."""


def is_our_page(path: Path) -> bool:
    """Whether a file begins as our HTML pages do.

    Raises:
        OSError: If it is no regular file, or cannot be read.
    """
    with open_regular(path, follow=False) as file:
        found = file.read(len(PAGE_BEGINS))
    return found.startswith((PAGE_BEGINS.encode(), EARLIER_PAGE_BEGINS.encode()))


def is_our_table(path: Path) -> bool:
    """Whether a file is a Parquet file with our mark.

    Raises:
        OSError: If it is no regular file, or cannot be read.
    """
    # Imported on use: most commands read no table.
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    with open_regular(path, follow=False) as file:
        try:
            found = parquet.read_schema(file).metadata or {}
        # An OSError is pyarrow's own word for a damaged footer.
        except (pyarrow.ArrowException, OSError):
            return False
    return TABLE_MARK.items() <= found.items()
