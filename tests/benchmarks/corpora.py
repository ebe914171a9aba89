"""Whether the files in LIFELONG_DATA are those that the results were measured on; 1 if not.

    LIFELONG_DATA=… PYTHONPATH=$PWD python -m tests.benchmarks.corpora

``docs/results/corpora.json`` has what they should be, ``docs/corpora.md`` says where they come from.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).resolve().parents[2] / "docs/results/corpora.json"


def measured(path: Path) -> dict[str, Any]:
    """A file's documents, bytes of text, and SHA-256."""
    raw = path.read_bytes()
    texts = [json.loads(line)["text"] for line in gzip.decompress(raw).decode("utf-8").splitlines()]
    size = sum(len(text.encode("utf-8")) for text in texts)
    return {"documents": len(texts), "text_bytes": size, "sha256": hashlib.sha256(raw).hexdigest()}


def main() -> int:
    """Compare each file."""
    root, bad = Path(os.environ["LIFELONG_DATA"]), 0
    for known in json.loads(KNOWN.read_text(encoding="utf-8"))["files"]:
        path = root / known["file"]
        found = measured(path) if path.is_file() else {}
        same = found == {key: known[key] for key in ("documents", "text_bytes", "sha256")}
        bad += not same
        print(f"{known['file']}: {'the same' if same else f'another: {found}' if found else 'missing'}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
