"""What a tick of retraining costs that finds too little new text, beside much that is known.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.benchmarks.ticks --megabytes 60 --before CHECKOUT --out FILE.json

Each checkout learns next to nothing of as much text, in two distributions. Then files arrive, and ticks take turns,
each in a new process. Prints processor seconds and the most memory of each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from lifelong_moe.storage.remembered import SETTLED_SECONDS
from tests.benchmarks.processes import taken_by
from tests.benchmarks.provenance import ROOT, keep, made_with
from tests.benchmarks.text_of_any_size import rows, sentences
from tests.tiny import tiny_config

TICK = ["retrain", "retrain.yaml"]


def write_text(path: Path, found: list[str], megabytes: float, seed: int) -> None:
    """A file of documents."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(rows(found, megabytes * 1e6, seed))


def _taken(folder: Path, checkout: Path, arguments: list[str]) -> dict[str, float]:
    taken = taken_by(["-m", "pipelines.cli", *arguments], folder, checkout)
    return {"seconds": taken["processor_seconds"], "megabytes": taken["most_memory_megabytes"]}


def main() -> None:
    """Make the stores, then let files arrive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=60, help="of known text")
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    checkouts = {"now": ROOT} | ({"before": options.before.absolute()} if options.before else {})
    found = sentences([])
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place, name) for name in checkouts}
        measured: dict[str, dict[str, Any]] = {name: {} for name in checkouts}
        for name, folder in folders.items():
            (folder / "inbox").mkdir(parents=True)
            config = tiny_config(("first", "second"), evaluate={"tokens": 300})
            for seed, distribution in enumerate(("first", "second")):
                write_text(folder / f"{distribution}.jsonl", found, options.megabytes / 2, seed)
                config["distributions"][distribution]["heldout_fraction"] = 0.002
            config["stage_defaults"]["tokens"] = 512
            trigger = {"min_tokens": 10**9, "max_days": None}
            retrain = {"base": "tiny.yaml", "inbox": {"path": "inbox"}, "trigger": trigger}
            for file, content in (("tiny", config), ("retrain", retrain)):
                (folder / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            measured[name]["run"] = _taken(folder, checkouts[name], ["run", "tiny.yaml"])
        for number, arrives in enumerate((1.0, 1.0, 0.1, 0.0)):
            if arrives:
                for folder in folders.values():
                    write_text(folder / f"inbox/{number}.jsonl", found, arrives, 100 + number)
                # A younger file is read again by the next tick, since it might still be written to.
                time.sleep(SETTLED_SECONDS + 1)
            for name, folder in folders.items():
                what = f"tick {number + 1}, with {arrives:g} MB more" if arrives else "tick, nothing touched"
                measured[name][what] = _taken(folder, checkouts[name], TICK)
    for what in measured["now"]:
        for name, each in measured.items():
            print(f"{what:26} {name:7} {each[what]['seconds']:6.2f} s  {each[what]['megabytes']:6.0f} MB")
    if options.out:
        keep(options.out, {"megabytes": options.megabytes, "checkouts": measured}, origin)


if __name__ == "__main__":
    main()
