"""Grow a mixture-of-experts language model along a stream of data distributions.

``lifelong_moe.load("my-run")`` gives the model of a run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_moe.serving.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # On use: the package's torch-free parts are imported through here as well.
    if name == "load":
        return import_module("lifelong_moe.serving.loading").load
    if name == "__version__":
        return import_module("importlib.metadata").version("lifelong-moe")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
