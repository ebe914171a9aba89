"""Content addresses: SHA-256 of canonical JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SCHEMA = 5
"""Version of what a key is made of; a change makes every stage a new one."""
SHORT = 16
"""Hexadecimal digits of a key in file names."""


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, no spaces, only finite numbers.

    Raises:
        ValueError: If a number is not finite.
        TypeError: If something is not plain JSON data.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """SHA-256 of the value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
