"""What torchrun starts on each of two nodes: steps in float64. The argument is a folder that they share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.training.ranks.nodes import joined
from lifelong_moe.training.ranks.supervise import run_ranks
from lifelong_moe.training.ranks.surroundings import Surroundings
from pipelines.run.nodes import on_nodes
from tests.conftest import build_model, build_run
from tests.divided import second_stage, take_steps
from tests.forked import surroundings

CASE = "replay, distilled"
NODES = 2


def curves(processes: int, nodes: int = 1) -> list[dict[str, float]]:
    """The curves of a few steps in float64."""
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    begin = second_stage(build_run, build_model, CASE, balance_loss=0.5)
    return take_steps(begin, 2, processes, nodes)[1].curves


def curves_in_rank(rank: int, folder: Path, here: Surroundings) -> Any:
    """The same, as one rank of several."""
    return curves(1, NODES)


def main(folder: Path) -> None:
    """Take the steps in ranks of all nodes; the first writes the curves."""
    trainer = build_run(f"trainer.num_nodes={NODES}").trainer

    def command() -> None:
        entry = f"{curves_in_rank.__module__}:{curves_in_rank.__name__}"
        found = run_ranks(1, entry, folder, surroundings(), joined(trainer))
        Path("curves.json").write_text(json.dumps(found))

    on_nodes(trainer, command, surroundings().console)


if __name__ == "__main__":
    from tests import node_steps  # by its name, which ranks import

    torch.set_num_threads(1)
    node_steps.main(Path(sys.argv[1]))
