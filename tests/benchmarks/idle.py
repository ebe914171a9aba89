"""What commands cost that train nothing, and what a stage writes, beside an earlier checkout.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.benchmarks.idle --stages 20 --rounds 5 --before CHECKOUT

Each checkout makes a store of its own: as many tiny stages as distributions. Then commands take turns, each in a new
process. Prints medians of processor time, which other work changes little, and their ratio to importing torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.provenance import ROOT, keep, made_with
from tests.tiny import VOCABULARIES, tiny_config, write_corpus

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "status": ["-m", "pipelines.cli", "status", "tiny"],
    "run, nothing to do": ["-m", "pipelines.cli", "run", "tiny.yaml"],
    "retrain, nothing new": ["-m", "pipelines.cli", "retrain", "retrain.yaml"],
    "compare, all committed": ["-m", "pipelines.cli", "compare", "compare.yaml"],
    "evaluate": ["-m", "pipelines.cli", "evaluate", "tiny", "--data", "short.jsonl"],
    "generate a token": ["-m", "pipelines.cli", "generate", "tiny", "apple", "--max-new-tokens", "1"],
}
FLUSHES = """
import json, os, sys
from pipelines.cli import app, exit_code
count, fsync = [0], os.fsync
def counted(descriptor):
    count[0] += 1
    fsync(descriptor)
os.fsync = counted
sys.argv = ["lifelong-moe", *sys.argv[2:]]
assert exit_code(app) == 0
open("flushes.json", "w").write(json.dumps(count[0]))
"""


def write_inputs(folder: Path, stages: int, arms: int, tracked: bool) -> None:
    """Text and configurations."""
    names = [f"d{place:02d}" for place in range(stages)]
    words = " ".join(VOCABULARIES.values()).split()
    for seed, name in enumerate(names):
        own = [word for word in words if random.Random(f"{seed} {word}").random() < 0.5]
        write_corpus(folder / f"{name}.jsonl", own, seed, documents=80)
    write_corpus(folder / "short.jsonl", words, stages, documents=3)
    config = tiny_config(tuple(names), tracking={"enabled": tracked}, evaluate={"tokens": 300})
    config["stage_defaults"]["tokens"] = 512
    short = config | {"stages": config["stages"][:2], "run": "arms"}
    rates = {f"a{place:02d}": [f"stage_defaults.optim.lr={1e-3 * (1 + place)}"] for place in range(arms)}
    files = {
        "tiny": config,
        "short": short,
        "retrain": {"base": "tiny.yaml", "inbox": {"path": "inbox"}},
        "compare": {"compare": "c", "base": "short.yaml", "seeds": [0], "arms": rates},
    }
    (folder / "inbox").mkdir()
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def call(checkout: Path, folder: Path, arguments: list[str]) -> float:
    """Processor seconds of a command in a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def written(checkout: Path, folder: Path) -> dict[str, Any]:
    """What a run of all stages leaves and how often it waits for the disk, once the text is tokenized."""
    call(checkout, folder, ["-m", "pipelines.cli", "prepare", "tiny.yaml"])
    call(checkout, folder, ["-c", FLUSHES, "-", "run", "tiny.yaml"])
    flushes = json.loads((folder / "flushes.json").read_text())
    call(checkout, folder, ["-c", FLUSHES, "-", "run", "tiny.yaml"])
    store = folder / "mlruns"
    return {
        "flushes": flushes,
        "flushes_of_a_run_with_nothing_to_do": json.loads((folder / "flushes.json").read_text()),
        "head_bytes": (store / "runs/tiny/head.json").stat().st_size,
        "files": sum(path.is_file() for path in store.rglob("*")),
    }


def main() -> None:
    """Make the stores, time the commands in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--arms", type=int, default=25, help="of the comparison")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tracked", action="store_true", help="record in MLflow")
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    checkouts = {"now": ROOT} | ({"before": options.before.absolute()} if options.before else {})
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, name) for name in checkouts}
        found: dict[str, Any] = {}
        for name, checkout in checkouts.items():
            folders[name].mkdir()
            write_inputs(folders[name], options.stages, options.arms, options.tracked)
            found[name] = written(checkout, folders[name])
            call(checkout, folders[name], COMMANDS["compare, all committed"])
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for what, arguments in COMMANDS.items():
                for name, checkout in checkouts.items():
                    seconds.setdefault((what, name), []).append(call(checkout, folders[name], arguments))
    for (what, name), each in seconds.items():
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        found[name].setdefault("seconds", {})[what] = {"median": middle, "quartiles": [low, high]}
        ratio = middle / statistics.median(seconds["import torch", name])
        print(f"{what:24} {name:7} {middle:6.2f} s  ({low:.2f} – {high:.2f})  {ratio:.2f} of importing torch")
    print(json.dumps({name: {k: v for k, v in one.items() if k != "seconds"} for name, one in found.items()}, indent=1))
    if options.out:
        keep(options.out, {"stages": options.stages, "arms": options.arms, "checkouts": found}, origin)


if __name__ == "__main__":
    main()
