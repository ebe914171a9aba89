"""Measure how the code is laid out: what `docs/design.md` tells of it, and what `tests/unit/test_house.py` holds.

PYTHONPATH=$PWD python -m tests.house                                            # of this checkout
PYTHONPATH=$PWD python -m tests.house EARLIER_CHECKOUT > docs/results/house.json # of both, for docs/design.md
"""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lifelong_moe", "pipelines")
FLOORS = [
    {"redaction"},
    {"errors", "measures"},
    {"ops", "storage"},
    {"config/routing"},
    {"config"},
    {"config/initial", "config/retraining", "data/formats"},
    {"routing", "clustering", "data", "data/text"},
    {"routing/routers", "data/tokens", "data/arrivals", "interop/layout"},
    {"plan", "retraining"},
    {"model", "store"},
    {"growth", "retention", "evaluation", "interop", "tracking"},
    {"training/callbacks"},
    {"training/ranks"},
    {"training/loop"},
    {"training", "reports/figures"},
    {"reports", "serving"},
    {"pipelines/shared"},
    {"pipelines/run", "pipelines/versions", "pipelines/upkeep"},
    {"pipelines/compare", "pipelines/export", "pipelines/inspect", "pipelines/retrain"},
    {"pipelines"},
]
"""The rooms of both packages, lowest first. A room imports from floors below its own, never from its neighbours."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|ruff:|pragma)")
STATUS = """
import runpy, sys
sys.argv = ["lifelong-moe", "status", "old"]
try:
    runpy.run_module("pipelines.cli", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
print(len(sys.modules), len([name for name in sys.modules if name.split(".")[0] in ("lifelong_moe", "pipelines")]))
"""
"""`lifelong-moe status` of the stored run of an earlier version, and how many modules it imported, ours apart."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(root: Path) -> list[Path]:
    """Source files of both packages."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def functions(root: Path) -> Iterator[tuple[str, Function]]:
    """Every function and method, with ``file:name``."""
    for path in files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(root)}:{node.name}", node


def arguments(function: Function) -> list[ast.arg]:
    """What a caller passes: all parameters but ``self`` and ``cls``."""
    given = function.args
    return [one for one in [*given.posonlyargs, *given.args, *given.kwonlyargs] if one.arg not in ("self", "cls")]


def many_parameters(root: Path, least: int = 8) -> list[str]:
    """Functions that take ``least`` parameters or more."""
    return [name for name, function in functions(root) if len(arguments(function)) >= least]


def long_functions(root: Path, most: int = 60) -> list[str]:
    """Functions of more than ``most`` lines, docstring and all."""
    return [name for name, one in functions(root) if (one.end_lineno or one.lineno) - one.lineno + 1 > most]


def untyped_dicts(root: Path) -> Counter[str]:
    """By file, how often ``dict[str, Any]`` stands in a signature."""
    found: Counter[str] = Counter()
    for name, function in functions(root):
        annotations = [*(one.annotation for one in arguments(function)), function.returns]
        text = " ".join(ast.unparse(one) for one in annotations if one is not None)
        found[name.split(":")[0]] += text.count("dict[str, Any]")
    return +found


def comment_lines(text: str) -> int:
    """Lines that hold a comment alone; instructions to tools are none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [one for one in tokens if one.type == tokenize.COMMENT and not DIRECTIVE.match(one.string)]
    return sum(one.line.lstrip().startswith("#") for one in found)


def folders(root: Path) -> dict[str, int]:
    """Source files in each folder of both packages."""
    return dict(Counter(str(path.parent.relative_to(root)) for path in files(root)))


def modules_of_status(root: Path) -> tuple[int, int]:
    """Modules that `lifelong-moe status` imports: all, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(root / "tests/integration/earlier/mlruns", Path(folder) / "mlruns")
        command = [sys.executable, "-c", STATUS]
        done = subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
        )
    every, ours = done.stdout.split("\n")[-2].split()
    return int(every), int(ours)


def measure_text(root: Path) -> dict[str, Any]:
    """All that reading the source tells."""
    texts = {path.relative_to(root): path.read_text(encoding="utf-8") for path in files(root)}
    lines: Counter[str] = Counter()
    for path, text in texts.items():
        lines[str(path.parent)] += text.count("\n")
    comments = sum(comment_lines(text) for text in texts.values())
    return {
        "lines": lines.total(),
        "lines_by_folder": dict(sorted(lines.items())),
        "files_by_folder": folders(root),
        "many_parameters": len(many_parameters(root)),
        "long_functions": len(long_functions(root)),
        "untyped_dicts": untyped_dicts(root).total(),
        "comment_lines": comments,
        "comment_percent": round(100 * comments / lines.total(), 2),
    }


def measure(root: Path) -> dict[str, Any]:
    """The same, and what `lifelong-moe status` imports."""
    every, ours = modules_of_status(root)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return {"commit": commit.stdout.strip(), **measure_text(root), "status_modules": every, "status_modules_ours": ours}


def main() -> None:
    """Print the measure of this checkout; with an earlier one as argument, of both."""
    found = measure(ROOT)
    if len(sys.argv) > 1:
        found = {"before": measure(Path(sys.argv[1]).resolve()), "after": found}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
