"""What libraries say that does not concern the person at the terminal."""

from __future__ import annotations

import logging
import os
import warnings

# Read when torch is imported, which comes after this module: DDP's C++ would advise each process to turn off its search
# for unused parameters, which it cannot do without where an expert may have no token.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def silence_libraries() -> None:
    """Keep warnings and errors of ours and theirs; drop banners, tips and notes to developers."""
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # its report is what was asked for
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*loader strategy is deprecated.*")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
