"""What a dead MLflow costs a training step: seconds of a stage with a refused port over those without tracking.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/tracking_overhead.py --pairs 5

Both arms are run in turn on the same stage of a tiny model, whose steps take milliseconds, so the ratio is an upper
bound. Printed too is what the spool's writes of training curves took of the stage: that figure does not drown in the
noise of a shared machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.tracking.spool import Spool
from pipelines.shared.quiet import silence_libraries
from tests.benchmarks.provenance import keep, made_with
from tests.tiny import CONTEXT, SEQUENCES, tiny_config, train, write_config, write_corpora


def main() -> None:
    """Run the pairs and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--log-every", type=int, default=TrainerConfig().log_every_n_steps, help="Steps.")
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    out = options.out and options.out.absolute()
    silence_libraries()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(tempfile.mkdtemp(prefix="tracking-overhead-"))
    write_corpora(Path())
    config = tiny_config(
        ("fruit",), trainer={"log_every_n_steps": options.log_every}, checkpoint={"every_steps": 10**6}
    )
    config["stage_defaults"]["tokens"] = options.steps * SEQUENCES * CONTEXT
    write_config(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    spent: list[float] = []
    append = Spool.append

    def timed(self: Spool, operation: dict[str, Any], content: bytes | None = None) -> None:
        began = time.perf_counter()
        append(self, operation, content)
        if operation["do"] == "metrics" and any(key.startswith("train/") for key, _, _ in operation["rows"]):
            spent.append(time.perf_counter() - began)

    Spool.append = timed  # type: ignore[method-assign]

    def seconds(*overrides: str) -> float:
        shutil.rmtree("mlruns", ignore_errors=True)
        spent.clear()
        report, _ = train("tiny.yaml", *overrides)
        return float(report["stages"][0]["seconds"])

    seconds()  # warm: tokenized data, imports
    ratios, shares = [], []
    for _ in range(options.pairs):
        without = seconds()
        spooled = seconds("tracking.enabled=true", f"tracking.uri={uri}")
        ratios.append(spooled / without)
        shares.append(sum(spent) / spooled)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, {options.steps} steps, one in {options.log_every} logged")
    print(f"stage with a dead server ÷ without tracking: median {statistics.median(ratios):.4f}, "
          f"{min(ratios):.4f} to {max(ratios):.4f} in {len(ratios)} pairs")  # fmt: skip
    print(f"writing curves to the spool: {max(shares):.3%} of the stage at most")
    if out:
        keep(out, {"steps": options.steps, "stage_over_untracked": ratios, "spool_share": shares}, origin)


if __name__ == "__main__":
    main()
