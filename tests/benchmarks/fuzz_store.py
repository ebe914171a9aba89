"""Attack a store for hours: ``python -m tests.benchmarks.fuzz_store ATTEMPTS [SEED …]``, a process for each seed.

Each attempt copies a small store with its configurations, applies one attack of :mod:`tests.hostile` drawn at random,
and carries out one command that it concerns. What is wrong is printed at once; a line after every thousand attempts,
and the last one, count them by exit code.

A forked process carries out many attempts, since starting it takes longer than most of them. Where one of them seems
wrong, or ends the process, it is repeated in a process of its own, and that decides.
"""

from __future__ import annotations

import gc
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
    Attack,
    Tree,
    carry_out,
    configuration_attacks,
    database_attacks,
    import_all,
    json_attacks,
    link_attacks,
)
from tests.watched import attempt_here

MEMORY = "/dev/shm"
TOGETHER = 50
"""Attempts of one process."""
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
    repeated = 0
    for done in range(0, attempts, TOGETHER):
        draws = [draw(trees, by) for _ in range(min(TOGETHER, attempts - done))]
        while draws:
            codes = in_one_process(draws, intact, copy)
            counts.update(str(code) for code in codes if code is not None)
            doubtful = [one for one, code in zip(draws, codes, strict=False) if code is None] + draws[len(codes) :][:1]
            for command, attack in doubtful:
                outcome, wrong = carry_out(command, intact, copy, attack)
                shutil.rmtree(copy)
                counts["wrong" if wrong else str(outcome.code)] += 1
                repeated += 1
                if wrong:
                    print(f"{command} on {attack}: {wrong}", flush=True)
            draws = draws[len(codes) + 1 :]
        number = min(done + TOGETHER, attempts)
        if number % EVERY < TOGETHER or number == attempts:
            seconds = round(time.monotonic() - begun)
            line = {"seed": seed, "attempts": number, "seconds": seconds, "repeated": repeated, **counts}
            print(json.dumps(line), flush=True)
    return counts["wrong"]


def draw(trees: list[Tree], by: random.Random) -> tuple[str, Attack]:
    """A command, and an attack that it concerns."""
    attack = by.choice(trees).draw(by)
    fitting = [name for name, words in COMMANDS.items() if attack.concerns(words)]
    [command] = by.choices(fitting, [SELDOM.get(name, 1) for name in fitting])
    return command, attack


def in_one_process(draws: list[tuple[str, Attack]], intact: Path, copy: Path) -> list[int | None]:
    """Exit codes of the attempts that a forked process has ended; None for what seems wrong.

    They are fewer than the draws where the process itself was ended, by the next one.
    """
    codes = copy.with_suffix(".codes")
    codes.touch()
    if not (pid := os.fork()):
        try:
            gc.freeze()
            for number, (command, attack) in enumerate(draws):
                # Each in a folder of its own: a library may remember what it has opened at an address.
                into = copy / str(number)
                outcome, wrong = carry_out(command, intact, into, attack, by=attempt_here)
                with codes.open("a") as file:
                    print("wrong" if wrong else outcome.code, file=file)
                shutil.rmtree(into, ignore_errors=True)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    shutil.rmtree(copy, ignore_errors=True)
    ended = codes.read_text().split()
    codes.unlink()
    return [None if code == "wrong" else int(code) for code in ended]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
