"""Keep frozen experts in CPU memory and stream them to the device, one layer ahead of the computation.

While a layer computes, the next layer's weights are copied to the device, and a layer's copies are freed after use:
first layer to last in the forward pass, last to first in the backward pass, which needs frozen weights for the
gradients of earlier layers. At most two layers' copies exist at a time. In exchange, all frozen experts cross the bus
twice per micro-batch (a teacher's once), whether or not a token chose them.

The model keeps the same Parameter objects under the same names, and a teacher may share them.
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


@contextmanager
def offloaded(
    models: Iterable[LanguageModel], trained: Iterable[Tensor], streamer: WeightStreamer | None
) -> Iterator[None]:
    """Within this context, frozen experts stay in CPU memory wherever their model is moved.

    Args:
        models: On the CPU. They take turns on one device, and may share experts.
        trained: The trainable parameters. A generation that owns one of them moves with its model as usual.
        streamer: Copies weights to the device on demand. None disables offloading.
    """
    if streamer is None:
        yield
        return
    offload = _Offload(models, {id(parameter) for parameter in trained}, streamer)
    try:
        offload.attach()
        yield
    finally:
        offload.detach()


class Transfer(Protocol):
    """Copies in flight."""

    def wait(self) -> list[Tensor]:
        """The copies, ready for all computation that is launched from now on."""


class WeightStreamer(Protocol):
    """Copies weights to a device in the background."""

    device: torch.device

    def prepare(self, host: Tensor) -> Tensor:
        """The same values in CPU memory that this streamer copies efficiently."""

    def start(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Transfer:
        """Start copying, converted to ``dtype`` if given; does not wait."""


def streamer_to(device: torch.device) -> WeightStreamer | None:
    """A streamer for a CUDA device; None for any other, where weights are used in place."""
    return CudaStreamer(device) if device.type == "cuda" else None


class CudaStreamer:
    """Copies page-locked memory to a CUDA device on a side stream, in parallel with computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def prepare(self, host: Tensor) -> Tensor:
        """The same values, page-locked."""
        # Copies from pageable memory would block the host, and so not overlap with computation.
        return host if host.is_pinned() else host.pin_memory()

    def start(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Transfer:
        """Start copying; the type is converted on the device."""
        # Allocated on the compute stream, and the side stream waits for it: the allocator may hand out memory that
        # was just freed, and it must not be overwritten before its last reader is done.
        copies = [torch.empty_like(host, dtype=dtype, device=self.device) for host in hosts]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, host in zip(copies, hosts, strict=True):
                copy.copy_(host if host.dtype == copy.dtype else host.to(self.device, non_blocking=True), True)
            return _CudaTransfer(copies, self._stream.record_event())


@dataclass
class _CudaTransfer:
    """Copies that the side stream makes."""

    copies: list[Tensor]
    done: torch.cuda.Event

    def wait(self) -> list[Tensor]:
        # The compute stream waits, not the host.
        torch.cuda.current_stream(self.copies[0].device).wait_event(self.done)
        return self.copies


class _SavedView(NamedTuple):
    """Where the backward pass finds a tensor that it needs, in place of the tensor."""

    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Layer:
    layer: MoELayer
    slots: list[tuple[nn.Module, str]]
    """Its frozen weights: the module and the name of each."""
    implementation: ExpertsImplementation
    """How its experts are computed without offloading."""
    before: int | None = None
    after: int | None = None


class _Offload:
    """Frozen experts of several models, whose layers take turns on one device."""

    def __init__(self, models: Iterable[LanguageModel], trained: Collection[int], streamer: WeightStreamer) -> None:
        self.streamer = streamer
        self._layers: list[_Layer] = []
        self._transfers: dict[tuple[int, torch.dtype | None], Transfer] = {}
        for model in models:
            first = len(self._layers)
            for layer in model.moe_layers():
                frozen = [g for g in layer.banks.generations if not any(id(p) in trained for p in g.parameters())]
                if slots := [(g, name) for g in frozen for name, p in g.named_parameters() if p.numel()]:
                    self._layers.append(_Layer(layer, slots, layer.banks.implementation))
            for i in range(first + 1, len(self._layers)):
                self._layers[i].before, self._layers[i - 1].after = i - 1, i

    def attach(self) -> None:
        """Make layers fetch copies, and keep experts on the CPU when their model moves."""
        for i, one in enumerate(self._layers):
            vars(one.layer)["forward"] = partial(self._forward, i, one.layer.forward)
            # `grouped_mm` moves all experts into one buffer: the graph would hold it until the backward pass, and
            # copies would lose the storage by which `pack` knows them.
            if one.implementation != ExpertsImplementation.readable:
                one.layer.banks.implementation = ExpertsImplementation.slices
            for experts, name in one.slots:
                vars(experts)["_apply"] = partial(_stay_on_cpu, experts, self.streamer)
                host: nn.Parameter = getattr(experts, name)
                host.data = self.streamer.prepare(host.data)

    def detach(self) -> None:
        """Restore the models and free the copies."""
        for one in self._layers:
            vars(one.layer).pop("forward", None)
            one.layer.banks.implementation = one.implementation
            for experts, _ in one.slots:
                vars(experts).pop("_apply", None)
        self._release(keep=())

    def _forward(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward pass on copies of its frozen weights.

        The graph records which part of which copy it needs instead of holding the copy. It still holds tensors that
        were computed from a copy, such as a stack of several.
        """
        kind = self.streamer.device.type
        # Autocast would cast the copies again and hold the casts until the backward pass; this rounds the same.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        one, copies = self._layers[i], self._fetch(i, self._layers[i].after, dtype)
        slot_of = {copy.untyped_storage().data_ptr(): slot for slot, copy in enumerate(copies)}

        def pack(tensor: Tensor) -> Tensor | _SavedView:
            # Views of a copy share its storage, whose address therefore identifies the copy.
            slot = slot_of.get(tensor.untyped_storage().data_ptr())
            if slot is None:
                return tensor
            return _SavedView(slot, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(saved: Tensor | _SavedView) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            copy = self._fetch(i, one.before, dtype)[saved.slot]
            return copy.as_strided(saved.size, saved.stride, saved.offset)

        try:
            for (experts, name), copy in zip(one.slots, copies, strict=True):
                # An instance attribute hides the Parameter, which nn.Module finds through `__getattr__`.
                vars(experts)[name] = copy
            with saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)
        finally:
            for experts, name in one.slots:
                vars(experts).pop(name, None)

    def _fetch(self, i: int, then: int | None, dtype: torch.dtype | None) -> list[Tensor]:
        """Copies of layer ``i``; starts copying layer ``then``, which is needed next, and frees all others."""
        wanted = [(one, dtype) for one in (i, then) if one is not None]
        self._release(keep=wanted)
        for key in wanted:
            if key not in self._transfers:
                hosts = [getattr(experts, name) for experts, name in self._layers[key[0]].slots]
                self._transfers[key] = self.streamer.start(hosts, dtype)
        return self._transfers[i, dtype].wait()

    def _release(self, keep: Collection[tuple[int, torch.dtype | None]]) -> None:
        """Free all copies but some."""
        for key in [key for key in self._transfers if key not in keep]:
            # Memory of a copy in flight must not be reused before the copy is complete.
            self._transfers.pop(key).wait()


def _stay_on_cpu(
    experts: nn.Module, streamer: WeightStreamer, fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """``Module._apply`` of offloaded experts: their dtype follows the model's, their device does not."""
    for parameter in experts.parameters():
        dtype = fn(parameter.data.new_empty(0)).dtype
        parameter.data = streamer.prepare(parameter.data.to(dtype))
    return experts
