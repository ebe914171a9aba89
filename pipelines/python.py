"""Runs from Python: what ``lifelong_moe.run`` is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from lifelong_moe.config.load import configure, read_config
from lifelong_moe.config.sections import errors_under
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.reports.frames import RunTables, tables
from lifelong_moe.storage.signing import SigningKeys
from pipelines.preflight import begun, check_memory
from pipelines.shared.output import console, silent
from pipelines.shared.places import require_plain_store
from pipelines.shared.quiet import silence_libraries


def run(
    config: str | Path | Mapping[str, object], *overrides: str, replace: bool = False, quiet: bool = False
) -> RunTables:
    """Train the stages of a run that are not committed, evaluate each, and report, as ``lifelong-moe run`` does.

    Works in the current directory: ``mlruns`` and ``data/cache``. What was committed before is not trained again.

    Args:
        config: A YAML file, or its content.
        overrides: Such as ``"seed=1"``.
        replace: Let the name of the run refer to other stages than before.
        quiet: Print nothing.

    Raises:
        ConfigError: Nothing was written.
        LifelongError: Another one of :mod:`lifelong_moe.errors`; what was committed stays.
        KeyboardInterrupt: A checkpoint is committed by then.
    """
    require_plain_store()
    # As for a command: unusable keys would else be found when the first stage is to be signed.
    SigningKeys.from_environment()
    if isinstance(config, Mapping):
        with errors_under(""):
            content = OmegaConf.create(dict(config))
        loaded = configure(content, overrides, "config", with_checkpoint, begun)
    else:
        loaded = read_config(config, overrides, with_checkpoint, begun)
    check_memory(loaded.config)
    from pipelines.run.run import run as run_stages

    silence_libraries()
    return tables(run_stages(loaded, replace, silent() if quiet else console()))
