"""Attack a store for hours: ``python -m tests.benchmarks.fuzz_store ATTEMPTS [SEED]``.

Each attempt copies a small store with its configurations, applies one attack of :mod:`tests.hostile` drawn at random,
and carries out one command that it concerns. What is wrong is printed at once; the last line counts the attempts by
exit code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.hostile import COMMANDS, configuration_attacks, copy_scene, json_attacks, link_attacks, make_store
from tests.watched import attempt, complaint, fingerprint


def main(attempts: int, seed: int = 0) -> int:
    """Attack; returns how many attempts went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        intact, attacked = Path(folder, "intact"), Path(folder, "attacked")
        intact.mkdir()
        os.chdir(intact)
        make_store(intact)
        scene = copy_scene(intact, attacked)
        attacks = [
            *link_attacks(scene.store, scene.outside),
            *json_attacks(scene.store),
            *configuration_attacks(scene.work),
        ]
        draw, counts = random.Random(seed), Counter[str]()
        print(f"{len(attacks)} attacks, {len(COMMANDS)} commands", flush=True)
        for _ in range(attempts):
            attack = draw.choice(attacks)
            command = draw.choice([name for name, words in COMMANDS.items() if attack.concerns(words)])
            shutil.rmtree(attacked)
            scene = copy_scene(intact, attacked)
            attack.apply(scene.store)
            before = fingerprint(scene.outside)
            outcome = attempt(COMMANDS[command], scene.work, scene.outside)
            wrong = complaint(outcome)
            if wrong is None and fingerprint(scene.outside) != before:
                wrong = "it changed its surroundings"
            counts["wrong" if wrong else str(outcome.code)] += 1
            if wrong:
                print(f"{command} on {attack}: {wrong}", flush=True)
    print(json.dumps({"seed": seed, "attempts": attempts, **counts}))
    return counts["wrong"]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
