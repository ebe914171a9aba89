"""Two nodes on this machine, each started by torchrun with one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests import node_steps
from tests.conftest import build_model, build_run
from tests.divided import second_stage, take_steps


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def torchrun(node: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={node_steps.NODES}", f"--node-rank={node}"]
    command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "tests.node_steps"]
    path = os.pathsep.join(one or os.getcwd() for one in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, *arguments], env=environment, text=True, start_new_session=True, **pipes)


def test_two_nodes_take_the_steps_of_one(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "shared").mkdir()
    port = free_port()
    nodes = [torchrun(node, port, "shared") for node in range(node_steps.NODES)]
    try:
        said = [node.communicate(timeout=110)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.terminate()  # its processes are of other groups, and end with it only if it can end them
    assert [node.returncode for node in nodes] == [0, 0], said
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    one = take_steps(second_stage(build_run, build_model, node_steps.CASE, balance_loss=0.5), 2)[1].curves
    found = json.loads(Path("curves.json").read_text())
    assert len(found) == len(one) and found == [pytest.approx(curve, abs=1e-10) for curve in one]
