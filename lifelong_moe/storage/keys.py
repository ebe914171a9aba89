"""Compute content addresses: SHA-256 of canonical JSON, of text and of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SHORT = 16
"""Hexadecimal digits of a key in file names."""


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of ``value``: sorted keys, no spaces, unescaped Unicode.

    Raises:
        ValueError: If a number is not finite.
        TypeError: If something is not plain JSON data.
    """
    # Keys of committed stages are hashes of this text: to change any of these options makes every stage a new one.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """Return the SHA-256 of the value's canonical JSON, 64 hexadecimal digits."""
    return text_sha256(canonical_json(value))


def text_sha256(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of ``text``, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
