"""`python -m pipelines.convert FILE.gguf FOLDER`: a GGUF file as a checkpoint that `model.from` takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.from_gguf import convert_gguf
from pipelines.cli import exit_code
from pipelines.shared import output


def convert(arguments: list[str]) -> None:
    """Convert a file, and say where it went.

    Raises:
        ConfigError: The arguments are not a file and a folder that is not there yet.
    """
    if len(arguments) != 2:
        raise ConfigError("usage: python -m pipelines.convert FILE.gguf FOLDER")
    source, target = arguments
    if os.path.lexists(target):
        raise ConfigError(f"{target} is there already; name another folder.")
    convert_gguf(Path(source), Path(target))
    output.console().print(f"wrote {target}")


if __name__ == "__main__":
    output.make_robust()
    sys.exit(exit_code(lambda: convert(sys.argv[1:])))
