"""How many random changes of the code do the tests notice? By hand, for hours; nothing of it is in the suite.

    PYTHONPATH=$PWD python -m tests.benchmarks.mutation --number 600 --seed 0 --out mutants.jsonl

A mutant is one change at a random place of one of the rooms that this project exists for: another comparison or
arithmetic operator, ``and`` for ``or``, a condition negated, a number one more, ``True`` for ``False``, ``min`` for
``max``.
It is made in a copy of the tree, where the tests that may reach the file are run, the nearest first, until one fails.
Results are appended to ``--out`` as they come, and a mutant that is there already is not run again; survivors are read
by a person, who says whether the change changes anything.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOMS = ("routing", "ops", "growth", "retention", "retraining", "stages", "training", "data")
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SECONDS = 1800


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


def tests(root: Path, mutant: dict[str, Any]) -> list[str]:
    """Test files, the nearest first: of the same room, those that name the module, and then all others."""
    module = Path(mutant["file"]).stem
    files = sorted(p for p in (root / "tests").rglob("test_*.py") if "test_documentation" not in p.name)

    def distance(path: Path) -> tuple[int, int]:
        kinds = ("unit", "properties", "parity", "integration", "distributed", "e2e")
        near = 0 if path.parent.name == mutant["room"] and module in path.stem else 1
        near += 0 if f"{mutant['room']}.{module}" in path.read_text(encoding="utf-8") else 2
        near += 0 if path.parent.name == mutant["room"] else 1
        return near, kinds.index(path.relative_to(root / "tests").parts[0])

    return [str(path.relative_to(root)) for path in sorted(files, key=distance)]


def killed_by(root: Path, mutant: dict[str, Any]) -> str | None:
    """The test that failed, or ``timeout``; None if none did."""
    path = root / mutant["file"]
    before = path.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests(root, mutant)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        path.write_text(applied(before, mutant), encoding="utf-8")
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        path.write_text(before, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return None if done.returncode == 0 else (failed or ["collection"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.dumps([row["file"], row["at"], row["is"]]): row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(Path.cwd(), root, ignore=shutil.ignore_patterns(".git", ".venv", "mlruns", "*.pyc"))
        for mutant in mutants(root, options.number, options.seed):
            key = json.dumps([mutant["file"], mutant["at"], mutant["is"]])
            if key in done:
                continue
            began = time.monotonic()
            done[key] = mutant | {"killed_by": killed_by(root, mutant), "seconds": round(time.monotonic() - began)}
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
