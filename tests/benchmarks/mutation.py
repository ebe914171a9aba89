"""How many random changes of the code do the tests notice? By hand, for hours; nothing of it is in the suite.

    pip install pytest-cov
    OMP_NUM_THREADS=1 pytest --cov=lifelong_moe --cov-context=test --cov-report=      # which test reaches which line
    PYTHONPATH=$PWD python -m tests.benchmarks.mutation --number 600 --seed 0 --coverage .coverage --out mutants.jsonl

A mutant is one change at a random place of one of the rooms that this project exists for: another comparison or
arithmetic operator, ``and`` for ``or``, a condition negated, a number one more, ``True`` for ``False``, ``min`` for
``max``.
It is made in a copy of the tree, where the tests that reach its line are run, the nearest first, until one fails or
time is up. Each mutant's tests run in a fork of a process that has imported the large libraries, but nothing of ours.
Results are appended to ``--out`` as they come, and a mutant that is there already is not run again (so take a
survivor's line out to run it again); survivors are read by a person, who says whether the change changes anything.
``--share 0/2`` and ``--share 1/2`` halve the work between two processes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOMS = ("routing", "ops", "growth", "retention", "retraining", "stages", "training", "data")
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
KINDS = ("unit", "properties", "parity", "integration", "distributed", "e2e")
LARGE = (
    "torch",
    "lightning.pytorch",
    "mlflow",
    "transformers",
    "datasets",
    "faiss",
    "scipy.stats",
    "matplotlib.pyplot",
)
SECONDS = 600
"""For one mutant's tests; one that needs more counts as not noticed."""


def changed(node: ast.AST) -> ast.AST | None:
    """The node with one change; None if it is of no kind that is changed."""
    new: Any = copy.copy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            new.ops = [SWAPS[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            new.op = SWAPS[type(op)]()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            new = operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value) | float(value)):
            new.value = value + 1
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            new.func = ast.Name(NAMES[name], ast.Load())
        case _:
            return None
    return new


def places(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions of the code that runs: neither annotations nor what is said in an error."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr) and changed(child) is not None:
                yield child
            if isinstance(child, ast.AST):
                yield from places(child)


def mutants(root: Path, number: int, seed: int) -> list[dict[str, Any]]:
    """So many, spread over the rooms as their places are."""
    found = []
    for room in ROOMS:
        for path in sorted((root / "lifelong_moe" / room).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in places(ast.parse(text)):
                new = changed(node)
                assert new is not None and node.end_lineno is not None and node.end_col_offset is not None
                at = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
                found.append({"room": room, "file": str(path.relative_to(root)), "at": at,
                              "was": ast.unparse(node), "is": ast.unparse(ast.fix_missing_locations(new))})  # fmt: skip
    return random.Random(seed).sample(found, min(number, len(found)))


def applied(text: str, mutant: dict[str, Any]) -> str:
    """The file's text with the change; columns of ``ast`` are bytes."""
    first, begin, last, end = mutant["at"]
    lines = text.encode().split(b"\n")
    lines[first - 1 : last] = [lines[first - 1][:begin] + f"({mutant['is']})".encode() + lines[last - 1][end:]]
    return b"\n".join(lines).decode()


def reached(database: Path) -> dict[str, dict[int, set[str]]]:
    """By file and line, the tests that reach it, from a data file of coverage.py with contexts."""
    found: dict[str, dict[int, set[str]]] = {}
    query = (
        "select file.path, context.context, numbits from line_bits"
        " join file on file.id = file_id join context on context.id = context_id"
        " where context.context != '' and file.path like '%/lifelong_moe/%'"
    )
    with contextlib.closing(sqlite3.connect(database)) as connection:
        for path, context, bits in connection.execute(query):
            lines = found.setdefault(path[path.rindex("lifelong_moe/") :], {})
            for byte, value in enumerate(bits):  # coverage.py's "numbits": a bit for each line
                for bit in range(8):
                    if value >> bit & 1:
                        lines.setdefault(8 * byte + bit, set()).add(context.rsplit("|", 1)[0])
    return found


def tests(root: Path, mutant: dict[str, Any], lines: dict[int, set[str]]) -> list[str]:
    """Tests that reach the mutant's lines, the nearest first; of its file, where only an import reaches them."""
    first, _, last, _ = mutant["at"]
    names = set().union(*(lines.get(line, set()) for line in range(first, last + 1))) or set().union(*lines.values())
    module = Path(mutant["file"]).stem

    def distance(name: str) -> tuple[int, bool, bool, str]:
        path = Path(name.partition("::")[0])
        return KINDS.index(path.parts[1]), path.parent.name != mutant["room"], module not in path.stem, name

    return sorted((name for name in names if (root / name.partition("::")[0]).exists()), key=distance)


def in_a_fork(log: Path, arguments: list[str]) -> int | None:
    """Exit status of pytest in a process of its own; None if it took too long."""
    if (child := os.fork()) == 0:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 9
        try:
            status = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def killed_by(root: Path, mutant: dict[str, Any], names: list[str]) -> str | None:
    """The test that failed; None if none did, or none within the time."""
    path, log = root / mutant["file"], root.with_suffix(".log")
    before = path.read_text(encoding="utf-8")
    quiet = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    try:
        path.write_text(applied(before, mutant), encoding="utf-8")
        status = in_a_fork(log, [*quiet, *names]) if names else 0
    finally:
        path.write_text(before, encoding="utf-8")
    if not status:
        return None
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (failed or [f"status {status}"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coverage", type=Path, required=True)
    parser.add_argument("--share", default="0/1")
    options = parser.parse_args()
    part, parts = map(int, options.share.split("/"))
    lines_of = reached(options.coverage)
    for name in LARGE:
        importlib.import_module(name)
    options.out = options.out.absolute()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.dumps([row["file"], row["at"], row["is"]]): row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(Path.cwd(), root, ignore=shutil.ignore_patterns(".git", ".venv", "mlruns", "*.pyc"))
        os.chdir(root)
        sys.path.insert(0, str(root))
        os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
        for mutant in mutants(root, options.number, options.seed)[part::parts]:
            key = json.dumps([mutant["file"], mutant["at"], mutant["is"]])
            if key in done:
                continue
            began = time.monotonic()
            names = tests(root, mutant, lines_of.get(mutant["file"], {}))
            found = {"killed_by": killed_by(root, mutant, names), "tests": len(names)}
            done[key] = mutant | found | {"seconds": round(time.monotonic() - began)}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
    for room in ROOMS:
        found = Counter(row["killed_by"] is not None for row in done.values() if row["room"] == room)
        print(f"{room}: {found[True]} of {found.total()} noticed")
    for row in done.values():
        if row["killed_by"] is None:
            print(f"{row['file']}:{row['at'][0]}: {row['was']}  ->  {row['is']}")


if __name__ == "__main__":
    main()
