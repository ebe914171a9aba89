"""A GPU that is not there: tensors in CPU memory that say they are on ``cuda:0``.

Like a GPU's they refuse CPU tensors as partners and draw from a generator of their own; each wait of the host for the
device, and each kernel launch, is counted. Numbers are those of the CPU's kernels, so that results can be compared.
What it cannot show: time, memory, and whether a CUDA kernel is right.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""Compute capability of the pretended device: a Hopper's."""
# Of these the host learns a number, or a shape.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm", "matmul", "linear"}
# Of these no kernel is launched.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes",
    "unbind", "detach", "as_strided", "unsqueeze", "squeeze", "alias", "chunk", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "reshape", "_reshape_alias", "diagonal", "lift_fresh", "lift", "is_same_size",
    "unfold", "set_", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_",
}  # fmt: skip


@dataclass
class Log:
    """What a real device would have been asked for."""

    waits: Counter[str] = field(default_factory=Counter)
    """Times that the host waits for the device, by the operation and the line that asks."""
    launches: int = 0
    """Kernels."""
    cast: set[int] = field(default_factory=set)
    """Addresses of the storages from which tensors were brought from one type to another."""
    products: Counter[torch.dtype] = field(default_factory=Counter)
    """Matrix products by the type of what they multiply."""

    @property
    def num_waits(self) -> int:
        """All of them."""
        return self.waits.total()

    def clear(self) -> None:
        """Begin anew."""
        self.waits.clear()
        self.cast.clear()
        self.products.clear()
        self.launches = 0

    def wait(self, what: str) -> None:
        """Note one."""
        self.waits[f"{what} at {_line()}"] += 1


LOG = Log()


def _line() -> str:
    """The innermost line of this project that is under way."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/lifelong_moe/" in name or "/pipelines/" in name:
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a library"


class Pretended(torch.Tensor):
    """A tensor of the pretended device."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        """On the same memory as ``values``, of the CPU."""
        made: Pretended = torch.Tensor._make_subclass(cls, values, False)
        return made

    def get_device(self) -> int:
        """Its index."""
        return 0

    def is_pinned(self, *_: Any) -> bool:
        """Device memory never is."""
        return False

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "tolist":
            LOG.wait(name)
            return plain(args[0]).tolist()
        if name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name == "cpu":
            LOG.wait(name)
            return plain(args[0]).clone()
        if name == "to":
            return _to(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _to(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``Tensor.to``: from the device to the CPU, or to another dtype on the device."""
    this, *rest = args
    device = kwargs.get("device", next((one for one in rest if isinstance(one, str | torch.device)), None))
    like = next((one for one in rest if isinstance(one, Tensor)), None)
    dtype = kwargs.get("dtype", next((one for one in rest if isinstance(one, torch.dtype)), None))
    if like is not None:
        device, dtype = like.device, like.dtype
    if device is not None and torch.device(device).type == "cpu":
        LOG.wait("to")
        values = plain(this)
        return values.to(dtype, copy=True) if dtype is not None else values.clone()
    copy = bool(kwargs.get("copy", False))
    if dtype is None or dtype == this.dtype:
        return this.clone() if copy else this
    with torch._C.DisableTorchFunctionSubclass():
        return func(this, dtype, copy=copy)


def plain(x: Any) -> Any:
    """The CPU tensor beneath; anything else as it is."""
    if not isinstance(x, Pretended):
        return x
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():  # type: ignore[attr-defined]
        return torch.Tensor._make_subclass(torch.Tensor, x.detach() if x.requires_grad else x, False)


def pretended(x: Any) -> Any:
    """A tensor as one of the device; anything else as it is."""
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


class Generator:
    """The device's random numbers."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def seed(self, seed: int) -> None:
        """As ``torch.manual_seed`` does for every device."""
        # Not the CPU's own, so that a draw from the wrong one is noticed.
        self.state = torch.Generator().manual_seed(seed + 77).get_state()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which the CPU's generator stands in for the device's."""
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.default_generator.get_state()
            torch.default_generator.set_state(before)


GENERATOR = Generator()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of the device, or one that brings a tensor to it."""
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    on_device = [one for one in tensors if isinstance(one, Pretended)]
    name = func._schema.name.rpartition("::")[2]
    asked = kwargs.get("device")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name} at {_line()})")
    if on_device:
        _check_partners(name, args, tensors)
        _note_wait(name, args, kwargs)
    # A copy to the device waits too, unless it is told not to.
    elif name == "_to_copy" and not kwargs.get("non_blocking") and tensors[0].numel():
        LOG.wait("copy to the device")
    if name not in VIEWS:
        LOG.launches += 1
    if on_device and name in PRODUCTS:
        LOG.products[on_device[-1].dtype] += 1
    if on_device and name in ("_to_copy", "copy_"):
        target = on_device[0].dtype if name == "copy_" else kwargs.get("dtype") or on_device[0].dtype
        if target != on_device[-1].dtype:
            LOG.cast.add(on_device[-1].untyped_storage().data_ptr())
    if "device" in kwargs:
        # Beneath Python torch itself takes these tensors for the CPU's; who asks for the CPU asks `Tensor.to`.
        kwargs = {**kwargs, "device": None if asked is None else torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            with GENERATOR.in_use():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    if name.endswith("_") and not name.startswith("_") and isinstance(out, Tensor):
        return args[0]
    return tree_map(pretended, out)


def _check_partners(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses; numbers in CPU tensors are welcome, and CPU indices and copies only cost a wait."""
    strangers = [one for one in tensors if not isinstance(one, Pretended) and one.dim()]
    if not strangers:
        return
    if name == "copy_":
        LOG.wait("copy_")
    elif (
        name in INDEXING
        and isinstance(args[0], Pretended)
        and all(any(one is index for index in args[1]) for one in strangers)
    ):
        LOG.wait("an index from the CPU")
    elif name == "scatter" and _line() == "a library":
        # The backward pass of topk and gather in torch 2.11 makes the zeros that it fills without asking for a device.
        return
    else:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}, {[tuple(one.shape) for one in strangers]} at {_line()})"
        )


def _note_wait(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in WAITING or (name == "repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None):
        LOG.wait(name)
    elif name in INDEXING:
        chosen = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        # A mask that is filled with one number needs no places.
        if chosen and not ("put" in name and args[2].numel() == 1):
            LOG.wait("a mask as an index")


class _Arriving(TorchDispatchMode):
    """Tensors that are made on the device, or brought to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return _run(func, args, kwargs)
        if any(isinstance(one, Pretended) for one in tree_flatten((args, kwargs))[0]):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Tensors that are made of numbers of the host: torch copies them itself, beneath what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and asked is not None and torch.device(asked).type == "cuda":
            LOG.wait("numbers to the device")
            LOG.launches += 1
            return pretended(func(*args, **{**kwargs, "device": None}))
        if getattr(func, "__name__", "") == "new_tensor" and isinstance(args[0], Pretended):
            LOG.wait("numbers to the device")
            return pretended(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if getattr(func, "__name__", "") == "to" and len(args) > 1 and isinstance(args[1], Pretended):
            # Like another tensor, whose device torch would take for the CPU.
            return args[0].to(args[1].device, args[1].dtype)
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    """Autocast of the device, by the CPU's rules."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _varlen_attn(
    query_THW: Tensor, key_TJW: Tensor, value_TJW: Tensor, offsets: Tensor, *_: Any, window_size: Any = None, **__: Any
) -> Tensor:
    """In place of FlashAttention's packed kernel, whose only implementation is CUDA's: the same, by a mask."""
    assert query_THW.dtype in (torch.bfloat16, torch.float16) and offsets.dtype == torch.int32
    assert window_size == (-1, 0)
    place_T = torch.arange(len(query_THW), device=query_THW.device)
    document_T = torch.searchsorted(offsets, place_T, right=True)
    mask_TT = (document_T.unsqueeze(1) == document_T) & (place_T.unsqueeze(1) >= place_T)
    repeat = query_THW.shape[1] // key_TJW.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (key_TJW, value_TJW))
    logits = query_THW.transpose(0, 1) @ key.transpose(1, 2) * query_THW.shape[-1] ** -0.5
    out: Tensor = logits.masked_fill(~mask_TT, -torch.inf).softmax(dim=-1) @ value
    return out.transpose(0, 1)


def _grouped(lists: list[list[Tensor]], with_indices: bool = False) -> Any:
    """As torch groups tensors for its fused functions, beneath whose Python these are the CPU's."""
    found = _foreach_utils._group_tensors_by_device_and_dtype(lists, with_indices)
    return {(lists[0][0].device, dtype): value for (_, dtype), value in found.items()}


@contextmanager
def pretended_gpu() -> Iterator[Log]:
    """Context in which there is one GPU, of which the log is returned."""
    import torch.nn.attention.varlen as varlen
    import torch.nn.utils.clip_grad as clip_grad

    enabled, dtype_of, get_state, set_state = (
        torch.is_autocast_enabled, torch.get_autocast_dtype, lambda *_: GENERATOR.state.clone(), _set_state,
    )  # fmt: skip

    def host(kind: str | None) -> str:
        return "cpu" if kind in (None, "cuda") else str(kind)

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=None: CAPABILITY,
            "mem_get_info": lambda device=None: (2**40, 2**40),
            "max_memory_allocated": lambda device=None: 0,
            "manual_seed_all": GENERATOR.seed,
            "get_rng_state": get_state,
            "set_rng_state": set_state,
            "set_device": lambda device: None,
            "empty_cache": lambda: None,
            "get_device_name": lambda device=None: "a pretended GPU",
            # A CUDA build without a driver cannot tell; AdamW asks before each step.
            "is_current_stream_capturing": lambda: False,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda kind=None: enabled(host(kind)))
        patch.setattr(torch, "get_autocast_dtype", lambda kind: dtype_of(host(kind)))
        patch.setattr(varlen, "varlen_attn", _varlen_attn)
        patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", _grouped)
        # Module.to replaces a Parameter by one of another class, and keeps its identity.
        torch.__future__.set_swap_module_params_on_conversion(True)
        LOG.clear()
        try:
            with _Made(), _Arriving():
                yield LOG
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)


def _set_state(state: Tensor, device: Any = None) -> None:
    GENERATOR.state = state.clone()
