"""Several machines that take training steps together.

An outer launcher, torchrun or srun, starts the same command once on each of them, the nodes. On the first it runs as
ever. On the others it does nothing but lend ranks to the first one's phases: it hears of them through torch's TCPStore
and reads them in the working directory, which all nodes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lifelong_moe import errors
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError, LifelongError, TryAgainError

POLL_SECONDS = 0.2
"""Between two looks for news of other nodes."""
CONNECT_SECONDS = 300.0
"""Time for the first node to begin."""
SHARED_SECONDS = 60.0
"""Time after which a file of the first node is visible on all others."""
LEAVE_SECONDS = 10.0
"""Time for the other nodes to hear that the command is over."""


@dataclass
class Nodes:
    """The nodes, as one of them sees them."""

    number: int
    rank: int
    """Of this node; the command runs on node 0."""
    host: str
    port: int
    store: Store
    """What nodes tell each other."""
    prefix: str
    phase: int = 0
    """Number of the current phase; counted alike on all nodes."""

    @property
    def meeting(self) -> list[Any]:
        """Where the ranks of the current phase meet: host, port and prefix."""
        return [self.host, self.port, f"{self.prefix}/ranks/{self.phase}"]

    def begin(self, entry: str, folder: Path) -> None:
        """Tell the other nodes of the next phase, on node 0; on others it is the one that they were told of."""
        if self.rank == 0:
            self.phase += 1
            self._tell(f"phase/{self.phase}", {"entry": entry, "folder": str(folder)})

    def wait_for_phase(self) -> Mapping[str, Any]:
        """What node 0 tells next: ``entry`` and ``folder`` of a phase, or ``over``, the exit code.

        Raises:
            TryAgainError: If node 0 is gone.
        """
        self.phase += 1
        with _losing_node_0():
            while (told := self._told(f"phase/{self.phase}")) is None:
                time.sleep(POLL_SECONDS)
        return told

    def end(self, error: BaseException | None) -> None:
        """Tell the other nodes how this one's ranks ended."""
        told = {} if error is None else {"error": type(error).__name__, "message": str(error)}
        # Whoever is gone needs no news.
        with suppress(dist.DistError):
            self._tell(f"end/{self.phase}/{self.rank}", told)

    def failure(self, seconds: float = 0.0) -> Exception | None:
        """What another node failed of in this phase; waits a while for all others to end."""
        others, until = [node for node in range(self.number) if node != self.rank], time.monotonic() + seconds
        while True:
            with suppress(dist.DistError):
                ends = [self._told(f"end/{self.phase}/{node}") for node in others]
                if failed := next((end for end in ends if end), None):
                    kind = getattr(errors, failed["error"], RuntimeError)
                    return (kind if issubclass(kind, LifelongError) else RuntimeError)(failed["message"])
                if all(end is not None for end in ends):
                    return None
            if time.monotonic() >= until:
                return None
            time.sleep(POLL_SECONDS)

    def over(self, code: int) -> None:
        """Tell the other nodes that the command ended, and wait until they know."""
        with suppress(dist.DistError):
            self._tell(f"phase/{self.phase + 1}", {"over": code})
            # The store may end with this process.
            until = time.monotonic() + LEAVE_SECONDS
            others = [f"left/{node}" for node in range(1, self.number)]
            while not self.store.check(others) and time.monotonic() < until:
                time.sleep(POLL_SECONDS)

    def leave(self) -> None:
        """Tell node 0 that this one knows."""
        with suppress(dist.DistError):
            self._tell(f"left/{self.rank}", {})

    def _tell(self, key: str, data: Mapping[str, Any]) -> None:
        self.store.set(key, json.dumps(data))

    def _told(self, key: str) -> Mapping[str, Any] | None:
        if not self.store.check([key]):
            return None
        told: Mapping[str, Any] = json.loads(self.store.get(key))
        return told


_joined: list[Nodes] = []


def join_nodes(trainer: TrainerConfig) -> Nodes:
    """Join the nodes that an outer launcher has started; once a process.

    Raises:
        ConfigError: If there is no launcher, or it has not started one process a node.
        TryAgainError: If the first node does not begin.
    """
    kinds: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment)
    where = f"trainer.num_nodes={trainer.num_nodes}"
    try:
        launched = next((kind() for kind in kinds if kind.detect()), None)
    # Lightning refuses tasks that are not counted by node.
    except RuntimeError as error:
        raise ConfigError(f"{where}: {error}") from None
    if launched is None:
        raise ConfigError(f"{where}: start the command on each machine by torchrun or srun; see docs/scheduling.md.")
    if (started := launched.world_size()) != trainer.num_nodes:
        raise ConfigError(
            f"{where}: the launcher has started {started} processes; start one on each machine "
            f"(--nproc-per-node=1, --ntasks-per-node=1), which starts those of its devices itself."
        )
    rank, host, port = launched.global_rank(), launched.main_address, launched.main_port
    # torchrun's agent keeps a store at this address, or leaves it to its first process.
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host, port, is_master=rank == 0 and not is_kept, timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        raise TryAgainError(f"{where}: node 0 does not answer at {host}:{port} ({error}).") from None
    # A launcher that starts all again keeps its store.
    prefix = f"lifelong-moe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    _joined[:] = [Nodes(trainer.num_nodes, rank, host, port, PrefixStore(prefix, store), prefix)]
    return _joined[0]


def joined(trainer: TrainerConfig) -> Nodes | None:
    """The nodes that this process has joined; None for one machine.

    Raises:
        ConfigError: If it has joined none.
    """
    if trainer.num_nodes == 1:
        return None
    if not _joined:
        trainer.require_one_machine()
    return _joined[0]


@contextmanager
def leading(nodes: Nodes) -> Iterator[None]:
    """Context of the command on node 0, at whose end the others hear its exit code."""
    code = 1
    try:
        yield
        code = 0
    except LifelongError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 130  # as shells report it
        raise
    finally:
        nodes.over(code)
        _joined.clear()


def await_folder(folder: Path) -> None:
    """Wait until a folder of node 0 is visible here.

    Raises:
        ConfigError: If it stays away.
    """
    until = time.monotonic() + SHARED_SECONDS
    while not folder.exists():
        if time.monotonic() > until:
            raise ConfigError(f"{folder.absolute()}: not there; the nodes must share their working directory.")
        time.sleep(POLL_SECONDS)


@contextmanager
def _losing_node_0() -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        raise TryAgainError(
            "node 0 is gone; nothing was committed. Run the same command again to continue from the newest checkpoint."
        ) from None
