"""Two nodes on this machine, each started by torchrun with one process, or with what srun puts in its environment."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from torch import Tensor

from lifelong_moe.training.ranks import supervise
from tests import node_steps
from tests.conftest import build_model, build_run
from tests.divided import second_stage, take_steps
from tests.forked import ForkedProcess
from tests.tiny import Child, fork


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def free_job() -> int:
    """A job of SLURM's whose port, which Lightning makes of the number's end, is free."""
    while True:
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", 15_000 + (job := random.SystemRandom().randrange(10_000))))
            return 7_000_000 + job


def start(action: Callable[[], object], **environment: str) -> Child:
    """Fork a node with nothing of a launcher's in its environment but what is given: it has torch already."""
    path = os.pathsep.join(one or os.getcwd() for one in sys.path)
    given = environment | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

    def node() -> None:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
            del os.environ[name]
        os.environ.update(given)
        action()

    return fork(node)


def torchrun(node: int, port: int) -> Child:
    """As docs/scheduling/nodes.sh does; it starts the node's process, and that its rank."""
    from torch.distributed.run import main

    nodes = [f"--nnodes={node_steps.NODES}", f"--node-rank={node}", "--nproc-per-node=1"]
    place = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return start(lambda: main([*nodes, *place, "-m", "tests.node_steps", "shared"]))


def srun(node: int, job: int) -> Child:
    """As srun does in docs/scheduling/nodes.slurm: these are the variables that a task finds.

    Ranks inherit all of them whether they are started or forked; torchrun's are started, which takes their imports.
    """
    told = {"JOB_ID": job, "JOB_NAME": "lifelong-moe-run", "JOB_NODELIST": "localhost", "NODELIST": "localhost"}
    told |= {"NNODES": node_steps.NODES, "NTASKS": node_steps.NODES, "NTASKS_PER_NODE": 1}
    told |= {"PROCID": node, "NODEID": node, "LOCALID": 0}

    def task() -> None:
        supervise.Popen = ForkedProcess  # type: ignore[assignment, misc]
        node_steps.main(Path("shared"))

    return start(task, **{f"SLURM_{name}": str(value) for name, value in told.items()})


@pytest.mark.parametrize(("launch", "place"), [(torchrun, free_port), (srun, free_job)], ids=["torchrun", "srun"])
def test_two_nodes_take_the_steps_of_one(
    lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    launch: Callable[[int, int], Child],
    place: Callable[[], int],
) -> None:
    (lab / "shared").mkdir()
    where = place()
    nodes = [launch(node, where) for node in range(node_steps.NODES)]
    ended: list[int] = []
    try:
        ended.extend(node.wait() for node in nodes)
    finally:
        for node in nodes[len(ended) :]:
            os.kill(
                node.pid, signal.SIGTERM
            )  # its processes are of other groups, and end with it only if it can end them
    assert ended == [0, 0], [node.output for node in nodes]
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    one = take_steps(second_stage(build_run, build_model, node_steps.CASE, balance_loss=0.5), 2)[1].curves
    found = json.loads(Path("curves.json").read_text())
    assert len(found) == len(one) and found == [pytest.approx(curve, abs=1e-10) for curve in one]
