"""How long the command line takes to say something: its help, and what is wrong with a configuration."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.performance.goals import judged

REPEATS = 7
COMMAND = "from pipelines.cli import main; main()"
"""What the installed ``lifelong-moe`` does."""
CONFIG = "run: bench\ndistributions: {text: {builtin: english_docs}}\nstages: [{data: text, tokenz: 1000}]\n"
"""With one wrong key."""


def measure() -> dict[str, Any]:
    """Wall seconds of a process, median and quartiles; the first of each fills the file cache and is left out."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "wrong.yaml").write_text(CONFIG, encoding="utf-8")
        helped = [seconds(["--help"], 0, folder) for _ in range(REPEATS + 1)][1:]
        refused = [seconds(["run", "wrong.yaml"], 2, folder) for _ in range(REPEATS + 1)][1:]
    goals = {"P11 help": _judged(helped, "<= 0.5"), "P11 config error": _judged(refused, "<= 1.5")}
    return {"goals": goals, "detail": {"help": helped, "config_error": refused}}


def seconds(arguments: list[str], code: int, folder: str) -> float:
    """Of a command in a child process.

    Raises:
        RuntimeError: If it ends with another exit code than it should.
    """
    root = str(Path(__file__).resolve().parents[3])
    program = f"import sys; sys.path.insert(0, {root!r}); {COMMAND}"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return round(took, 4)


def _judged(times: list[float], goal: str) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return judged(middle, low, high, goal, "s")


def main() -> None:
    """Print what was measured as one line."""
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
