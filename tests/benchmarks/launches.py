"""Kernels of a training step, counted on a pretended GPU: by router, and of the default method by its generations.

    PYTHONPATH=$PWD python -m tests.benchmarks.launches > docs/results/launches.json

Steps of two layers with `trainer.precision=auto` at compute capability 9. ``apart`` sorts tokens by generation and
makes each generation's changed matrices, as a step did before changes were laid side by side.
"""

from __future__ import annotations

import json
import sys

from lifelong_moe.training.loop import module
from tests.conftest import ROUTER_KINDS
from tests.device_step import KINDS, Case, born, taken

GENERATIONS = (2, 3, 6, 16)
WAYS = {
    "text of all": {},
    "text of the newest": {"newest_alone": True},
    "text of all, teacher": {"distils": True},
    "text of the newest, teacher": {"newest_alone": True, "distils": True},
}


def default_method() -> dict[str, dict[str, dict[str, int]]]:
    """Launches by text, number of generations and way to compute their changes."""
    join, found = module.join_changes, {}
    for name, options in WAYS.items():
        found[name] = {str(number): {} for number in GENERATIONS}
        for way in ("apart", "side by side"):
            module.join_changes = join if way == "side by side" else lambda matrices: None
            for number in GENERATIONS:
                case = Case("default", "auto", generations=born("default", number, 1), **options)
                found[name][str(number)][way] = taken(case).log.launches
    module.join_changes = join
    return found


def routers() -> dict[str, dict[str, int]]:
    """Launches by router, of models of one generation or two."""
    return {
        kind: {
            "step": taken(Case(kind, "auto")).log.launches,
            "step_with_teacher": taken(Case(kind, "auto", distils=True)).log.launches,
        }
        for kind in (*(kind for kind in KINDS if kind != "default"), *ROUTER_KINDS)
    }


if __name__ == "__main__":
    result = {
        "command": "python -m tests.benchmarks.launches",
        "layers": 2,
        "default": default_method(),
        "routers": routers(),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
