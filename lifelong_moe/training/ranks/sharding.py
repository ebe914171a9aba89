"""Ranks that each hold a part of the model, its gradients and its optimizer state: FSDP2 as a Lightning strategy.

Each block is gathered when it computes and let go afterwards. Each rank writes its part of a step checkpoint, and any
number of processes, with or without shards, continues it.

Experts are computed as in one process. ``grouped_mm`` copies the weights of several generations into one tensor, since
those of shards are never laid side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.callbacks.divided import Divided, Held, Layout, Part, whole
from lifelong_moe.training.ranks.parts import PartsStrategy


def shard_model(model: LanguageModel, mesh: DeviceMesh, but: AbstractSet[nn.Parameter] = frozenset()) -> None:
    """Leave each process its part of each parameter; a forward pass gathers them block by block.

    What is outside of blocks stays whole from the forward pass to the end of the backward pass, since losses read the
    head outside of ``forward``.

    Args:
        model: Whole, the same in each process.
        mesh: The processes.
        but: Parameters that stay as they are.

    Raises:
        ConfigError: If a parameter has no dimension, which the user's own router may have.
    """
    if scalar := next((name for name, parameter in model.named_parameters() if not parameter.dim()), None):
        raise ConfigError(f"trainer.strategy=fsdp cannot divide the scalar {scalar}; give it shape (1,).")
    for parameter in model.parameters():
        # Of a layer that did not grow: nothing of it trains, and FSDP cannot reduce a gradient without numbers.
        if not parameter.numel():
            parameter.requires_grad_(False)
    place = partial(_placement, ranks=mesh.size())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place, ignored_params={*but})
    fully_shard(model, mesh=mesh, reshard_after_forward=False, shard_placement_fn=place, ignored_params={*but})


def _placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """A dimension of each expert's matrix, so that a generation of few experts is divided evenly, too."""
    # Elsewhere, and where no such dimension can be divided evenly, FSDP divides rows, or whole experts. A generation
    # without experts in a layer is empty.
    dims = (1, 2) if parameter.dim() == 3 and parameter.numel() else ()
    return next((Shard(dim) for dim in dims if parameter.shape[dim] % ranks == 0), None)


class _Boundary(torch.autograd.Function):
    """Acts in the backward pass once everything after it is done, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.act()
        return grad, None


def _with_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the block's input need a gradient, before FSDP looks at it."""
    # Ranks send in the order in which blocks end their backward passes. It would be another one on a rank that uses
    # nothing that trains in the block, or below it.
    x_BSD: Tensor = args[0]
    if x_BSD.requires_grad or not torch.is_grad_enabled():
        return None
    return x_BSD.detach().requires_grad_(), *args[1:]


class UnusedParameters:
    """Lets ranks reduce the same gradients, though each has not used some parameters, such as another text's changes.

    FSDP reduces what a rank has, and ranks that have different gradients would add up what does not belong together.
    What no rank has used gets no gradient, as in one process, where the optimizer passes it over.

    Args:
        model: Sharded.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._parameters: list[nn.Parameter] = []
        """Sharded, those that train."""
        self._places: list[tuple[nn.Module, str]] = []
        """Module and name of each, where it is found whole while its block computes."""
        known: set[nn.Parameter] = set()
        embeds = any(parameter.requires_grad for parameter in model.embedding.parameters())
        for block in (*model.blocks, model):
            first = len(self._places)
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    # Experts that are divided otherwise are not FSDP's.
                    is_sharded = isinstance(parameter, DTensor)
                    if parameter is not None and is_sharded and parameter.requires_grad and parameter not in known:
                        known.add(parameter)
                        self._parameters.append(parameter)
                        self._places.append((module, name))
            here = range(first, len(self._places))
            if block is model:
                self._outside = here
            elif here:
                block.register_forward_pre_hook(partial(self._before, here))
            if block is not model and (here or (block is model.blocks[0] and embeds)):
                block.register_forward_pre_hook(_with_gradient, prepend=True)
        self._missing = torch.zeros(len(self._places), device=model.embedding.weight.device)
        self._had_none: list[bool] = []

    def begin(self, loss: Tensor) -> None:
        """Prepare a backward pass from a loss."""
        self._missing.zero_()
        self._had_none = [parameter.grad is None for parameter in self._parameters]
        # Queued first, hence called before FSDP reduces what is outside of blocks.
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(partial(self._fill, self._outside)))

    def end(self) -> None:
        """Take the gradient from parameters that no rank has used."""
        if not self._places:  # experts that are divided otherwise may be all that trains
            return
        dist.all_reduce(self._missing)
        unused = (self._missing == dist.get_world_size()).tolist()
        for parameter, had_none, is_unused in zip(self._parameters, self._had_none, unused, strict=True):
            if had_none and is_unused:
                parameter.grad = None

    def _before(self, here: range, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        return _Boundary.apply(args[0], partial(self._fill, here)), *args[1:]

    def _fill(self, here: range) -> None:
        """Give parameters without a gradient one of zero, and remember them."""
        for place in here:
            module, name = self._places[place]
            whole = module._parameters[name]
            if whole is not None and whole.grad is None:
                whole.grad = torch.zeros_like(whole)
                self._missing[place] = 1


class ShardedStrategy(PartsStrategy):
    """Lightning's DDP with a sharded model in place of DDP's wrapper; checkpoints pass through ``CheckpointIO``.

    Lightning's own ``ModelParallelStrategy`` writes and reads them with pickle.
    """

    def configure_ddp(self) -> None:
        """Shard the model, whose weights are those of the checkpoint by then; experts that are divided stay as such."""
        model, experts = cast(Any, self.lightning_module).model, {*self.place_experts().values()}
        shard_model(model, init_device_mesh(self.root_device.type, (self.world_size,)), experts)
        self._unused = UnusedParameters(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch's losses."""
        with warnings.catch_warnings():
            # The input of a block may be a view of the embedding's output; nothing writes into what a model returns.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare the backward pass."""
        self._unused.begin(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Take back gradients of zero that no rank needs."""
        self._unused.end()
        super().post_backward(closure_loss)

    def teardown(self) -> None:
        """End, but leave the model where it is: the process ends, too."""
        # FSDP cannot move weights that are gathered, as where a step has failed, and its error would hide the step's.
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module

    def part(self, value: Any, name: str) -> Any:
        """A tensor, or what this rank writes of it if it is divided."""
        if not isinstance(value, DTensor):
            return value
        # Such as of a layer that did not grow: there is nothing to divide.
        if not value.numel():
            return value.to_local().new_empty(value.shape)
        dim, held = _divided(value)
        ranks = tuple(Held(rank, one.start) for rank, one in enumerate(held) if one)
        here = value.to_local() if held[dist.get_rank()] else None
        return Part(Layout(name, tuple(value.shape), dim, ranks), here)

    def own_part(self, value: Any, parameter: nn.Parameter) -> Any:
        """This rank's part of a stored tensor.

        Raises:
            ValueError: If it is of another shape.
        """
        if not isinstance(parameter, DTensor):
            return whole(value)
        stored = Divided.of(value)
        if stored.shape != parameter.shape:
            raise ValueError(f"{stored.shape} in place of {tuple(parameter.shape)}")
        dim, held = _divided(parameter)
        here = stored.taken(dim, held[dist.get_rank()]).to(parameter.device)
        mesh, placements, stride = parameter.device_mesh, parameter.placements, parameter.stride()
        return DTensor.from_local(here, mesh, placements, shape=parameter.shape, stride=stride)


def _divided(tensor: DTensor) -> tuple[int, list[range]]:
    """The dimension of it that is divided, and which indices of it each rank has."""
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    length, ranks = tensor.shape[placement.dim], tensor.device_mesh.size()
    # As `torch.chunk` divides it, so that the last ranks may have less, or nothing.
    most = -(-length // ranks)
    return placement.dim, [range(min(rank * most, length), min((rank + 1) * most, length)) for rank in range(ranks)]
