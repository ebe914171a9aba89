"""Frozen experts' weights in the CPU's memory, on the device a layer at a time: a view of models while a stage trains.

A layer's weights are copied to the device while the layer before it computes, and given back after use: in a forward
pass from the first layer to the last, and again in the backward pass from the last to the first, which needs them for
the gradient of what comes before a frozen expert. At most two layers' copies are there at a time. The price is that
all frozen experts cross the bus twice a micro-batch, and a teacher's once, whether or not a token chose them.

The Parameters stay where they are in the model, under their names, as the same objects, and a teacher may share them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.model.transformer import LanguageModel


class Arrival(Protocol):
    """Copies under way."""

    def wait(self) -> list[Tensor]:
        """The copies; what computes from now on computes after they came."""


class Courier(Protocol):
    """What brings weights to a device."""

    device: torch.device

    def keep(self, host: Tensor) -> Tensor:
        """The same values in CPU memory from which this courier copies well."""

    def begin(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Arrival:
        """Begin to copy, to another floating-point type if one is given, and do not wait."""


@dataclass
class _Event:
    """Copies that another stream makes."""

    copies: list[Tensor]
    done: torch.cuda.Event

    def wait(self) -> list[Tensor]:
        torch.cuda.current_stream(self.copies[0].device).wait_event(self.done)
        return self.copies


class SideStream:
    """Copies page-locked memory to a CUDA device on a stream of its own, while the device computes.

    Copies are allocated on the stream that computes, and the side stream waits for what it has been told before: memory
    that is given back is then never written before its last reader is done, and there is no more of it than is held.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def keep(self, host: Tensor) -> Tensor:
        """The same values, page-locked."""
        return host if host.is_pinned() else host.pin_memory()

    def begin(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Arrival:
        """Begin to copy; a change of type happens on the device."""
        copies = [torch.empty_like(host, dtype=dtype, device=self.device) for host in hosts]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, host in zip(copies, hosts, strict=True):
                copy.copy_(host if host.dtype == copy.dtype else host.to(self.device, non_blocking=True), True)
            return _Event(copies, self._stream.record_event())


def courier_to(device: torch.device) -> Courier | None:
    """What brings weights to this device; None for one that is not CUDA, where they stay as they are."""
    return SideStream(device) if device.type == "cuda" else None


class _Saved(NamedTuple):
    """What the backward pass needs of a copy, which is not held until then."""

    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Layer:
    layer: MoELayer
    slots: list[tuple[nn.Module, str]]
    """Where its frozen weights are read."""
    implementation: ExpertsImplementation
    """How its experts are computed elsewhere; a buffer of all of them would hold the copies for the backward pass."""
    before: int | None = None
    after: int | None = None


class _Offload:
    """The view of several models whose layers take turns on one device."""

    def __init__(self, models: Iterable[LanguageModel], own: Collection[int], courier: Courier) -> None:
        self.courier = courier
        self._layers: list[_Layer] = []
        self._held: dict[tuple[int, torch.dtype | None], Arrival] = {}
        for model in models:
            first = len(self._layers)
            for layer in model.moe_layers():
                frozen = [g for g in layer.banks.generations if not any(id(p) in own for p in g.parameters())]
                if slots := [(g, name) for g in frozen for name, p in g.named_parameters() if p.numel()]:
                    self._layers.append(_Layer(layer, slots, layer.banks.implementation))
            for i in range(first + 1, len(self._layers)):
                self._layers[i].before, self._layers[i - 1].after = i - 1, i

    def put_on(self) -> None:
        """Let layers ask for copies, and experts stay where they are when their model moves."""
        for i, one in enumerate(self._layers):
            vars(one.layer)["forward"] = partial(self._forward, i, one.layer.forward)
            if one.implementation != ExpertsImplementation.readable:
                one.layer.banks.implementation = ExpertsImplementation.slices
            for expert, name in one.slots:
                vars(expert)["_apply"] = partial(_stay, expert, self.courier)
                host: nn.Parameter = getattr(expert, name)
                host.data = self.courier.keep(host.data)

    def take_off(self) -> None:
        """Leave the models as they were, and give the copies back."""
        for one in self._layers:
            vars(one.layer).pop("forward", None)
            one.layer.banks.implementation = one.implementation
            for expert, _ in one.slots:
                vars(expert).pop("_apply", None)
        self._release(())

    def _forward(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward pass with copies in the place of its frozen weights.

        The graph remembers which part of which copy it needs, and not the copy. A tensor that was made of a copy, such
        as a stack of several, it holds as it would without offload.
        """
        kind = self.courier.device.type
        # Autocast would make copies of the copies, and hold these for the backward pass; this is the same rounding.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        one, copies = self._layers[i], self._bring(i, self._layers[i].after, dtype)
        slot_of = {copy.untyped_storage().data_ptr(): slot for slot, copy in enumerate(copies)}

        def pack(tensor: Tensor) -> Tensor | _Saved:
            slot = slot_of.get(tensor.untyped_storage().data_ptr())
            return tensor if slot is None else _Saved(slot, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(saved: Tensor | _Saved) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            copy = self._bring(i, one.before, dtype)[saved.slot]
            return copy.as_strided(saved.size, saved.stride, saved.offset)

        try:
            for (expert, name), copy in zip(one.slots, copies, strict=True):
                vars(expert)[name] = copy  # found before the Parameter of that name
            with saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)
        finally:
            for expert, name in one.slots:
                vars(expert).pop(name, None)

    def _bring(self, i: int, then: int | None, dtype: torch.dtype | None) -> list[Tensor]:
        """A layer's copies; those of the layer that is needed next are begun, all others given back."""
        wanted = [(one, dtype) for one in (i, then) if one is not None]
        self._release(wanted)
        for key in wanted:
            if key not in self._held:
                hosts = [getattr(expert, name) for expert, name in self._layers[key[0]].slots]
                self._held[key] = self.courier.begin(hosts, dtype)
        return self._held[i, dtype].wait()

    def _release(self, but: Collection[tuple[int, torch.dtype | None]]) -> None:
        """Give copies back; of one that is still under way the memory must not be used again before it came."""
        for key in [key for key in self._held if key not in but]:
            self._held.pop(key).wait()


def _stay(expert: nn.Module, courier: Courier, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What ``Module.to`` does to an offloaded expert: its type changes with its model's, but not its place."""
    for parameter in expert.parameters():
        dtype = fn(parameter.data.new_empty(0)).dtype
        parameter.data = courier.keep(parameter.data.to(dtype))
    return expert


@contextmanager
def offloaded(models: Iterable[LanguageModel], own: Iterable[Tensor], courier: Courier | None) -> Iterator[None]:
    """Within this context experts are in the CPU's memory, wherever their model goes, but for those that train.

    Args:
        models: On the CPU; they take turns on one device, and may share experts.
        own: Parameters that train: an expert that has one goes with its model as always.
        courier: Brings copies to the device when they are needed. None does nothing.
    """
    if courier is None:
        yield
        return
    view = _Offload(models, {id(parameter) for parameter in own}, courier)
    try:
        view.put_on()
        yield
    finally:
        view.take_off()
