"""What the strategies share whose ranks each hold a part of the model: step checkpoints that are whole on rank 0.

They are those of DDP, so that any number of processes continues, whatever each of them holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lifelong_moe.training.ranks.experts import ParallelExperts


class GatheringStrategy(DDPStrategy):
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

    def whole(self, value: Tensor) -> Tensor:
        """A tensor of what is no expert: whole on rank 0, and elsewhere empty if it is divided."""
        return value

    def part(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a whole tensor of a parameter that is no expert's."""
        return value

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

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """What trains, whole on rank 0; frozen tensors are not gathered, since no checkpoint holds them."""
        module: Any = self.lightning_module
        state = {name: self.whole(one) for name, one in module.state_dict().items() if name not in module.frozen}
        return state if self._experts is None else state | self._experts.state(module.frozen)

    def optimizer_state(self, optimizer: Optimizer) -> Any:
        """An optimizer's state, whole on rank 0."""
        state: Any = super().optimizer_state(optimizer)
        return {**state, "state": _each(state["state"], optimizer, self._gathered)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of whole states."""
        states = [
            {**state, "state": _each(state["state"], optimizer, self._divided)}
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def _gathered(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        is_expert = self._experts is not None and parameter in self._experts.placed
        return self._experts.gathered(value) if self._experts is not None and is_expert else self.whole(value)

    def _divided(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        is_expert = self._experts is not None and parameter in self._experts.placed
        return self._experts.part(value) if self._experts is not None and is_expert else self.part(value, parameter)


class ExpertParallelStrategy(GatheringStrategy):
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


def _each(
    moments: Mapping[int, Mapping[str, Any]], optimizer: Optimizer, change: Callable[[Tensor, nn.Parameter], Tensor]
) -> Mapping[int, Mapping[str, Any]]:
    """Each parameter's state, changed but for the count of steps, which is always whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        number: {name: value if name == "step" else change(value, parameters[number]) for name, value in one.items()}
        for number, one in moments.items()
    }
