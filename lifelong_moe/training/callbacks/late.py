"""Import Lightning only when something is trained, with as little as it needs, and without a change to our logs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

METRICS = "torchmetrics"
ASKED = {"Metric": "metric", "MetricCollection": "collections", "__version__": "__about__"}
"""What Lightning takes from torchmetrics, and the module of it that has that."""
_FIRST = "utilities"
"""Its module that the others, which import each other, can be imported after."""


class _Unrun(ModuleType):
    """A package whose ``__init__.py`` runs once something is asked of it that is not in ``ASKED``.

    Lightning imports torchmetrics for two classes, and it a hundred others, with transformers and SciPy's filters.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        if name in ASKED:
            # A version that lacks one of these modules, or whose modules need more of each other, runs as a whole.
            with suppress(ImportError):
                each = [importlib.import_module(f"{spec.name}.{module}") for module in (_FIRST, ASKED[name])]
                setattr(self, name, getattr(each[-1], name))
                return getattr(self, name)
        # Python itself asks every module whether it has some of these; `import *` asks for its public names.
        elif name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def importing_lightning() -> Iterator[None]:
    """Context for its first import, after a command has set up logging."""
    root, ours = logging.getLogger(), [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    handlers, levels = root.handlers[:], [log.level for log in ours]
    # Where the root logger has a handler, Lightning sets up none of its own and hands its messages on to two others.
    root.handlers = []
    _leave_unrun(METRICS)
    try:
        yield
    finally:
        root.handlers = handlers
        for log, level in zip(ours, levels, strict=True):
            # Its import asks for every message; a level that a command has set before stays.
            log.setLevel(level or log.level)


def _leave_unrun(package: str) -> None:
    """Let an import of ``package`` find it without running it, unless it ran already."""
    if package not in sys.modules and (spec := importlib.util.find_spec(package)) is not None:
        module = importlib.util.module_from_spec(spec)
        module.__dict__["_logger"] = logging.getLogger(package)  # its modules take it from here
        module.__class__ = _Unrun
        sys.modules[package] = module
