"""Attack a store for hours: ``python -m tests.benchmarks.fuzz_store ATTEMPTS [SEED]``, one on each core.

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
from collections import Counter
from pathlib import Path

import torch

from tests.hostile import (
    COMMANDS,
    carry_out,
    configuration_attacks,
    import_all,
    json_attacks,
    link_attacks,
    make_store,
)

MEMORY = "/dev/shm"
EVERY = 1000
"""Attempts from one line of counts to the next."""
SELDOM = {"inspect": 0.25}
"""How often a command is drawn, for each time that others are: its pictures take a second."""


def main(attempts: int, seed: int = 0) -> int:
    """Attack; returns how many attempts went wrong."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        intact, copy = Path(folder, "intact"), Path(folder, "copy")
        intact.mkdir()
        os.chdir(intact)
        make_store(intact)
        import_all(intact)
        store = intact / "mlruns"
        attacks = [*link_attacks(store), *json_attacks(store), *configuration_attacks(intact)]
        print(f"{len(attacks)} attacks, {len(COMMANDS)} commands", flush=True)
        draw, counts, begun = random.Random(seed), Counter[str](), time.monotonic()
        for number in range(1, attempts + 1):
            attack = draw.choice(attacks)
            fitting = [name for name, words in COMMANDS.items() if attack.concerns(words)]
            [command] = draw.choices(fitting, [SELDOM.get(name, 1) for name in fitting])
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
