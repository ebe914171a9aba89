"""Silence messages of libraries that are not meant for users."""

from __future__ import annotations

import logging
import os
import warnings

from lifelong_moe.errors import visible

# Read when torch is imported, hence set here. DDP's C++ advises each process to turn off the search for unused
# parameters, but an expert without a token in a batch is one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class OneLine(logging.Formatter):
    """Records of one line each: a message that quotes line ends must not look like several records."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Level and message."""
        return visible(super().formatMessage(record), keep="\t")


def silence_libraries() -> None:
    """Keep our warnings and all errors; drop banners, tips and notes to developers."""
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler asks for its report
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # Batches come from a memory map in order: loader workers would gain nothing.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*loader strategy is deprecated.*")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
