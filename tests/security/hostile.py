"""What attacks on a store have in common: each command with arguments that fit, and what it did."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from pipelines.cli import app, exit_code

ARGUMENTS: dict[str, list[str]] = {
    "init": ["."],
    "run": ["old.yaml"],
    "plan": ["old.yaml"],
    "compare": ["compare.yaml"],
    "prepare": ["old.yaml"],
    "retrain": ["retrain.yaml"],
    "runs": [],
    "report": ["old"],
    "status": ["old"],
    "lineage": ["old"],
    "promote": ["old"],
    "rollback": ["old"],
    "drop": ["old", "code"],
    "consolidate": ["old", "code"],
    "gc": ["--apply"],
    "evaluate": ["old", "--data", "text.txt"],
    "generate": ["old", "def"],
    "inspect": ["old", "--text", "def"],
    "sync": [],
    "export": ["old", "--to", "out"],
    "ui": ["--no-browser"],
}
"""Arguments of every command, for a store with a run `old`."""


def outcome(command: str, *more: str, arguments: list[str] | None = None) -> tuple[int, str]:
    """Exit code of a command in this process, and all that it printed to standard error; a bug of ours is raised."""
    given = ARGUMENTS[command] if arguments is None else arguments
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = exit_code(lambda: app([command, *given, *more], prog_name="lifelong-moe"))
    return code, error.getvalue().strip()


def snapshot(root: Path) -> dict[str, object]:
    """Every file below a folder with its content, every link with its target, and when folders changed."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = path.stat().st_mtime_ns
    return found
