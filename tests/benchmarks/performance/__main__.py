"""Measure how fast this is, against the goals; every figure that can be is a ratio of two times taken in turn.

    .venv/bin/python -m tests.benchmarks.performance [--only step growth …]

Each part runs in a process of its own: on a GPU, where there is one, at its sizes and beside its goals, else on one
thread of a CPU. What is a CPU's work anyway is measured there. What comes out stands in ``docs/performance``:
``cpu.json`` or ``cuda.json``, the table as a page, and the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.performance.goals import NOT_MEASURED, PARTS, page, rows
from tests.benchmarks.provenance import hardware, origin, without_paths

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs/performance"
THREADED = ("clustering",)
"""Parts whose goal is for all cores."""
QUICK = ("layer", "lifelong", "text", "startup")
"""Parts that together take some five minutes of an idle core, and say most of a machine."""
LONGEST = 2 * 3600.0
"""Seconds after which a part is given up."""


def main() -> int:
    """Run the parts, write what they found, print the table; 1 if anything was not measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.performance", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}: print, and write nothing")
    asked = parser.parse_args()
    if asked.quick:
        return quick(Console())
    only = asked.only
    console, names = Console(), [name for name in PARTS if only is None or name in only]
    command = " ".join(["python -m tests.benchmarks.performance", *(["--only", *only] if only else [])])
    machine = hardware()
    path = FOLDER / f"{'cuda' if machine['gpu'] else 'cpu'}.json"
    found: dict[str, Any] = {}
    for name in names:
        console.print(f"{name} …")
        began, source = time.monotonic(), origin(command)
        result = run_part(name)
        found[name] = {**result, "run": {**source, "seconds": round(time.monotonic() - began, 1), **machine}}
        record(path, found, keep=only is not None)  # after each part, so that an interruption loses one at most
    console.print(table(found, machine))
    from tests.benchmarks.performance.figures import draw

    draw(json.loads(path.read_text(encoding="utf-8")), FOLDER, path.stem)
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    path.with_suffix(".md").write_text(page(parts), encoding="utf-8")
    console.print(f"written: {path.relative_to(ROOT)}, the table beside it, and its figures")
    return int(any(row[1].startswith(NOT_MEASURED) for row in rows(found)))


def quick(console: Console) -> int:
    """What this machine does, in minutes, beside the goals; 1 if anything was not measured."""
    found = {}
    for name in QUICK:
        console.print(f"{name} …")
        found[name] = run_part(name)
    console.print(table(found, hardware()))
    return int(any(row[1].startswith(NOT_MEASURED) for row in rows(found)))


def run_part(name: str) -> dict[str, Any]:
    """What a part measures in a process of its own, or why it does not."""
    module = f"tests.benchmarks.performance.{name}"
    if importlib.util.find_spec(module) is None:
        return {"not_measured": "there is no such part yet"}
    environment = dict(os.environ)
    if name not in THREADED:
        environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return {"not_measured": f"took over {LONGEST:.0f} seconds"}
    return outcome(done.returncode, done.stdout, done.stderr)


def outcome(code: int, printed: str, errors: str) -> dict[str, Any]:
    """What a part's output says; its last line is JSON unless it failed."""
    if code == 0:
        try:
            result = json.loads(printed.strip().splitlines()[-1])
            if isinstance(result, dict) and "goals" in result:
                return result
        except (ValueError, IndexError):
            pass
        return {"not_measured": "the part printed no result"}
    last = [line.strip() for line in errors.splitlines() if line.strip()]
    return {"not_measured": without_paths(last[-1] if last else f"exit code {code}")}


def record(path: Path, found: Mapping[str, Any], keep: bool) -> None:
    """Write what was found; with ``keep`` beside what other parts found before."""
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if keep and path.is_file() else {}
    parts = {**before, **found}
    ordered = {name: parts[name] for name in PARTS if name in parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"parts": ordered}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(found: Mapping[str, Any], machine: Mapping[str, Any]) -> Table:
    """What was measured, beside the goals."""
    title = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    shown = Table("what", "measured", "spread", "goal", "met", title=title)
    for row in rows(found):
        shown.add_row(*row, style="yellow" if row[1].startswith(NOT_MEASURED) else "red" if row[4] == "NO" else "")
    return shown


if __name__ == "__main__":
    sys.exit(main())
