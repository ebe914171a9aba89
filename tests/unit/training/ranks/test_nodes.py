"""What nodes tell each other, on a store in memory; two nodes at work: tests/distributed/test_nodes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError, DataError, TryAgainError
from lifelong_moe.training.ranks import nodes, supervise
from lifelong_moe.training.ranks.nodes import Nodes, join_nodes, joined, leading
from lifelong_moe.training.ranks.supervise import lend_ranks
from pipelines.run.nodes import on_nodes
from tests.forked import surroundings

TWO = TrainerConfig(num_nodes=2, devices=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "LEAVE_SECONDS", "SHARED_SECONDS"):
        monkeypatch.setattr(nodes, name, 0.01)
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(nodes, "_joined", [])


@pytest.fixture
def both() -> list[Nodes]:
    store = dist.HashStore()
    return [Nodes(2, rank, "host", 1, store, "p") for rank in range(2)]


def test_a_phase_is_told_and_so_is_its_end(both: list[Nodes], tmp_path: Path) -> None:
    first, second = both
    first.begin("module:work", tmp_path)
    assert second.wait_for_phase() == {"entry": "module:work", "folder": str(tmp_path)}
    assert first.meeting == second.meeting == ["host", 1, "p/ranks/1"]
    assert first.failure() is None is second.failure(0.02)
    second.end(DataError("x.jsonl:3: unreadable"))
    found = first.failure()
    assert isinstance(found, DataError) and str(found) == "x.jsonl:3: unreadable"
    first.end(ValueError("a bug"))
    found = second.failure()
    assert isinstance(found, RuntimeError) and str(found) == "a bug"
    first.begin("module:work", tmp_path)
    assert first.failure() is None  # of the phase before


def test_other_nodes_lend_ranks_until_the_command_is_over(
    both: list[Nodes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both
    run: list[Any] = []

    def run_here(number: int, entry: str, folder: Path, here: object, nodes: Nodes) -> None:
        run.append((number, entry, folder))
        raise TryAgainError("stopped after step 6")

    monkeypatch.setattr(supervise, "_run_here", run_here)
    first.begin("module:work", tmp_path)
    with pytest.raises(DataError), leading(first):
        raise DataError("x")
    assert lend_ranks(second, 3, surroundings()) == DataError.exit_code
    assert run == [(3, "module:work", tmp_path)]
    found = first.failure()
    assert isinstance(found, TryAgainError) and str(found) == "stopped after step 6"


def test_what_failed_first_is_said_on_the_first_node(
    both: list[Nodes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both

    def run_here(*_: object) -> None:
        second.phase = first.phase
        second.end(TryAgainError("training process 1 of 2 was ended by SIGKILL"))
        raise TryAgainError("training process 0 of 2 did not answer")

    monkeypatch.setattr(supervise, "_run_here", run_here)
    with pytest.raises(TryAgainError, match="process 1 of 2 was ended by SIGKILL"):
        supervise.run_ranks(1, "module:work", tmp_path, surroundings(), first)


def test_a_folder_that_is_not_shared_is_told(both: list[Nodes], tmp_path: Path) -> None:
    first, second = both
    first.begin("module:work", tmp_path / "nowhere")
    first.over(75)
    assert lend_ranks(second, 1, surroundings()) == 75
    found = first.failure
    first.phase = 1
    assert "the nodes must share their working directory" in str(found())


def test_a_first_node_that_is_gone_ends_the_others(both: list[Nodes], monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(keys: object) -> bool:
        raise dist.DistNetworkError("connection reset")

    monkeypatch.setattr(both[1], "store", type("Gone", (), {"check": staticmethod(lost), "set": lost})())
    with pytest.raises(TryAgainError, match="node 0 is gone"):
        lend_ranks(both[1], 1, surroundings())


def test_nodes_are_joined_as_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = dist.HashStore(), list[Any]()

    def connect(host: str, port: int, **options: Any) -> dist.Store:
        made.append((host, port, options["is_master"]))
        return store

    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # noted, since Lightning sets some of them
        monkeypatch.delenv(name)
    monkeypatch.setattr(nodes, "TCPStore", connect)
    assert joined(TrainerConfig()) is None
    with pytest.raises(ConfigError, match="only `lifelong-moe run`, started on each machine by torchrun or srun"):
        joined(TWO)
    with pytest.raises(ConfigError, match="start the command on each machine by torchrun or srun"):
        join_nodes(TWO)
    slurm = {"JOB_NAME": "run", "JOB_ID": "20017", "NODELIST": "host[5-6]", "NTASKS": "2", "PROCID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        join_nodes(TWO)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    found = join_nodes(TWO)
    assert (found.number, found.rank, found.host, found.port) == (2, 0, "host5", 15017) and joined(TWO) is found
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0", "WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert (join_nodes(TWO).host, made) == ("first", [("host5", 15017, True), ("first", 29500, False)])
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"the launcher has started 6 processes; start one on each machine"):
        join_nodes(TWO)


def test_one_machine_runs_the_command() -> None:
    done: list[int] = []
    on_nodes(TrainerConfig(), lambda: done.append(1), surroundings().console)
    assert done == [1]
