"""Products of a few rows with a large matrix, as decoding makes them: they cost what reading the matrix costs.

Legend: N rows, I input width, O output width.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8
"""Up to so many rows the matrix goes first. Measured with MKL on one thread of an AMD EPYC: 1.4 to 3 times faster;
slower at 12."""
LARGE = 1 << 18
"""Elements from which on a matrix is worth the additional calls."""


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x W^T`` of ``(…, I)``: ``F.linear``, but for few rows on a CPU where no gradient is asked for."""
    weight_OI = as_rows(weight_OI, x)
    if torch.is_grad_enabled() or not are_few(x, weight_OI):
        return F.linear(x, weight_OI)
    return matrix_first(x.reshape(-1, x.shape[-1]), weight_OI).reshape(*x.shape[:-1], -1)


def as_rows(weight: Tensor, x: Tensor) -> Tensor:
    """A matrix in the type of the rows that it multiplies, where it may be held in fewer bits."""
    # Autocast brings both to one type itself; a matrix that has it already must not be made float32 before.
    is_cast = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return weight if is_cast else weight.to(x.dtype)


def are_few(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether these rows ``(…, I)`` are better multiplied by :func:`matrix_first`."""
    # Measured in float32 on CPUs; elsewhere the kernels differ.
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight_OI.numel() < LARGE:
        return False
    return 0 < x.numel() <= FEW * x.shape[-1] and has_slow_kernel()


@cache
def has_slow_kernel() -> bool:
    """Whether MKL's own kernel for few rows is the slow one that it has for other processors than Intel's.

    On Intel's :func:`matrix_first` takes twice the time of ``F.linear`` for one row and for two. By the processor's
    maker and not by a timing, so that a machine computes the same bits at each start.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            maker = file.read(1024)
    except OSError:  # not Linux
        maker = platform.processor()
    return torch.backends.mkl.is_available() and "AuthenticAMD" in maker


def matrix_first(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """``(W x^T)^T``, a view ``(N, O)``: a kernel that reads the matrix in a row. For one row that takes a second
    column, as one column alone is given to a slower kernel."""
    num_rows = len(x_NI)
    columns_IN = (x_NI if num_rows > 1 else x_NI.expand(2, -1)).contiguous().t()
    return torch.mm(weight_OI, columns_IN).t()[:num_rows]
