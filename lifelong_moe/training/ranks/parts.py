"""What the strategies share whose ranks each hold a part of the model: each writes its part of a step checkpoint.

Any number of processes continues it, whatever each of them holds, as they do DDP's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lifelong_moe.training.callbacks.checkpoint import BackgroundCheckpointIO, SafeCheckpointIO
from lifelong_moe.training.callbacks.divided import Divided, Part, whole
from lifelong_moe.training.callbacks.flattened import Content
from lifelong_moe.training.ranks import supervise
from lifelong_moe.training.ranks.experts import ParallelExperts

_NAME_BYTES = 256
"""No folder has a longer name."""


class PartsStrategy(DDPStrategy):
    """Lightning's DDP, whose ranks may share the experts.

    Args:
        expert_parallel: Ranks among which experts are divided; 1 if each has all.
        settings: Of ``DDPStrategy``.
    """

    def __init__(self, expert_parallel: int, **settings: Any) -> None:
        super().__init__(process_group_backend="gloo", **settings)
        self._expert_parallel = expert_parallel
        self._experts: ParallelExperts | None = None
        self._accumulates = False
        """Whether more micro-batches of the step follow."""

    def place_experts(self) -> Mapping[str, nn.Parameter]:
        """Leave this rank its experts, if they are divided, once weights are those of the checkpoint.

        Returns:
            Their parameters by name in the model, which nothing else may divide or reduce.
        """
        if self._expert_parallel == 1:
            return {}
        module: Any = self.lightning_module
        self._experts = ParallelExperts(module.model, self._expert_parallel)
        return {one.name: parameter for parameter, one in self._experts.placed.items()}

    def part(self, value: Any, name: str) -> Any:
        """What a rank writes of a tensor of what is no expert: the tensor, or its part if it is divided.

        Args:
            value: As this rank has it.
            name: Under which parts are written.
        """
        return value

    def own_part(self, value: Any, parameter: nn.Parameter) -> Any:
        """This rank's part of a stored tensor, which may be in parts, of a parameter that is no expert's."""
        return whole(value)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context of a micro-batch that is not the step's last."""
        self._accumulates = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """After the step's last micro-batch, reduce the experts' gradients."""
        super().post_backward(closure_loss)
        if self._experts is not None and not self._accumulates:
            self._experts.reduce()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, in parts where it is divided; no checkpoint holds frozen tensors."""
        module: Any = self.lightning_module
        state = {name: self.part(one, name) for name, one in module.state_dict().items() if name not in module.frozen}
        return state if self._experts is None else state | self._experts.state(module.frozen)

    def optimizer_state(self, optimizer: Optimizer) -> Any:
        """An optimizer's state, in parts where it is divided."""
        state: Any = super().optimizer_state(optimizer)
        return {**state, "state": _each(state["state"], optimizer, self._part)}

    def save_checkpoint(self, checkpoint: Content, filepath: Any, storage_options: Any | None = None) -> None:
        """Let each rank begin to write its parts."""
        writer, limit = cast(BackgroundCheckpointIO, self.checkpoint_io), supervise.TIMEOUT_SECONDS
        writer.save_parts(checkpoint, Path(filepath), self.global_rank, limit, _told)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Content:
        """Read a checkpoint, but no number of what is in parts: no rank needs all of the moments."""
        return cast(SafeCheckpointIO, self.checkpoint_io).load_parts(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights into the model, which is whole until it is divided."""
        module: Any = self.lightning_module
        module.load_weights(checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of stored states."""
        states = [
            {**state, "state": _each(state["state"], optimizer, self._own_part)}
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def _part(self, value: Tensor, parameter: nn.Parameter, name: str) -> Tensor | Part:
        if self._experts is not None and parameter in self._experts.placed:
            return self._experts.part(value, name)
        part: Tensor | Part = self.part(value, name)
        return part

    def _own_part(self, value: Tensor | Divided, parameter: nn.Parameter, name: str) -> Tensor:
        is_expert = self._experts is not None and parameter in self._experts.placed
        own: Tensor = (self._experts if self._experts is not None and is_expert else self).own_part(value, parameter)
        return own


class ExpertParallelStrategy(PartsStrategy):
    """Expert parallelism: text travels to its experts, and DDP averages the gradients of everything else."""

    def __init__(self, expert_parallel: int) -> None:
        # Unused parameters: a rank may have no token for a generation. Buffers do not change in training.
        super().__init__(expert_parallel, find_unused_parameters=True, forward_sync_buffers=False)

    def configure_ddp(self) -> None:
        """Place experts, and wrap the model but for them."""
        module: Any = self.lightning_module
        ignored = {f"model.{name}" for name in self.place_experts()}
        # Where DDP looks for it; torch's function that sets it is no more public.
        module._ddp_params_and_buffers_to_ignore = ignored
        # DDP refuses a model of which it has nothing to reduce.
        if any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
            super().configure_ddp()


def _told(text: str) -> str:
    """Rank 0's text, on all ranks."""
    data = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    if dist.get_rank() == 0:
        data[: len(text)] = torch.tensor([*text.encode()], dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).rstrip(b"\0").decode()


def _each(
    moments: Mapping[int, Mapping[str, Any]],
    optimizer: Optimizer,
    change: Callable[[Any, nn.Parameter, str], Any],
) -> Mapping[int, Mapping[str, Any]]:
    """Each parameter's state, changed but for the count of steps, which is always whole; each has a name of its own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        number: {
            name: value if name == "step" else change(value, parameters[number], f"{number}.{name}")
            for name, value in one.items()
        }
        for number, one in moments.items()
    }
