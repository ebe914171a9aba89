"""What the strategies share whose ranks each hold a part of what trains: optimizer states that are whole on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer


class GatheringStrategy(DDPStrategy):
    """DDP whose step checkpoints hold whole states, so that any number of processes continues."""

    def gathered(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A tensor divided as a parameter is: whole on rank 0, and empty elsewhere; as it is if it is not divided."""
        raise NotImplementedError

    def divided(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a whole tensor, divided as a parameter is."""
        raise NotImplementedError

    def optimizer_state(self, optimizer: Optimizer) -> Any:
        """An optimizer's state, whole on rank 0."""
        state: Any = super().optimizer_state(optimizer)
        return {**state, "state": _each(state["state"], optimizer, self.gathered)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of whole states."""
        states = [
            {**state, "state": _each(state["state"], optimizer, self.divided)}
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def _each(
    moments: Mapping[int, Mapping[str, Any]], optimizer: Optimizer, change: Callable[[Tensor, nn.Parameter], Tensor]
) -> Mapping[int, Mapping[str, Any]]:
    """Each parameter's state, changed but for the count of steps, which is always whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        number: {name: value if name == "step" else change(value, parameters[number]) for name, value in one.items()}
        for number, one in moments.items()
    }
