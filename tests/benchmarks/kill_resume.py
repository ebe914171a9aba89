"""Kill a two-stage run at random moments, continue it each time, and compare it with one that nothing disturbed.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/kill_resume.py --kills 20

Every trial is a fresh run that gets one SIGKILL at a moment drawn evenly from the length of an undisturbed run, and is
then continued by the same command. Counted are committed stages lost or changed by the kill, torn directories, trials
whose final weights differ, and temporary files left over.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.keys import file_sha256
from lifelong_moe.storage.verified import MANIFEST, verify_directory
from pipelines.shared.quiet import silence_libraries
from tests.benchmarks.provenance import keep, made_with
from tests.tiny import fork, hashes, tiny_config, train, write_config, write_corpora


def committed() -> dict[str, str]:
    """Hash of every committed stage's manifest."""
    return {str(path.parent): file_sha256(path) for path in Path("mlruns/stages").glob(f"[!.]*/{MANIFEST}")}


def moment() -> str:
    """Where the killed run stood, from what it left on disk."""
    if not Path("mlruns").exists():
        return "preparing data"
    stages = len(list(Path("mlruns/stages").glob("[!.]*")))
    if list(Path("mlruns").rglob(".tmp-*")):
        return "while writing"
    if stages == 2 and not list(Path("mlruns/work").glob("*")):
        return "after the last commit"
    return f"in stage {stages}"


def main() -> int:
    """Run the trials; returns 1 if anything was lost, torn or different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    out = options.out and options.out.absolute()
    silence_libraries()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(tempfile.mkdtemp(prefix="kill-resume-"))
    write_corpora(Path())
    write_config(tiny_config(checkpoint={"every_steps": 2}))
    lengths = []
    for _ in range(2):  # the first also pays for what libraries set up lazily
        shutil.rmtree("mlruns", ignore_errors=True)
        shutil.rmtree("data", ignore_errors=True)
        began = time.perf_counter()
        assert fork(train).wait() == 0
        lengths.append(time.perf_counter() - began)
    expected, length = hashes(), min(lengths)
    draw, where, counts = random.Random(options.seed), Counter[str](), Counter[str]()
    resumed_seconds = []
    for _ in range(options.kills):
        shutil.rmtree("mlruns", ignore_errors=True)
        shutil.rmtree("data", ignore_errors=True)
        child = fork(train)
        time.sleep(draw.uniform(0, 1.1 * length))
        os.kill(child.pid, signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            counts["finished before the kill"] += 1
        where[moment()] += 1
        before = committed()
        for path in before:
            try:
                verify_directory(Path(path))
            except CorruptError:
                counts["torn"] += 1
        began = time.perf_counter()
        child = fork(train)
        if child.wait() != 0:
            counts["did not continue"] += 1
            print(child.output, file=sys.stderr)
            continue
        resumed_seconds.append(time.perf_counter() - began)
        after = committed()
        counts["lost or changed"] += sum(after.get(path) != digest for path, digest in before.items())
        counts["different weights"] += hashes() != expected
        counts["left over"] += len(list(Path("mlruns").rglob(".tmp-*")))
    bad = ("torn", "did not continue", "lost or changed", "different weights", "left over")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, seed {options.seed}")
    share = statistics.median(resumed_seconds) / length
    print(f"undisturbed run {length:.2f} s; continuing took {share:.2f} of it (median)")
    print("killed " + ", ".join(f"{name}: {count}" for name, count in sorted(where.items())))
    if out:
        found = {"kills": options.kills, "moments": dict(sorted(where.items())), **{name: counts[name] for name in bad}}
        keep(out, found | {"seconds": length, "continuing_over_undisturbed": share}, origin)
    print(f"{options.kills} kills: " + ", ".join(f"{counts[name]} {name}" for name in bad))
    return int(any(counts[name] for name in bad))


if __name__ == "__main__":
    raise SystemExit(main())
