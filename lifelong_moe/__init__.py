"""Grow a mixture-of-experts language model along a stream of data distributions.

In Python: ``run(config)`` trains a run, ``report(name)`` gives its numbers as data frames, ``load(name)`` its model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_moe.reports.frames import report
    from lifelong_moe.serving.loading import load
    from pipelines.python import run

__all__ = ["__version__", "load", "report", "run"]


def __getattr__(name: str) -> Any:
    # On use: the package's torch-free parts are imported through here as well.
    if name == "load":
        return import_module("lifelong_moe.serving.loading").load
    if name == "report":
        return import_module("lifelong_moe.reports.frames").report
    if name == "run":
        return import_module("pipelines.python").run
    if name == "__version__":
        return import_module("importlib.metadata").version("lifelong-moe")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
