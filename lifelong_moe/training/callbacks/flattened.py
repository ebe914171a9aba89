"""What Lightning puts into a checkpoint as plain JSON data and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.storage.plain import from_plain
from lifelong_moe.training.callbacks.divided import Layout, Part, put_together

Content = dict[str, Any]
"""Of a checkpoint, as Lightning gives and takes it."""


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON data for a checkpoint; its tensors are moved to ``tensors``.

    Dictionaries whose keys are not all strings become ``{"$items": [[key, value], …]}``, tuples ``{"$tuple": […]}``,
    tensors ``{"$tensor": name}``, and those of which this process has a part ``{"$parts": layout}``.

    Raises:
        TypeError: If something is neither plain data nor a tensor, and so would need pickle.
    """
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = copied(value)
        return {"$tensor": name}
    if isinstance(value, Part):
        if value.here is not None:
            tensors[value.layout.name] = copied(value.here)
        return {"$parts": asdict(value.layout)}
    if isinstance(value, dict):
        # AdamW's state has integers as keys, which JSON would make strings.
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors) for key, item in value.items()}
        return {"$items": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [flatten(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds plain data and tensors only, not {type(value).__name__}")


def restore(value: Any, files: Mapping[int, dict[str, Tensor]]) -> Any:
    """The inverse of :func:`flatten`, where a tensor in parts is a :class:`Divided`.

    Args:
        value: Plain data.
        files: By rank, the tensors that it has written.
    """
    if isinstance(value, dict):
        if "$tensor" in value:
            return files[0][value["$tensor"]]
        if "$parts" in value:
            return put_together(from_plain(Layout, value["$parts"]), files)
        if "$items" in value:
            return {restore(k, files): restore(v, files) for k, v in value["$items"]}
        if "$tuple" in value:
            return tuple(restore(item, files) for item in value["$tuple"])
        return {key: restore(item, files) for key, item in value.items()}
    if isinstance(value, list):
        return [restore(item, files) for item in value]
    return value


def copied(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, wherever it is: training goes on and changes it while the copy is written."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
