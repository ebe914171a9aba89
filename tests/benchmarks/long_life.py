"""What a run of many stages costs by stage: processor seconds by phase, bytes and files; and what commands then cost.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.benchmarks.long_life --stages 20 --before CHECKOUT

Each checkout makes a store of its own: as many tiny stages as distributions, recorded in MLflow, by the default method.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "record": "mlruns/stages/*/config.json",
    "evaluation": "mlruns/evaluations/*",
    "logged": "mlruns/runs/tiny/logged/*",
    "pointer": "mlruns/artifacts/**/pointer.json",
    "readings": "data/cache/readings/*",
    "mlflow.db": "mlruns/mlflow.db",
}
"""Files that a stage leaves, by what they are; weights are as large as what a stage trains."""
PHASES = ("training", "evaluation", "records")


def by_stage(folder: Path, stages: int) -> list[dict[str, float]]:
    """Make the run in the current directory; what each stage took and left. In the process of one checkout."""
    from lifelong_moe.evaluation.measurements import Measurements
    from pipelines.run import run as pipeline
    from pipelines.run.record import MlflowRecord
    from tests.benchmarks.performance.years import long_config, write_distributions
    from tests.tiny import train

    spent, whole = [defaultdict[str, float](float)], dict[str, float]()

    def watched(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def of(*args: Any, **kwargs: Any) -> Any:
            if name == "training":
                spent.append(defaultdict(float))
            began = time.process_time()
            try:
                return action(*args, **kwargs)
            finally:
                spent[-1][name] += time.process_time() - began
                if name == "records":
                    left(folder, whole, spent[-1])

        return of

    pipeline._train = watched("training", pipeline._train)
    Measurements.evaluations = watched("evaluation", Measurements.evaluations)  # type: ignore[method-assign]
    MlflowRecord.stage_done = watched("records", MlflowRecord.stage_done)  # type: ignore[method-assign]
    config = long_config(write_distributions(folder, stages))
    Path("tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()):
        train("tiny.yaml")
    return [{name: round(number, 4) for name, number in stage.items()} for stage in spent[1:]]


def left(folder: Path, whole: dict[str, float], stage: dict[str, float]) -> None:
    """Note by how much the files of each kind have grown since the stage before."""
    for kind, pattern in KINDS.items():
        now = float(sum(path.stat().st_size for path in folder.glob(pattern)))
        stage[f"{kind} bytes"], whole[kind] = now - whole.get(kind, 0.0), now
    files = float(sum(path.is_file() for top in ("mlruns", "data") for path in (folder / top).rglob("*")))
    stage["files"], whole["files"] = files - whole.get("files", 0.0), files


def summary(stages: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians around the fifth stage and around the third from the end; the first and last stages differ by more."""
    early, late = stages[2:7], stages[-6:-1]
    return {
        name: {"early": statistics.median(one[name] for one in early), "late": statistics.median(o[name] for o in late)}
        for name in stages[-1]
    }


def main() -> None:
    """Make the stores one after the other, then time commands in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=20, help="at least 12")
    parser.add_argument("--rounds", type=int, default=3, help="of the commands")
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(by_stage(Path.cwd(), options.stages)))
        return
    from tests.benchmarks.idle import COMMANDS, call
    from tests.benchmarks.provenance import ROOT, keep, made_with
    from tests.tiny import VOCABULARIES, write_corpus

    origin = made_with()
    checkouts = {"now": ROOT} | ({"before": options.before.absolute()} if options.before else {})
    commands = {name: given for name, given in COMMANDS.items() if "retrain" not in name and "compare" not in name}
    commands["inspect"] = ["-m", "pipelines.cli", "inspect", "tiny", "--text", "apple"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as top:
        for name, checkout in checkouts.items():
            folder = Path(top, name)
            folder.mkdir()
            inner = [sys.executable, __file__, "--here", "--stages", str(options.stages)]
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            made = subprocess.run(inner, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            stages = json.loads(made.stdout.splitlines()[-1])
            found[name] = {"stages": stages, "summary": summary(stages)}
            write_corpus(folder / "short.jsonl", " ".join(VOCABULARIES.values()).split(), 0, documents=3)
            print(name, json.dumps(found[name]["summary"], indent=1), flush=True)
        seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in checkouts}
        for _ in range(options.rounds):
            for what, arguments in commands.items():
                for name, checkout in checkouts.items():
                    seconds[name][what].append(call(checkout, Path(top, name), arguments))
    for name, each in seconds.items():
        found[name]["seconds"] = {what: statistics.median(one) for what, one in each.items()}
        print(name, json.dumps(found[name]["seconds"], indent=1))
    if options.out:
        keep(options.out, {"stages": options.stages, "checkouts": found}, origin)


if __name__ == "__main__":
    main()
