"""One simulated month: thirty nightly ticks over an inbox, as `lifelong-moe retrain` processes, one of them killed.

    OMP_NUM_THREADS=1 python tests/benchmarks/retraining_month.py --home month

Runs in the directory ``--home``, which must not exist; prints the ledger as a table, and fails if it does not read as
it should.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lifelong_moe.data.builtin import builtin_documents
from lifelong_moe.data.documents import Document
from tests.benchmarks.retraining_policy import Pool, make_base, noise, write

HERE = Path.cwd()
COMMAND = [sys.executable, "-m", "pipelines.cli"]


def vandalised(documents: list[Document], seed: int) -> list[Document]:
    """A third of the words replaced by words from elsewhere in the batch: still of the old kind, and worse than it."""
    draw = random.Random(seed)
    words = [word for document in documents for word in document.text.split(" ")]
    return [
        Document(" ".join(draw.choice(words) if draw.random() < 0.35 else w for w in d.text.split(" ")), d.source)
        for d in documents
    ]


def tick(kill_when: Callable[[], bool] | None = None) -> dict[str, Any] | None:
    """One night; None if it was killed."""
    process = subprocess.Popen(
        [*COMMAND, "retrain", "retrain.yaml"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if kill_when is not None:
        while not kill_when():
            assert process.poll() is None, "the tick ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    text, _ = process.communicate()
    return json.loads(text.strip().splitlines()[-1])  # type: ignore[no-any-return]


def stage_is_trained() -> bool:
    """Checkpoints come every 25 steps, and a probe has ten: what has one is the stage."""
    return any(Path("mlruns/work").glob("*/step-*"))


def month(pools: dict[str, Pool], seed: int) -> dict[int, tuple[str, list[Document]]]:
    """What arrives on which day."""
    rot = [
        Document(codecs.encode(d.text, "rot13"), d.source)
        for d in builtin_documents("english_docs", HERE / "data/cache")
    ]
    cipher = Pool(rot, seed + 3)
    english, code = pools["english_docs"], pools["python_code"]
    return {
        2: ("a little English", english.take(12_000)),
        3: ("more English", english.take(60_000)),
        6: ("noise", noise("latin-1", seed, [])),
        9: ("a new kind: C++ headers", pools["cpp_headers"].take(90_000)),
        12: ("more Python", code.take(60_000)),
        15: ("a new language: ROT13", cipher.take(90_000)),
        18: ("more C++ headers", pools["cpp_headers"].take(60_000)),
        20: ("vandalised English", vandalised(english.take(90_000), seed)),
        22: ("the file of day 9 again", []),
        25: ("more ROT13", cipher.take(60_000)),
        28: ("more English", english.take(60_000)),
    }


def show(rows: list[tuple[int, str, str, str, str]]) -> None:
    print("| day | arrived | outcome | action | version | reason |\n|---:|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    options.home.mkdir()
    os.chdir(options.home)
    # With the default margin some Python is taken for C++ once there is some, which the gate does not let pass.
    pools = make_base(options.seed, margin=12.0, evaluated=16_000)
    settings = yaml.safe_load(Path("retrain.yaml").read_text())
    settings["trigger"] = {"min_tokens": 10_000, "least_documents": 10}
    Path("retrain.yaml").write_text(yaml.safe_dump(settings))
    base = yaml.safe_load(Path("base.yaml").read_text())
    base["tracking"] = {"enabled": True}
    base["checkpoint"] = {"every_steps": 25}
    Path("base.yaml").write_text(yaml.safe_dump(base))
    subprocess.run([*COMMAND, "run", "base.yaml"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    arrivals, rows, results = month(pools, options.seed), [], {}
    Path("inbox").mkdir()
    for day in range(1, 31):
        what, documents = arrivals.get(day, ("–", []))
        if documents:
            write(Path(f"inbox/day-{day:02}.jsonl"), documents)
        elif day == 22:
            Path("inbox/day-22.jsonl").write_bytes(Path("inbox/day-09.jsonl").read_bytes())
        result = tick(stage_is_trained if day == 15 else None)
        results[day] = result
        if result is None:
            rows.append((day, what, "killed (SIGKILL)", "", "", "in the middle of its stage"))
        else:
            cells = (result["outcome"], result.get("action", ""), result["champion"]["version"], result["reason"])
            rows.append((day, what, *cells))
        print(rows[-1], file=sys.stderr, flush=True)
    show(rows)
    outcomes = {day: result["outcome"] if result else "killed" for day, result in results.items()}
    assert all(outcomes[day] == "idle" for day in range(1, 31) if day not in arrivals and day != 16), outcomes
    assert outcomes[6] == "skipped" and outcomes[22] == "idle", outcomes
    assert outcomes[9] == outcomes[16] == "promoted" and outcomes[15] == "killed", outcomes
    assert outcomes[20] in ("rejected", "skipped"), outcomes
    head = json.loads(Path("mlruns/runs/base/head.json").read_text())
    print(f"versions: {[version['kind'] for version in head['versions']]}, champion {head['champion']}")


if __name__ == "__main__":
    main()
