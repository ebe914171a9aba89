"""Two threads of a small step, idle and beside a busy process, by how OpenMP's threads wait.

    PYTHONPATH=$PWD python -m tests.benchmarks.waiting_threads --rounds 6

A process for each setting, one at a time for a second, in turn; round after round. Prints steps a second, processor
seconds a step, and how many other processors were busy meanwhile, for whatever else runs changes the answer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.benchmarks.provenance import keep, made_with

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"{spins} spins": {"GOMP_SPINCOUNT": spins} for spins in ("500", "1000", "2000", "3000", "10000")},
}
FIGURES = ("idle", "idle_processor_seconds", "idle_others", "beside", "beside_processor_seconds", "beside_others")
"""Steps a second, processor seconds a step, other processors that were busy: by itself, then beside a process."""
LOAD = "while True: pass"
"""In a session of its own, as other people's work is: the kernel shares processors between sessions first."""
CHILD = """
import sys, time, warnings
warnings.filterwarnings("ignore")
from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.subjects import Size, our_step
keep_freed_memory()
step = our_step(Size(experts=8, layers=4, width=128, expert_width=256, vocab=4096, context=256, sequences=8))
step(), step()
print("ready", flush=True)
for line in sys.stdin:
    began, used, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < float(line) or steps < 2:
        step()
        steps += 1
    print(steps / (time.perf_counter() - began), (time.process_time() - used) / steps, flush=True)
"""


def begin(setting: dict[str, str]) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=kept | {"OMP_NUM_THREADS": "2"} | setting,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def busy_seconds() -> float:
    """Processor seconds of the whole machine."""
    numbers = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    processes = {name: begin(setting) for name, setting in SETTINGS.items()}
    assert all(told(process) == "ready\n" for process in processes.values())
    found: dict[tuple[str, bool], list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for beside in (False, True):
            load = subprocess.Popen([sys.executable, "-c", LOAD], start_new_session=True) if beside else None
            for name, process in processes.items():
                began, busy = time.monotonic(), busy_seconds()
                print(options.seconds, file=process.stdin, flush=True)
                speed, used = map(float, told(process).split())
                passed = time.monotonic() - began
                others = (busy_seconds() - busy) / passed - speed * used - beside
                found[name, beside].append((speed, used, others))
            if load is not None:
                load.kill()
                load.wait()
    for process in processes.values():
        process.kill()
    print(
        "| waiting | steps/s, idle | processor s a step | others busy | steps/s, beside | processor s a step | others |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for name in SETTINGS:
        middle = [
            statistics.median(column) for beside in (False, True) for column in zip(*found[name, beside], strict=True)
        ]
        rows.append({"waiting": name, **dict(zip(FIGURES, middle, strict=True))})
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in middle) + " |")
    if options.out:
        keep(options.out, {"rounds": options.rounds, "settings": rows}, origin)


if __name__ == "__main__":
    main()
