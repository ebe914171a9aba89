"""A command on several machines: on the first it runs, and the others lend it their processes."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.training.callbacks.interrupt import handling_signals
from lifelong_moe.training.callbacks.late import importing_lightning
from lifelong_moe.training.ranks.surroundings import Surroundings
from pipelines.shared.launcher import require_started_once


def on_nodes(trainer: TrainerConfig, command: Callable[[], None], console: Console) -> None:
    """Run a command if this is the only machine, or the first that a launcher has started it on.

    Args:
        trainer: Says how many machines there are.
        command: Writes everything that is written.
        console: Where people read.

    Raises:
        ConfigError: If there should be several, and no launcher has started one process on each; or one, and torchrun
            has started several.
        SystemExit: On every other machine, when the command has ended, with its exit code.
        TryAgainError: On every other machine, if the first is gone.
    """
    if trainer.num_nodes == 1:
        require_started_once()
        command()
        return
    with importing_lightning():
        from lifelong_moe.training.ranks.nodes import join_nodes, leading
        from lifelong_moe.training.ranks.supervise import lend_ranks
    nodes = join_nodes(trainer)
    if nodes.rank == 0:
        with leading(nodes):
            command()
        return
    with handling_signals() as interrupt:
        here = Surroundings(interrupt, lambda rows: None, console)
        code = lend_ranks(nodes, trainer.processes_here, here)
    raise SystemExit(code)
