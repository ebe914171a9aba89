"""What a launcher such as torchrun has started this process as."""

from __future__ import annotations

import os

from lifelong_moe.errors import ConfigError


def require_started_once() -> None:
    """Require that torchrun has started one process, if any, of a command that one machine carries out.

    Raises:
        ConfigError: If it has started several.
    """
    # As users of Lightning start several processes; SLURM's tasks may be for something else.
    started = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and started != "1":
        raise ConfigError(
            f"trainer.num_nodes=1: torchrun has started {started} processes. Start the command once, which starts the "
            f"processes of trainer.devices itself; or `run` on each machine, with trainer.num_nodes."
        )
