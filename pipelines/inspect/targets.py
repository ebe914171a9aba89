"""Files that `inspect` writes where the user says: new ones, or those of an earlier inspection."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.marks import is_our_page, is_our_table
from pipelines.shared.options import InspectionRequest

KINDS = {"--html": (".html", is_our_page), "--save": (".parquet", is_our_table)}
"""By option, how its file's name ends, and how a file of ours is recognized."""


def require_targets(asked: InspectionRequest) -> None:
    """Require that ``--html`` and ``--save`` would replace nothing but files of ours; ``--force`` allows other files.

    Checked before anything long begins, and again before each file is written.

    Raises:
        ConfigError: If a folder is missing, a name ends otherwise, or what stands there is not to be replaced.
    """
    if asked.force and asked.html is None and asked.save is None:
        raise ConfigError("--force concerns the files of --html and --save; give one of them.")
    for option, path in (("--html", asked.html), ("--save", asked.save)):
        if path is not None:
            _require_target(option, Path(path), force=asked.force)


def _require_target(option: str, path: Path, *, force: bool) -> None:
    ending, is_ours = KINDS[option]
    if not path.parent.is_dir():
        raise ConfigError(f"{option}={path}: no such directory: {path.parent}.")
    if path.suffix != ending or path.is_dir():
        raise ConfigError(f"{option}={path}: give the name of a file that ends in {ending}.")
    try:
        # Opened even with --force: a link, a FIFO or a device is never replaced or written through.
        if not is_ours(path) and not force:
            raise ConfigError(
                f"{option}={path}: there is a file that lifelong-moe did not write; give another name, or --force to "
                f"replace it."
            )
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{option}={path}: {error.strerror or error}; give another name.") from None
