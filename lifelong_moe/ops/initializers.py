"""How tensors begin: as a system's authors say, or without numbers and memory where a checkpoint will fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def fan_in_normal_(weight: Tensor, scale: float, generator: torch.Generator | None = None) -> None:
    """Fill a matrix with a normal of deviation ``sqrt(scale / inputs)``, drawn again beyond two deviations.

    What is cut off makes the deviation that is found 0.88 of that.

    Args:
        weight: Outputs by inputs; changed in place.
        scale: Variance times the number of inputs, before cutting.
        generator: Of the random numbers; the default one if None.

    Source:
        Switch (arXiv:2101.03961), section 2.4; ``VarianceScalingInitializer`` in tensorflow/mesh,
        mesh_tensorflow/layers.py.
    """
    deviation = math.sqrt(scale / weight.shape[1])
    # On the CPU, as all numbers of a seed: the same on every device.
    drawn = torch.empty_like(weight, device="cpu")
    nn.init.trunc_normal_(drawn, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


@contextmanager
def without_memory() -> Iterator[None]:
    """Context in which modules are made without memory for their tensors; see :func:`give_memory`."""
    with torch.device("meta"), _Undrawn():
        yield


def give_memory(model: nn.Module) -> None:
    """Give each tensor that has no memory some on the CPU, whatever stands there; what is one tensor stays one.

    A tensor that has memory keeps its numbers: those that no checkpoint stores are made with ``device="cpu"``.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    # By shape and strides: `empty_like`, of a tensor without memory, imports the compiler's algebra.
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                held[name] = made[tensor]


class _Undrawn(TorchFunctionMode):
    """Context in which ``nn.init`` draws nothing; without memory to draw into, it would still import the compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it would draw."""
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)
