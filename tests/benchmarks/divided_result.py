"""What the main process takes to load the result of ranks that each wrote a part of it, and of one that had all.

A model of 102 M parameters, with both moments of each, in a file or in one of each of two ranks. Each load has a
process of its own. Peaks are above what the process has with the model that it loads into: of private memory, and of
all that is in memory, mapped pages of the files too.

    PYTHONPATH=$PWD python -m tests.benchmarks.divided_result --work FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.training.callbacks.checkpoint import PARTS, BackgroundCheckpointIO, SafeCheckpointIO
from lifelong_moe.training.callbacks.divided import Held, Layout, Part
from lifelong_moe.training.loop.module import StageModule
from tests.benchmarks.performance.clustering import PrivateMemory
from tests.benchmarks.performance.growth import SIZE, second_stage

RANKS = 2
ROUNDS = 3


def module() -> StageModule:
    """What a result is loaded into."""
    spec = second_stage(SIZE)
    return StageModule(SIZE.model(), spec, spec.phases()[0], None, None)


def part(name: str, tensor: Tensor, rank: int) -> Tensor | Part:
    """A rank's part, as shards divide a matrix: an expert's within each expert."""
    dim = 1 if tensor.dim() == 3 else 0
    if not tensor.dim() or tensor.shape[dim] < RANKS:
        return tensor
    chunks = tensor.chunk(RANKS, dim)
    begins = [sum(chunk.shape[dim] for chunk in chunks[:i]) for i in range(len(chunks))]
    layout = Layout(name, tuple(tensor.shape), dim, tuple(Held(i, begin) for i, begin in enumerate(begins)))
    return Part(layout, chunks[rank])


def write(work: Path, is_divided: bool) -> None:
    """Write a checkpoint, from a thread for each rank."""
    told, both = list[str](), threading.Barrier(RANKS)
    weights = {
        name: torch.randn_like(one) if one.is_floating_point() else one for name, one in module().state_dict().items()
    }

    def tell(text: str) -> str:
        told.extend([text] if text else [])
        both.wait()
        return told[0]

    def save(rank: int) -> None:
        def held(name: str, tensor: Tensor) -> Tensor | Part:
            return part(name, tensor, rank) if is_divided else tensor

        state = {name: held(name, one) for name, one in weights.items()}
        moments = {
            i: {m: held(f"{i}.{m}", one) for m in ("exp_avg", "exp_avg_sq")} for i, one in enumerate(weights.values())
        }
        content = {**dict.fromkeys(PARTS, 0), "state_dict": state, "optimizer_states": [{"state": moments}]}
        io = BackgroundCheckpointIO(work, keep=1)
        if is_divided:
            io.save_parts(content, work / "step-0-00000001", rank, 60.0, tell)
        elif rank == 0:
            io.save_checkpoint(content, work / "step-0-00000001")
        io.finish()

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load(work: Path) -> dict[str, Any]:
    """Load as the main process does, and say what it took."""
    into, memory = module(), PrivateMemory()
    memory.start()
    time.sleep(0.2)
    private, resident, began = memory.peak, _status("VmRSS"), time.process_time()
    into.load_weights(SafeCheckpointIO().load_parts(work / "step-0-00000001")["state_dict"])
    seconds = time.process_time() - began
    time.sleep(0.2)
    return {
        "model_mb": round(sum(tensor.nbytes for tensor in into.state_dict().values()) / 1e6),
        "peak_private_mb": round((memory.peak - private) * 1024**2 / 1e6),
        "peak_resident_mb": round(_status("VmHWM") - resident),
        "most_mb": round(_status("VmHWM")),
        "processor_seconds": round(seconds, 2),
    }


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e6


def main() -> None:
    """Print each load as one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    if options.load is not None:
        print(json.dumps(load(options.load)))
        return
    for is_divided in (False, True):
        folder = options.work / ("divided" if is_divided else "whole")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, is_divided)
        command = [sys.executable, "-m", "tests.benchmarks.divided_result", "--work", str(options.work), "--load"]
        for _ in range(ROUNDS):
            done = subprocess.run([*command, str(folder)], check=True, stdout=subprocess.PIPE, text=True)
            print(folder.name, done.stdout, end="")


if __name__ == "__main__":
    main()
