"""Attack a store for hours: ``python -m tests.benchmarks.fuzz_store ATTEMPTS [SEED …]``, a process for each seed.

Each attempt copies a small store with its configurations, applies one attack of :mod:`tests.hostile` drawn at random,
and carries out one command that it concerns. What is wrong is printed at once; a line after every thousand attempts,
and the last one, count them by exit code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from tests.full_store import make_store
from tests.hostile import (
    COMMANDS,
    Tree,
    carry_out,
    configuration_attacks,
    database_attacks,
    import_all,
    json_attacks,
    link_attacks,
)

MEMORY = "/dev/shm"
EVERY = 1000
"""Attempts from one line of counts to the next."""
SELDOM = {"inspect": 0.05, "tick": 0.1, "compare": 0.3, "retrain": 0.3, "sync": 0.4, "export": 0.4, "consolidate": 0.4}
SELDOM |= {name: 0.2 for name in COMMANDS if "recorded" in name}
"""How often a command is drawn, for each time that others are: what takes longer than most is drawn less often."""


def main(attempts: int, *seeds: int) -> int:
    """Attack; returns how many attempts went wrong, or how many processes had such."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        intact = Path(folder, "intact")
        intact.mkdir()
        os.chdir(intact)
        make_store(intact)
        import_all(intact)
        stored = [*link_attacks(intact), *json_attacks(intact), *database_attacks(intact)]
        written = list(configuration_attacks(intact))
        print(f"{len(stored) + len(written)} attacks, {len(COMMANDS)} commands", flush=True)
        trees = [Tree(stored)] * 4 + [Tree(written)]
        # The store is made once, and forked processes share what was imported.
        others: list[int] = []
        for seed in seeds[1:]:
            if not (pid := os.fork()):
                code = 1
                try:
                    code = bool(attack_all(attempts, seed, trees, intact, Path(folder, f"copy-{seed}")))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)  # the folder is the parent's to remove
            others.append(pid)
        wrong = attack_all(attempts, seeds[0] if seeds else 0, trees, intact, Path(folder, "copy"))
        return wrong + sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others)


def attack_all(attempts: int, seed: int, trees: list[Tree], intact: Path, copy: Path) -> int:
    """Attack so often; returns how many attempts went wrong."""
    by, counts, begun = random.Random(seed), Counter[str](), time.monotonic()
    for number in range(1, attempts + 1):
        attack = by.choice(trees).draw(by)
        fitting = [name for name, words in COMMANDS.items() if attack.concerns(words)]
        [command] = by.choices(fitting, [SELDOM.get(name, 1) for name in fitting])
        outcome, wrong = carry_out(command, intact, copy, attack)
        shutil.rmtree(copy)
        counts["wrong" if wrong else str(outcome.code)] += 1
        if wrong:
            print(f"{command} on {attack}: {wrong}", flush=True)
        if number % EVERY == 0 or number == attempts:
            seconds = round(time.monotonic() - begun)
            print(json.dumps({"seed": seed, "attempts": number, "seconds": seconds, **counts}), flush=True)
    return counts["wrong"]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
