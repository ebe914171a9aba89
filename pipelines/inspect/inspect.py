"""`lifelong-moe inspect`: check what is asked for, then show it (``specialization.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.data.formats.limits import MAX_LINE_BYTES
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.modes import SHARED
from lifelong_moe.storage.opening import read_given
from lifelong_moe.store.stages import CommittedStage
from pipelines.inspect.opening import check_label, open_stage
from pipelines.inspect.targets import require_targets
from pipelines.shared.options import InspectionRequest


def inspect_stage(run: str, stage: str | None, asked: InspectionRequest, console: Console) -> Mapping[str, Any]:
    """Inspect a stage on a given text, or on held-out text of the run's distributions if none is given.

    Raises:
        ConfigError: If options contradict each other, or name something that does not exist.
    """
    if asked.tokens is not None and (asked.text is not None or asked.text_file is not None):
        raise ConfigError(f"--tokens={asked.tokens} limits held-out text; leave it out with --text or --text-file.")
    # Cheap checks first: options, files, the run, and only then torch.
    given = _given_text(asked.text, asked.text_file)
    for option, value in (("--layer", asked.layer), ("--html", asked.html), ("--label", asked.label)):
        if given is None and value is not None:
            raise ConfigError(f"{option}={value} needs a text: give --text or --text-file.")
    if asked.interpolate and (given is not None or asked.save is not None):
        raise ConfigError("--interpolate reads held-out text and writes no table; leave out the text and --save.")
    require_targets(asked)
    store, committed = open_stage(run, stage)
    _check_layer(committed, asked.layer)
    if asked.interpolate:
        _require_trained_on(committed)
        from pipelines.inspect.interpolation import interpolate

        result = interpolate(run, store, committed, asked, console)
    elif given is not None:
        check_label(committed, asked.label, console)
        from pipelines.inspect.specialization import on_text

        result = on_text(run, store, committed, *given, asked, console)
    else:
        from pipelines.inspect.specialization import on_heldout

        result = on_heldout(run, store, committed, asked, console)
    return {"run": run, "stage": committed.name, "key": committed.key, **result}


def _require_trained_on(committed: CommittedStage) -> None:
    """Require a stage that trained the weights of another one.

    Raises:
        ConfigError: If it is no such stage.
    """
    why = None
    if committed.derived is not None:
        why = "was not trained, but derived"
    elif committed.parent is None:
        why = "began with random weights"
    elif committed.spec.student is not None:
        why = "is a student, whose layers are not those of its teacher"
    if why:
        raise ConfigError(f"--interpolate: stage {committed.name} {why}; choose another one with --stage.")


def _check_layer(stage: CommittedStage, layer: int | None) -> None:
    architecture = stage.architecture
    if layer is not None and layer >= architecture.model.layers:
        raise ConfigError(f"--layer={layer}: the layers of {stage.name} are 0 to {architecture.model.layers - 1}.")
    if layer is not None and not architecture.experts_in(layer):
        raise ConfigError(f"--layer={layer} is dense: it has no experts to choose from.")


def _given_text(text: str | None, text_file: str | None) -> tuple[str, int] | None:
    """The text, and permissions of files that are made of it; None if none is given."""
    if text is not None and text_file is not None:
        raise ConfigError("--text and --text-file exclude each other; give one.")
    if text_file is not None:
        try:
            # A device may be endless; a text is limited like a document.
            data, mode = read_given(Path(text_file), MAX_LINE_BYTES)
            return data.decode("utf-8"), mode
        except FileNotFoundError:
            raise ConfigError(f"--text-file={text_file}: no such file.") from None
        except OSError as error:
            raise ConfigError(f"--text-file={text_file}: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--text-file={text_file}: not UTF-8 at byte {error.start}.") from None
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("--text is not UTF-8.")
    return None if text is None else (text, SHARED)
